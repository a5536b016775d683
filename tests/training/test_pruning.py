"""Pruning of learning rates: the rule, the packs it needs, what counts as finished, and a whole sweep with it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures.jobs import RATES, cell, job
from fixtures.runs import make_base, make_data
from lorabench.config.runs import Pack, RunConfig, Settings
from lorabench.store.records import Record, Store
from lorabench.sweep import workers
from lorabench.sweep.packs import Job, assign_packs, new_manifest, plan_packs, planning_round
from lorabench.sweep.resume import finished_records
from lorabench.training.pruning import MIN_RATES, cell_key, is_prunable, prune_reason, slices_to_prune

# -- the rule --------------------------------------------------------------------------------------------------------


def drop(
    scores: Sequence[float], *, step: int = 50, total: int = 100, alive: Sequence[bool] | None = None
) -> list[int]:
    """Of one cell with one seed a rate, rates ascending: the places of the rates pruned."""
    return slices_to_prune(
        RATES[: len(scores)], scores, alive or [True] * len(scores), step=step, total=total, groups=[0] * len(scores)
    )


LADDER = [0.90, 0.80, 0.60, 0.50, 0.70, 0.85, 0.95, 0.99]  # best is place 3


@pytest.mark.parametrize("total", [100, 101, 7, 2])
def test_never_before_half_of_the_steps_nor_at_the_end(total: int) -> None:
    for step in range(total + 1):
        assert bool(drop(LADDER, step=step, total=total)) == (total / 2 <= step < total), step


def test_the_better_half_goes_on() -> None:
    assert drop(LADDER) == [0, 5, 6, 7]


def test_each_rung_halves_what_is_left_down_to_the_best_and_its_neighbours() -> None:
    scores = [0.52, 0.53, 0.90, 0.50, 0.95, 0.80, 0.85, 0.99]  # the neighbours of the best, 2 and 4, look bad
    alive = [True] * 8
    left = []
    for step in (50, 60, 70, 80):
        for k in drop(scores, step=step, alive=alive):
            alive[k] = False
        left.append([k for k in range(8) if alive[k]])
    assert left == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    # an odd number keeps its larger half: of five, the neighbours 2 and 4 being the last two, three are the better half


@pytest.mark.parametrize("best", range(8))
def test_the_best_and_its_neighbours_on_the_grid_go_on(best: int) -> None:
    scores = [0.5 + 0.01 * k for k in range(8)]
    for k in (best - 1, best + 1):
        if 0 <= k < 8:
            scores[k] = 5.0 + k
    scores[best] = 0.1
    assert not {best - 1, best, best + 1} & set(drop(scores))
    assert drop(scores)


def test_neighbours_are_those_of_the_grid_not_of_the_rates_alive() -> None:
    """Place 2 was pruned before place 3 took the lead: nobody takes its part."""
    alive = [True, True, False, True, True, True, True, True]
    assert drop([0.9, 0.95, math.nan, 0.1, 0.99, 0.3, 0.4, 0.5], alive=alive) == [0, 1]


def test_ties() -> None:
    assert drop([0.5] * 8) == [], "no rate is dropped for a tie"
    assert drop([0.1, 0.2, 0.3, 0.3, 0.3, 0.9, 0.9, 0.9]) == [5, 6, 7], (
        "who ties with the last of the better half stays"
    )
    # of two bests the smaller rate is the one whose neighbours are safe, as in the choice
    assert drop([0.9, 0.1, 0.9, 0.5, 0.5, 0.9, 0.1, 0.9]) == [5, 7]


@pytest.mark.parametrize("n", range(1, MIN_RATES))
def test_fewer_than_four_rates_are_left_alone(n: int) -> None:
    assert drop([0.1, 0.9, 0.99][:n]) == []


def test_four_rates() -> None:
    assert drop([0.1, 0.2, 0.3, 0.4]) == [2, 3]
    assert drop([0.3, 0.1, 0.2, 0.4]) == [3]
    assert drop([0.4, 0.3, 0.1, 0.2]) == [0]
    assert drop([0.4, 0.1, 0.3, 0.2]) == [], "the one that is no neighbour is in the better half"


@pytest.mark.parametrize("lost", [math.nan, math.inf, None])
def test_a_rate_that_lost_a_seed_is_out_with_all_its_seeds(lost: float | None) -> None:
    """Two seeds a rate; the rate at place 6, then the one beside the best, loses its second."""
    for place, gone in ((6, True), (4, False)):
        losses = [x for x in LADDER for _ in range(2)]
        losses[2 * place] = 0.01  # it would have been the best
        alive = [True] * 16
        losses[2 * place + 1] = 0.0 if lost is None else lost
        alive[2 * place + 1] = lost is not None
        found = slices_to_prune(
            [r for r in RATES for _ in range(2)], losses, alive, step=50, total=100, groups=["c"] * 16
        )
        assert (2 * place in found) == gone, "the neighbour of the best goes on: it bounds the grid"
        assert {6, 7}.isdisjoint(found), "the best is the best of those that lost nothing"
        assert (2 * place + 1 in found) == (gone and lost is not None)


def test_a_cell_that_lost_every_rate_is_left_alone() -> None:
    assert drop([math.nan] * 8) == []
    assert drop(LADDER, alive=[False] * 8) == []


def test_a_slice_that_stopped_early_is_still_in_the_race() -> None:
    """It stays alive with its loss: the others are measured against it."""
    assert drop([0.5, 0.01, 0.5, 0.6, 0.7, 0.8]) == [3, 4, 5]


def oracle(rates: list[float], losses: list[float], alive: list[bool]) -> set[float]:
    """Counting instead of sorting: the rates of one cell that are pruned."""
    scores = {}
    for lr in set(rates):
        mine = [(x, a) for r, x, a in zip(rates, losses, alive) if r == lr]
        if all(a and math.isfinite(x) for x, a in mine):
            scores[lr] = math.fsum(x for x, _ in mine) / len(mine)
    if len(set(rates)) < 4 or not scores:
        return set()
    best = min(lr for lr in scores if scores[lr] == min(scores.values()))
    between = {lr: sum(min(lr, best) < r < max(lr, best) for r in set(rates)) for lr in set(rates)}
    worse = {
        lr for lr in set(rates) if lr not in scores or 2 * sum(x < scores[lr] for x in scores.values()) >= len(scores)
    }
    return {lr for lr in worse if lr != best and between[lr] > 0}


def draw(g: random.Random) -> tuple[list[float], list[float], list[bool]]:
    """One cell: rates x seeds in any order, sometimes with equal losses, diverged and already pruned slices."""
    slices = [(lr, 0) for lr in g.sample(RATES, g.randint(1, 8))]
    slices = [(lr, seed) for lr, _ in slices for seed in range(g.randint(1, 3))]
    g.shuffle(slices)
    losses = [g.choice([g.random(), round(g.random(), 1), math.nan if g.random() < 0.2 else 0.5]) for _ in slices]
    out = {lr for lr, _ in slices if g.random() < 0.2}
    return [lr for lr, _ in slices], losses, [lr not in out for lr, _ in slices]


@pytest.mark.parametrize("seed", range(300))
def test_against_counting_and_cells_do_not_know_each_other(seed: int) -> None:
    g = random.Random(seed)
    cells = [draw(g) for _ in range(3)]
    order = [(c, k) for c, cell in enumerate(cells) for k in range(len(cell[0]))]
    g.shuffle(order)
    rates, losses, alive = ([cells[c][part][k] for c, k in order] for part in range(3))
    found = slices_to_prune(rates, losses, alive, step=7, total=10, groups=[c for c, _ in order])
    assert found == sorted(set(found))
    for c, pairs in enumerate(cells):
        mine = [i for i in found if order[i][0] == c]
        want = oracle(*pairs)
        assert {rates[i] for i in mine} == {lr for lr, a in zip(pairs[0], pairs[2]) if a and lr in want}
        assert len(mine) == sum(a and lr in want for lr, a in zip(pairs[0], pairs[2])), "all seeds of a rate at once"


def test_the_reason_names_the_step() -> None:
    assert prune_reason(50, 100).startswith("pruned at step 50 of 100: ")


# -- cells -----------------------------------------------------------------------------------------------------------


def test_the_key_of_a_cell() -> None:
    assert len({cell_key(r) for r in cell()}) == 1
    first = cell_key(cell()[0])
    for changes in ({"method.r": 4}, {"optimizer.weight_decay": 0.1}, {"trainer.batch_size": 8}, {"sweep.role": "confirm"},
                    {"method.target_modules": "mlp"}):  # fmt: skip
        assert cell_key(job(**changes).run) != first, changes
    assert cell_key(job(**{"trainer.eval_batch_size": 7}).run) == first, "what makes no other run makes no other cell"


def test_what_can_be_pruned() -> None:
    assert is_prunable(cell(RATES[:4]))
    assert not is_prunable(cell(RATES[:3], seeds=range(9)))
    assert not is_prunable(cell(**{"sweep.role": "confirm"}))


# -- packs -----------------------------------------------------------------------------------------------------------


def before(runs: Sequence[RunConfig], max_pack: int, start: int = 0) -> list[tuple[str, list[str]]]:
    """How packs were planned before there was pruning."""
    groups: dict[str, list[RunConfig]] = {}
    for run in runs:
        groups.setdefault(run.pack_key, []).append(run)
    packs: list[tuple[str, list[str]]] = []
    for group in groups.values():
        group.sort(key=lambda r: (r.method.r, r.seed, r.optimizer.lr, r.run_id))
        count = math.ceil(len(group) / max_pack)
        size = math.ceil(len(group) / count)
        for i in range(0, len(group), size):
            packs.append((f"p{start + len(packs)}", [r.run_id for r in group[i : i + size]]))
    return packs


GRID = [r for rank in (1, 4, 16) for r in cell(RATES[:5], seeds=(0, 1), **{"method.r": rank})]
GRID += cell(RATES[:3], **{"method.name": "head"}) + cell(RATES[:4], seeds=(0,), **{"method.name": "full"})


@pytest.mark.parametrize("max_pack", range(1, 20))
def test_without_pruning_the_plan_is_what_it_was(max_pack: int) -> None:
    g = random.Random(max_pack)
    for n in (1, 2, 7, len(GRID)):
        runs = g.sample(GRID, n)
        packs = plan_packs(runs, max_pack, 3)
        assert [(p.id, p.run_ids) for p in packs] == before(runs, max_pack, 3)
        assert not any(p.prune for p in packs)


@pytest.mark.parametrize("max_pack", [1, 4, 8, 10, 15, 20, 100])
def test_with_pruning_cells_stay_whole(max_pack: int) -> None:
    runs = random.Random(0).sample(GRID, len(GRID))
    packs = plan_packs(runs, max_pack, 5, prune=True)
    assert [p.id for p in packs] == [f"p{5 + i}" for i in range(len(packs))]
    assert sorted(i for p in packs for i in p.run_ids) == sorted(r.run_id for r in GRID)
    for pack in packs:
        assert len({r.pack_key for r in pack.runs}) == 1
        held = {cell_key(r): sum(cell_key(o) == cell_key(r) for o in GRID) for r in pack.runs}
        lora = pack.runs[0].method.name == "lora"
        assert pack.prune == lora, "head-only has three rates, full fine-tuning trains alone"
        if lora:
            assert len(pack.runs) == sum(held.values()), "the whole of each of its cells"
            assert len(pack.runs) <= max_pack or len(held) == 1
        else:
            assert len(pack.runs) <= max_pack
    ranks = [[r.method.r for r in p.runs] for p in packs if p.prune]
    assert [r for pack in ranks for r in pack] == sorted(r for pack in ranks for r in pack), "equal ranks side by side"


@pytest.mark.parametrize(("max_pack", "sizes"), [(8, [10, 10, 10]), (19, [10, 10, 10]), (20, [20, 10]), (30, [30])])
def test_small_cells_share_a_pack(max_pack: int, sizes: list[int]) -> None:
    assert [len(p.runs) for p in plan_packs(GRID[:30], max_pack, prune=True)] == sizes


def test_confirmation_is_packed_as_ever() -> None:
    runs = cell(RATES[:1], seeds=range(100, 120), **{"sweep.role": "confirm"})
    packs = plan_packs(runs, 8, prune=True)
    assert [(p.id, p.run_ids) for p in packs] == before(runs, 8)
    assert not any(p.prune for p in packs)


def jobs(rates: Sequence[float], *, prune: bool, seeds: Sequence[int] = (0, 1)) -> list[Job]:
    return [job(**{"optimizer.lr": lr, "seed": s, "sweep.prune": prune}) for s in seeds for lr in rates]


def plan(store: Store, listed: Sequence[Job]) -> Any:
    """Declare the runs in the manifest, then plan."""
    manifest = store.manifest() or new_manifest(listed[0])
    manifest["runs"] |= {
        j.run.run_id: {"lr": j.run.optimizer.lr, "seed": j.run.seed, "config": j.run.to_dict()} for j in listed
    }
    store.write_manifest(manifest)
    return assign_packs(store, listed)


def test_the_manifest_says_which_packs_prune(sweep_dir: Path) -> None:
    store = Store(sweep_dir)
    (pack,) = plan(store, jobs(RATES, prune=True))
    assert pack.prune and len(pack.runs) == 16
    (entry,) = store.manifest()["packs"]
    assert entry["prune"] is True
    assert plan(store, jobs(RATES[:1], prune=True)) == [pack], "rebuilt from the manifest, members and all"
    assert plan(store, jobs(RATES, prune=False)) == [replace(pack, prune=False)]
    assert store.manifest()["packs"] == [entry]


def test_packs_of_a_round_are_as_many_when_some_are_asked_for_again(sweep_dir: Path, monkeypatch: Any) -> None:
    """Of a round of added rates that was cut only what is left is asked for; its packs go on with the threads they had."""
    monkeypatch.setattr(workers, "_cores", lambda: list(range(16)))
    store = Store(sweep_dir)
    grid = [job(**{"optimizer.lr": lr, "seed": s, "sweep.max_pack": 1}) for s in (0, 1) for lr in RATES]
    plan(store, grid)
    added = [job(**{"optimizer.lr": lr, "seed": 0, "sweep.max_pack": 1}) for lr in (0.3, 0.6)]
    whole, left = plan(store, added), plan(store, added[1:])
    assert (len(whole), len(left)) == (2, 1) and left[0] == whole[1]
    assert (
        workers.share_count(planning_round(store, whole), None)
        == workers.share_count(planning_round(store, left), None)
        == 2
    )
    halves = [Pack(f"{left[0].id}.{k}", left[0].runs) for k in range(2)]
    assert workers.share_count(planning_round(store, halves), None) == 2
    assert {p.id for p in planning_round(store, whole)} == {p.id for p in whole}, "the grid was another round"
    lone = plan(store, [job(**{"optimizer.lr": 0.7, "seed": 0, "sweep.max_pack": 1})])
    assert workers.share_count(planning_round(store, lone), None) == 1


def test_without_pruning_the_manifest_says_nothing_of_it(sweep_dir: Path) -> None:
    store = Store(sweep_dir)
    plain = plan(store, jobs(RATES, prune=False))
    assert all("prune" not in e for e in store.manifest()["packs"])
    assert plan(store, jobs(RATES, prune=True)) == plain, "what was planned without pruning trains without it"


def test_rates_that_join_a_cell_later_are_not_pruned(sweep_dir: Path) -> None:
    """The rule would see them without the rates that went before."""
    store = Store(sweep_dir)
    (first,) = plan(store, jobs(RATES[:4], prune=True))
    again, *late = plan(store, jobs(RATES, prune=True))
    assert again == first
    assert late and not any(p.prune for p in late)
    assert len({p.id for p in (first, *late)}) == 1 + len(late)


# -- what is finished ------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> Settings:
    return job(**{"sweep.accept_drift": True, **changes}).settings


@pytest.mark.parametrize(
    ("changes", "finished"),
    [
        ({"sweep.prune": True}, {"completed", "diverged", "failed", "pruned"}),
        ({"sweep.prune": False}, {"completed", "diverged", "failed"}),
        ({"sweep.prune": True, "sweep.retry_failed": True}, {"completed", "diverged", "pruned"}),
        ({"sweep.prune": False, "sweep.retry_failed": True}, {"completed", "diverged"}),
    ],
)
def test_a_pruned_run_is_finished_while_pruning_is_on(sweep_dir: Path, changes: Any, finished: set[str]) -> None:
    store, runs = Store(sweep_dir), cell(RATES[:5], seeds=(0,))
    for run, status in zip(runs, ("completed", "diverged", "failed", "pruned")):
        store.write(Record(run.run_id, "tune", status, run.to_dict()))
    found = finished_records(store, settings(**changes), runs)
    assert {r.status for r in found.values()} == finished


# -- a whole sweep ---------------------------------------------------------------------------------------------------


@pytest.fixture
def grid(cli: Any, tmp_path: Path) -> Any:
    """Two ranks x six rates x two seeds on the tiny base, evaluated every second step of 12."""
    base, data = make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv")
    argv = [
        "-m", "model=hf", f"model.source={base}", "model.name=tiny", "task=text_file", f"task.file={data}", "task.max_length=32",
        "trainer.max_steps=12", "trainer.eval_interval=2", "trainer.batch_size=4", "trainer.precision=64", "trainer.accelerator=cpu",
        "method.r=1,4", "optimizer.lr=1e-3,4e-3,1.6e-2,6.4e-2,2.5e-1,1", "sweep.tune_seeds=[0]", "sweep.measure_solo=false",
        "report.enabled=false",
    ]  # fmt: skip

    def run(name: str, *more: str) -> tuple[Store, str]:
        code, out = cli(*argv, f"sweep.name={name}", *more)
        assert code == 0, out
        return Store(f"sweeps/{name}"), out

    return run


def test_a_sweep_with_pruning_does_what_the_replay_says_and_goes_on_without(
    grid: Any, repo: Path, monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    import pruning as replays

    full, _ = grid("full")
    want: dict[str, int] = {}
    for _, runs in replays.cells(full):
        want |= replays.replay(runs, 12)
    assert want and len(want) < 12

    short, out = grid("short", "sweep.prune=true", "report.enabled=true")
    assert "pruned" in out
    assert {e.get("prune") for e in short.manifest()["packs"]} == {True}
    for record in short.records():
        other = full.read(record.run_id)
        assert other is not None
        if record.run_id not in want:
            assert record.status == other.status
            assert record.metrics == pytest.approx(other.metrics, abs=1e-10)
            continue
        step = want[record.run_id]
        assert record.status == "pruned" and record.metrics["pruned_step"] == step
        assert record.error == prune_reason(step, 12)
        seen = {h["step"]: h["val/loss"] for h in full.history(record.run_id) if "val/loss" in h}
        assert record.metrics["val/loss"] == pytest.approx(seen[step], abs=1e-10)
        assert max(h["step"] for h in short.history(record.run_id)) == step
        assert not any(k.startswith("test/") for k in record.metrics)
        assert not (short.run_dir(record.run_id) / "adapter").exists()
    report = Path("reports/short/report.md").read_text(encoding="utf-8")
    assert f"{len(want)} of 12 tuning runs" in report

    before = {p: p.read_bytes() for p in short.root.glob("runs/*/run.json")}
    assert "nothing to train" in grid("short", "sweep.prune=true")[1]
    assert {p: p.read_bytes() for p in before} == before

    kept = {p for p in before if json.loads(before[p])["status"] != "pruned"}
    short, _ = grid("short")
    assert {p for p in before if p.read_bytes() == before[p]} == kept, "only the pruned ones are written again"
    for record in short.records():
        other = full.read(record.run_id)
        assert other is not None and record.status == other.status
        assert record.metrics == pytest.approx(other.metrics, abs=1e-10)


def test_confirmation_runs_are_never_pruned(grid: Any) -> None:
    one = ["method.r=4"]
    store, _ = grid("confirmed", "sweep.prune=true", "sweep.confirm_seeds=[7,8]", *one)
    assert {r.status for r in store.records() if r.role == "tune"} == {"completed", "pruned"}
    assert {r.status for r in store.records() if r.role == "confirm"} == {"completed"}
    assert sum(r.role == "confirm" for r in store.records()) == 2
