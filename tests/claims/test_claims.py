"""Claims of the literature on sweeps whose truth is planted: each made to hold, to fail, to be undecidable, not to apply."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lorabench.claims import __main__ as face
from lorabench.claims import judge as claims
from lorabench.claims import quality as claims_quality
from lorabench.claims import rates as claims_rates
from lorabench.claims import weights as claims_weights
from lorabench.claims.verdict import Verdict, judge_range, negate, seeds_to_settle
from lorabench.results.evidence import Evidence, gather
from lorabench.results.selection import choose
from lorabench.results.sweep import load
from lorabench.stats.estimates import mean_over_seeds
from lorabench.store.records import Record, Store

HOLDS, NOT, OPEN, NA = "holds", "contradicted", "not enough evidence", "not applicable"
UNIT = 1e-3  # rates are given in octaves from here


@dataclass(frozen=True)
class Cell:
    """A cell and the truth behind it."""

    method: str = "LoRA"
    r: int | None = 8
    alpha: float | None = 32.0
    best: float = 0.0  # octaves from UNIT
    quality: float = 0.75  # test accuracy
    targets: str = "all-linear"
    batch: int = 32
    examples: int = 3200
    trainable: int = 100_000
    config: Mapping[str, Any] = field(default_factory=dict)  # sections over the defaults
    probe: float | None = None
    points: int = 5  # rates, an octave apart, around the best
    shift: int = 0  # of the whole grid, in octaves


FULL = Cell("full", None, None, targets="everything", trainable=22_000_000)


@dataclass(frozen=True)
class Plan:
    """A sweep of cells. loss, score: standard deviations of a seed's validation loss and test accuracy."""

    cells: Sequence[Cell]
    loss: float = 0.0005
    score: float = 0.001
    steps: int = 400
    tune: int = 3
    confirm: int = 4

    def noisy(self, **changes: Any) -> Plan:
        return replace(self, **changes)


def build(root: Path, plan: Plan) -> Evidence:
    store, rng = Store(root), np.random.default_rng(1)
    entries: list[dict[str, Any]] = []
    for n, cell in enumerate(plan.cells):
        middle = round(cell.best) + cell.shift
        grid = [UNIT * 2.0 ** (middle + k - cell.points // 2) for k in range(cell.points)]
        made = {}
        for lr in grid:
            for seed in range(plan.tune):
                loss = 0.5 + 0.02 * (math.log2(lr / UNIT) - cell.best) ** 2 + rng.normal(0, plan.loss)
                record = write(store, plan, n, cell, "tune", lr, seed, {"val/loss": loss, "val/accuracy": cell.quality})
                made[record.run_id] = record
        entry: dict[str, Any] = {"id": f"c{n}", "label": label(cell), "runs": {"tune": list(made), "confirm": []}}
        chosen = choose({"cells": [entry]}, made)[f"c{n}"].lr
        for seed in range(100, 100 + plan.confirm):
            score = cell.quality + rng.normal(0, plan.score)
            metrics = {"val/loss": 0.5, "val/accuracy": cell.quality, "test/accuracy": score}
            if cell.probe is not None:
                metrics["probe/wiki/loss"] = cell.probe + rng.normal(0, plan.score)
            entry["runs"]["confirm"].append(
                write(store, plan, n, cell, "confirm", chosen or grid[0], seed, metrics).run_id
            )
        entries.append(entry)
    store.write_manifest({"schema": 1, "name": "planted", "cells": entries, "runs": {}, "study": {"margin": 0.02}})
    return gather(load(root))


def label(cell: Cell) -> dict[str, Any]:
    rule = None if cell.alpha is None else f"{cell.alpha:g}" + ("/sqrt(r)" if cell.method == "rsLoRA" else "")
    extra = {"trainer.batch_size": str(cell.batch)}
    return {"method": cell.method, "r": cell.r, "alpha": cell.alpha, "alpha_rule": rule, "targets": cell.targets,
            "trainable": cell.trainable, "extra": extra}  # fmt: skip


def write(
    store: Store, plan: Plan, n: int, cell: Cell, role: str, lr: float, seed: int, metrics: dict[str, float]
) -> Record:
    config: dict[str, Any] = {
        "method": {"name": cell.method.lower(), "r": cell.r, "alpha": cell.alpha}, "optimizer": {"name": "adamw", "lr": lr},
        "trainer": {"batch_size": cell.batch}, "seed": seed, "role": role,
    }  # fmt: skip
    for section, values in cell.config.items():
        config[section] = {**config[section], **values}
    run_id = hashlib.sha256(repr((n, role, lr, seed)).encode()).hexdigest()[:12]
    resources = {"steps": plan.steps, "examples": cell.examples, "trainable_parameters": cell.trainable}
    record = Record(
        run_id, role, "completed", config, {"primary": "accuracy", "lower_is_better": False, **metrics}, resources
    )
    store.write(record)
    return record


def judged(claim: Callable[[Evidence], Verdict], e: Evidence) -> Verdict:
    """The verdict, and what every verdict keeps to."""
    v = claim(e)
    assert v.claim and v.source and v.reason
    if v.status == OPEN:
        assert v.settle
    if v.status in (HOLDS, NOT):
        assert v.number and v.interval and not v.settle
        assert v.interval[0] <= v.interval[1]
    return v


def ladder(
    best: Callable[[int], float], ranks: Sequence[int], alpha: Callable[[int], float], **rest: Any
) -> list[Cell]:
    return [Cell(r=r, alpha=alpha(r), best=best(r), **rest) for r in ranks]


def still(r: int) -> float:
    return 0.2


def falls(r: int) -> float:
    return 0.2 - 0.5 * math.log2(r / 8)


def falls_half(r: int) -> float:
    return 0.2 - 0.25 * math.log2(r / 8)


def one(r: int) -> float:
    return 32.0


def twice(r: int) -> float:
    return 2.0 * r


def pair(times: float, **rest: Any) -> list[Cell]:
    """Two ranks and full fine-tuning, whose best rate is so many times smaller."""
    return [*ladder(still, (8, 32), one, **rest), replace(FULL, best=0.2 - math.log2(times))]


def batches(small: tuple[float, float], large: tuple[float, float], **rest: Any) -> list[Cell]:
    """Qualities of LoRA and full at batch 16 and 128."""
    return [
        Cell(batch=16, quality=small[0]), replace(FULL, batch=16, quality=small[1]),
        Cell(batch=128, quality=large[0], **rest), replace(FULL, batch=128, quality=large[1], **rest),
    ]  # fmt: skip


def targets(attention: float, mlp: float, **rest: Any) -> list[Cell]:
    return [Cell(r=45, targets="attention", quality=attention), Cell(r=36, targets="mlp", quality=mlp, **rest)]


RANKS = (4, 8, 16, 32)
ORTHOGONAL = {"method": {"init": "orthogonal"}}
long, short = claims_rates.ratio_in_long_runs, claims_rates.ratio_in_short_runs
little, fixed = claims_rates.rate_moves_little, claims_rates.slope_with_alpha_fixed
constant, root = claims_rates.slope_with_scale_fixed, claims_rates.slope_with_rslora
attention, batch = claims_quality.attention_is_worse, claims_quality.gap_grows_with_batch
methods, free, bound = claims_quality.methods_agree, claims_quality.scale_is_free, claims_quality.scale_is_bound

CASES: dict[str, tuple[Callable[[Evidence], Verdict], Plan, str]] = {
    "ratio 10": (long, Plan(pair(10)), HOLDS),
    "ratio 15 is not 10": (long, Plan(pair(15)), NOT),
    "ratio 30": (long, Plan(pair(30)), NOT),
    "ratio in noise": (long, Plan(pair(10), loss=0.03), OPEN),
    "ratio with alpha 16": (long, Plan([replace(c, alpha=16.0) if c.r else c for c in pair(10)]), NA),
    "ratio of short runs is another claim": (long, Plan(pair(10), steps=90), NA),
    "ratio under SGD": (long, Plan([replace(c, config={"optimizer": {"name": "sgd"}}) for c in pair(10)]), NA),
    "ratio without full": (long, Plan(pair(10)[:2]), NA),
    "ratio at the edge of a grid": (long, Plan([*pair(10)[:2], replace(FULL, best=-3.0, shift=3)]), OPEN),
    "short ratio 15": (short, Plan(pair(15), steps=90), HOLDS),
    "short ratio 10": (short, Plan(pair(10), steps=90), NOT),
    "short ratio in noise": (short, Plan(pair(15), steps=90, loss=0.03), OPEN),
    "short ratio of long runs": (short, Plan(pair(15)), NA),
    "still": (little, Plan(ladder(still, (4, 16, 64), one)), HOLDS),
    "moves": (little, Plan(ladder(falls, (4, 16, 64), one)), NOT),
    "moves in noise": (little, Plan(ladder(still, (4, 16, 64), one), loss=0.03, tune=2), OPEN),
    "moves over too few ranks": (little, Plan(ladder(still, (8, 16), one)), OPEN),
    "moves with one rate beyond its grid": (little, Plan([*ladder(still, (4, 16), one), Cell(r=64, best=0, shift=3)]), OPEN),
    "ranks below 4": (little, Plan(ladder(still, (1, 2), one)), NA),
    "slope 0": (fixed, Plan(ladder(still, RANKS, one)), HOLDS),
    "slope 0 fails": (fixed, Plan(ladder(falls, RANKS, one)), NOT),
    "slope 0 in noise": (fixed, Plan(ladder(still, RANKS, one), loss=0.02, tune=2), OPEN),
    "slope 0 with an orthogonal start": (fixed, Plan(ladder(still, RANKS, one, config=ORTHOGONAL)), NA),
    "slope of one rank": (fixed, Plan(ladder(still, (8,), one)), NA),
    "slope of two ranks": (fixed, Plan(ladder(still, (4, 32), one)), OPEN),
    "slope -1/2": (constant, Plan(ladder(falls, RANKS, twice)), HOLDS),
    "slope -1/2 fails": (constant, Plan(ladder(still, RANKS, twice)), NOT),
    "slope -1/2 in noise": (constant, Plan(ladder(falls, RANKS, twice), loss=0.04, tune=2), OPEN),
    "slope -1/2 with one alpha": (constant, Plan(ladder(falls, RANKS, one)), NA),
    "slope -1/4": (root, Plan(ladder(falls_half, RANKS, one, method="rsLoRA")), HOLDS),
    "slope -1/4 fails": (root, Plan(ladder(still, RANKS, one, method="rsLoRA")), NOT),
    "slope -1/4 in noise": (root, Plan(ladder(falls_half, RANKS, one, method="rsLoRA"), loss=0.03), OPEN),
    "slope -1/4 with alpha / r": (root, Plan(ladder(falls_half, RANKS, one)), NA),
    "attention worse": (attention, Plan(targets(0.70, 0.76)), HOLDS),
    "attention better": (attention, Plan(targets(0.76, 0.70)), NOT),
    "attention within the margin": (attention, Plan(targets(0.75, 0.75)), NOT),
    "attention in noise": (attention, Plan(targets(0.74, 0.75), score=0.05), OPEN),
    "attention of other size": (attention, Plan(targets(0.70, 0.76, trainable=80_000)), OPEN),
    "attention untuned": (attention, Plan(targets(0.70, 0.76, points=1)), OPEN),
    "attention alone": (attention, Plan(targets(0.70, 0.76)[:1]), NA),
    "gap grows": (batch, Plan(batches((0.75, 0.75), (0.70, 0.75))), HOLDS),
    "gap shrinks": (batch, Plan(batches((0.70, 0.75), (0.75, 0.75))), NOT),
    "gap stays": (batch, Plan(batches((0.72, 0.75), (0.72, 0.75))), NOT),
    "gap in noise": (batch, Plan(batches((0.75, 0.75), (0.73, 0.75)), score=0.05), OPEN),
    "gap with two seeds": (batch, Plan(batches((0.75, 0.75), (0.70, 0.75)), confirm=2), OPEN),
    "gap at other examples": (batch, Plan(batches((0.75, 0.75), (0.70, 0.75), examples=9600)), NA),
    "one batch": (batch, Plan(pair(10)), NA),
    "methods agree": (methods, Plan([Cell(), Cell("DoRA"), Cell("PiSSA", quality=0.755)]), HOLDS),
    "methods differ": (methods, Plan([Cell(), Cell("DoRA", quality=0.65)]), NOT),
    "methods in noise": (methods, Plan([Cell(), Cell("DoRA")], score=0.05), OPEN),
    "methods at the edge of a grid": (methods, Plan([Cell(), Cell("DoRA", shift=4)]), OPEN),
    "one method": (methods, Plan([Cell()]), NA),
    "scale is free": (free, Plan([Cell(alpha=8.0), Cell(alpha=32.0)]), HOLDS),
    "scale matters": (free, Plan([Cell(alpha=8.0, quality=0.6), Cell(alpha=32.0)]), NOT),
    "scale in noise": (free, Plan([Cell(alpha=8.0), Cell(alpha=32.0)], score=0.05), OPEN),
    "scales too close": (free, Plan([Cell(alpha=30.0), Cell(alpha=32.0)]), OPEN),
    "one scale": (free, Plan([Cell()]), NA),
    "scale is bound": (bound, Plan([Cell(alpha=8.0, quality=0.6), Cell(alpha=32.0)]), HOLDS),
    "scale is not bound": (bound, Plan([Cell(alpha=8.0), Cell(alpha=32.0)]), NOT),
    "bound in noise": (bound, Plan([Cell(alpha=8.0), Cell(alpha=32.0)], score=0.05), OPEN),
    "one scale is not bound": (bound, Plan([Cell()]), NA),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_claim_on_a_planted_sweep(name: str, tmp_path: Path) -> None:
    claim, plan, expected = CASES[name]
    v = judged(claim, build(tmp_path, plan))
    assert v.status == expected, v
    if name.endswith("in noise"):
        assert v.interval is not None  # open for its width, not for want of a number


@pytest.mark.parametrize(
    ("claim", "plan", "number", "truth"),
    [
        (long, Plan(pair(10)), "10.0 times", 10.0),
        (fixed, Plan(ladder(falls, RANKS, one)), "slope −0.50", -0.5),
        (little, Plan(ladder(falls, (4, 16, 64), one)), "2.00 octaves at most", 2.0),
        (attention, Plan(targets(0.70, 0.76)), "−6.0 points", -6.0),
        (batch, Plan(batches((0.75, 0.76), (0.70, 0.75))), "−4.0 points", -4.0),
    ],
)
def test_the_number_and_its_interval(
    claim: Callable[[Evidence], Verdict], plan: Plan, number: str, truth: float, tmp_path: Path
) -> None:
    v = judged(claim, build(tmp_path, plan.noisy(loss=0.0001, score=0.0002)))
    assert v.number == number
    assert v.interval is not None
    assert v.interval[0] < truth < v.interval[1]


def test_what_would_settle_an_open_claim_is_named(tmp_path: Path) -> None:
    edge = judged(long, build(tmp_path / "edge", CASES["ratio at the edge of a grid"][1]))
    assert "full fine-tuning: rates below" in edge.settle
    size = judged(attention, build(tmp_path / "size", CASES["attention of other size"][1]))
    assert "r about 45" in size.settle  # 100,000 of 80,000 / 36 parameters a rank
    noise = judged(long, build(tmp_path / "noise", CASES["ratio in noise"][1]))
    assert "tuning seed" in noise.settle
    one_seed = judged(little, build(tmp_path / "one", Plan(ladder(still, (4, 64), one, points=3), tune=1)))
    assert one_seed.status == OPEN
    assert "two or more tuning seeds" in one_seed.settle


def test_a_condition_that_is_not_met_is_named(tmp_path: Path) -> None:
    v = judged(long, build(tmp_path, CASES["ratio with alpha 16"][1]))
    assert "s = 32 / r; here s = 16 / r" in v.reason
    assert v.number == "10.0 times"  # what it would be is no secret


def test_rules_meet_at_their_anchor(tmp_path: Path) -> None:
    """rsLoRA at r = 2, 32 and 128 with s = 2 at r = 8: LoRA's cell there is a point of both lines."""
    rs = [Cell("rsLoRA", r, 2 * math.sqrt(8), best=falls_half(r)) for r in (2, 32, 128)]
    e = build(tmp_path, Plan([*rs, Cell(r=8, alpha=16.0, best=0.2), Cell(r=32, alpha=16.0, best=0.2)]))
    assert e.lines(0.5)[0].ranks == [2, 8, 32, 128]
    assert e.lines(1.0)[0].ranks == [8, 32]


def test_ranks_near_the_width_are_left_out(tmp_path: Path) -> None:
    """The width is read from a saved adapter's header: here 64, so r = 8 is the largest that is far below it."""
    plan = Plan(ladder(falls, RANKS, twice))
    e = build(tmp_path, plan)
    header = {"x.lora_A.weight": {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]},
              "x.lora_B.weight": {"dtype": "F32", "shape": [256, 4], "data_offsets": [1024, 5120]}}  # fmt: skip
    raw = json.dumps(header).encode()
    folder = e.sweep.store.run_dir(e.sweep.planned[0]) / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(5120))
    v = judged(constant, e)
    assert v.status == OPEN
    assert "three ranks" in v.reason


def test_lost_confirmation_runs_give_no_verdict(tmp_path: Path) -> None:
    e = build(tmp_path, Plan(targets(0.70, 0.76)))
    run_id = e.cells[0].runs[0].run_id
    record = e.sweep.store.read(run_id)
    assert record is not None
    e.sweep.store.write(replace(record, status="diverged", metrics={}))
    v = judged(attention, gather(load(tmp_path)))
    assert v.status == OPEN
    assert "did not survive" in v.reason


# -- weights and forgetting ------------------------------------------------------------------------------------------


def analyse(e: Evidence, layers: Callable[[int, Record], dict[str, Any]]) -> Evidence:
    """Write analysis/weights.json: two matrices a run, both as `layers(position of the cell, record)` says."""
    runs = {
        x.run_id: {"layers": dict.fromkeys(("a", "b"), layers(n, x))} for n, r in enumerate(e.cells) for x in r.runs
    }
    path = e.sweep.store.root / "analysis" / "weights.json"
    path.parent.mkdir()
    doc = {"schema": 1, "cells": {}, "runs": runs, "similarity": [], "left_out": {}, "notes": []}
    path.write_text(json.dumps(doc))
    return gather(load(e.sweep.store.root))


@pytest.mark.parametrize(
    ("ranks", "side", "expected"),
    [((190, 200, 210, 205), 4096, HOLDS), ((16, 17, 15, 16), 4096, NOT), ((30, 400, 90, 200), 4096, OPEN), ((60,) * 4, 64, NA)],
)  # fmt: skip
def test_the_rank_of_full_fine_tuning(ranks: Sequence[int], side: int, expected: str, tmp_path: Path) -> None:
    e = build(tmp_path, Plan([Cell(r=8), FULL]))
    e = analyse(e, lambda n, x: {"variance_rank": ranks[x.config["seed"] - 100] if n else 8, "shape": [side, side]})
    v = judged(claims_weights.full_needs_more_rank, e)
    assert v.status == expected, v
    if expected == HOLDS:
        assert v.number == "25.1 times r = 8"


def test_weights_that_are_not_analysed_are_asked_for(tmp_path: Path) -> None:
    e = build(tmp_path, Plan([Cell(r=8, probe=3.0), replace(FULL, probe=3.1)]))
    for claim in (
        claims_weights.full_needs_more_rank,
        claims_weights.intruders_come_with_lora,
        claims_weights.intruders_go_with_forgetting,
    ):
        v = judged(claim, e)
        assert v.status == OPEN
        assert "python -m lorabench.analyze" in v.settle


@pytest.mark.parametrize(
    ("lora", "full", "score", "expected"),
    [
        ((0.75, 3.0), (0.75, 3.4), 0.001, HOLDS),
        ((0.75, 3.4), (0.75, 3.0), 0.001, NOT),
        ((0.75, 3.0), (0.75, 3.001), 0.003, OPEN),
        ((0.60, 3.0), (0.75, 3.4), 0.001, OPEN),
        ((0.75, None), (0.75, None), 0.001, NA),
    ],
    ids=["less", "more", "noise", "not matched", "not measured"],
)
def test_forgetting(lora: Any, full: Any, score: float, expected: str, tmp_path: Path) -> None:
    cells = [Cell(quality=lora[0], probe=lora[1]), replace(FULL, quality=full[0], probe=full[1])]
    v = judged(claims_weights.forgets_less, build(tmp_path, Plan(cells, score=score)))
    assert v.status == expected, v


@pytest.mark.parametrize("name", ["gap stays", "gap grows"])
def test_a_contradiction_by_the_margin_alone_says_so(name: str, tmp_path: Path) -> None:
    claim, plan, _ = CASES[name]
    told = "; whichever its sign, shown to lie within the margin of 2.0 points"
    assert judged(claim, build(tmp_path, plan)).reason.endswith(told) == (name == "gap stays")


def test_forgetting_is_a_change_from_each_runs_own_base(tmp_path: Path) -> None:
    """Full fine-tuning computes on float32 weights: its base knows more before it trains, and it forgets more than LoRA."""
    e = build(tmp_path, Plan([Cell(probe=3.30), replace(FULL, probe=3.29)], score=0.0001))
    for r in e.cells:
        for x in r.runs:
            own = {"probe/wiki/before": 3.2 if r.cell.method == "full" else 3.25}
            task = {"name": "chat", "probe": {"kind": "causal_lm", "name": "wiki"}}
            e.sweep.store.write(replace(x, metrics={**x.metrics, **own}, config={**x.config, "task": task}))
    v = judged(claims_weights.forgets_less, gather(load(tmp_path)))
    assert v.status == HOLDS and v.number == "−0.040 nats a token"
    assert v.reason.startswith("probe/wiki/loss, after minus before: ")


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_probe_is_its_number_after_training(metric: str, tmp_path: Path) -> None:
    """Beside it stand what the base knew and how many examples there were."""
    e = build(tmp_path, Plan([Cell(probe=3.0), replace(FULL, probe=3.4)], score=0.001))
    for x in {x.run_id: x for r in e.cells for x in r.runs}.values():
        probe = {
            f"probe/food/{metric}": x.metrics.pop("probe/wiki/loss"),
            "probe/food/before": 9.0,
            "probe/food/examples": 5,
        }
        e.sweep.store.write(replace(x, metrics={**x.metrics, **probe}))
    v = judged(claims_weights.forgets_less, gather(load(tmp_path)))
    assert v.status == (HOLDS if metric == "loss" else NOT)
    assert v.reason.startswith(f"probe/food/{metric}")


@pytest.mark.parametrize(
    ("r", "counts", "expected"),
    [
        (8, ((4, 5, 4, 5), (0, 0, 1, 0)), HOLDS),
        (8, ((0, 0, 1, 0), (4, 5, 4, 5)), NOT),
        (8, ((0, 0, 0, 0), (0, 0, 0, 0)), NOT),
        (8, ((0, 9, 1, 6), (1, 2, 1, 3)), OPEN),
        (64, ((4, 5, 4, 5), (0, 0, 1, 0)), NA),
    ],
    ids=["with lora", "with full", "none at all", "noise", "high rank"],
)
def test_intruders(r: int, counts: Any, expected: str, tmp_path: Path) -> None:
    e = build(tmp_path, Plan([Cell(r=r), FULL]))
    e = analyse(e, lambda n, x: {"intruders": {"0.3": 0, "0.5": counts[n][x.config["seed"] - 100]}})
    v = judged(claims_weights.intruders_come_with_lora, e)
    assert v.status == expected, v


@pytest.mark.parametrize(("sign", "expected"), [(1, HOLDS), (-1, NOT), (0, OPEN), (None, NA)])
def test_intruders_and_forgetting(sign: int | None, expected: str, tmp_path: Path) -> None:
    """Both rise with the norm; beside it they go together, against each other, or as chance has it."""
    rng = np.random.default_rng(4)
    e = build(tmp_path, Plan([Cell(r=n, probe=None if sign is None else 3.0) for n in (4, 8, 16)]))
    found: dict[str, dict[str, float]] = {}
    for r in e.cells:
        for x in r.runs:
            norm, own = rng.normal(), rng.normal()
            found[x.run_id] = {"norm": 2.0**norm, "count": 10 + norm + own}
            if sign is not None:
                value = 3 + norm + sign * own + rng.normal(0, 0.2 if sign else 0.8)
                e.sweep.store.write(replace(x, metrics={**x.metrics, "probe/wiki/loss": value}))
    e = analyse(
        gather(load(tmp_path)),
        lambda n, x: {"intruders": {"0.5": found[x.run_id]["count"]}, "relative_norm": found[x.run_id]["norm"]},
    )
    v = judged(claims_weights.intruders_go_with_forgetting, e)
    assert v.status == expected, v


def test_few_runs_do_not_correlate(tmp_path: Path) -> None:
    e = build(tmp_path, Plan([Cell(probe=3.0)]))
    e = analyse(e, lambda n, x: {"intruders": {"0.5": x.config["seed"]}, "relative_norm": 0.1})
    v = judged(claims_weights.intruders_go_with_forgetting, e)
    assert v.status == OPEN
    assert "4 runs" in v.reason


def test_partial_correlation_is_that_of_the_inverse_covariance() -> None:
    rng = np.random.default_rng(9)
    held = rng.normal(size=40)
    x, y = held + rng.normal(size=40), 0.5 * held + rng.normal(size=40)
    y = y + 0.4 * x
    P = np.linalg.inv(np.cov([x, y, held]))
    assert claims_weights.partial_correlation(x, y, held) == pytest.approx(-P[0, 1] / math.sqrt(P[0, 0] * P[1, 1]))
    assert claims_weights.partial_correlation(2 * held + 1, y, held) is None


def test_fishers_interval() -> None:
    rng = np.random.default_rng(10)
    x = rng.normal(size=20)
    y = x + rng.normal(size=20)
    test = stats.pearsonr(x, y)
    found = claims_weights.fisher_interval(test.statistic, 20, held=0)
    assert found == pytest.approx(tuple(test.confidence_interval()))
    assert claims_weights.fisher_interval(test.statistic, 21, held=1) == pytest.approx(found)


def test_a_foreign_analysis_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, Plan([Cell(), FULL]))
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "weights.json").write_text('{"runs": {"x": 3}}')
    assert face.main([str(tmp_path)]) == 2
    assert "analysis/weights.json" in capsys.readouterr().err


# -- how verdicts are reached ----------------------------------------------------------------------------------------


def test_holds_takes_90_and_contradicts_95_percent() -> None:
    """An interval at either bound: what a one-sided test at 5 % and a two-sided one at 5 % would say."""
    e = mean_over_seeds([0.9, 1.0, 1.1])
    near, wide = e.interval(0.90), e.interval(0.95)
    assert judge_range(e, near[0] - 1e-9, near[1] + 1e-9) == HOLDS
    assert judge_range(e, near[0] + 1e-9, 9) == OPEN
    assert judge_range(e, wide[1] + 1e-9, 9) == NOT
    assert judge_range(e, wide[1] - 1e-9, 9) == OPEN
    assert [negate(x) for x in (HOLDS, NOT, OPEN, NA)] == [NOT, HOLDS, OPEN, NA]  # type: ignore[arg-type]


def test_the_seeds_asked_for_have_the_power_that_is_said() -> None:
    """Of very many repetitions with that many seeds of this mean and spread, four of five or more hold."""
    e, low, high = mean_over_seeds([0.9, 1.0, 1.1]), 0.88, 1.12
    said = seeds_to_settle(e, low, high, "tuning")
    wanted = int(said.split()[0])
    assert said == f"{wanted} tuning seeds: 80 % power, were this the true number"
    drawn = np.random.default_rng(1).normal(1.0, 0.1, (4000, wanted))
    half = stats.t.ppf(0.95, wanted - 1) * drawn.std(1, ddof=1) / math.sqrt(wanted)
    held = ((drawn.mean(1) - half > low) & (drawn.mean(1) + half < high)).mean()
    assert 0.78 <= held <= 0.92
    assert (
        seeds_to_settle(mean_over_seeds([1.0, 1.0, 1.0]), low, high, "tuning")
        == "more tuning seeds than 3, at least three"
    )


# -- the face --------------------------------------------------------------------------------------------------------


def test_the_reference_sweep_is_judged(repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "claims.json"
    assert face.main([str(repo / "sweeps/ref_rank_sweep"), "--json", str(out)]) == 0
    said = json.loads(out.read_text())
    assert said["sweep"] == "rank_sweep"
    assert len(said["claims"]) == len(claims.CLAIMS)
    assert {x["status"] for x in said["claims"]} <= {HOLDS, NOT, OPEN, NA}
    text = capsys.readouterr().out
    assert (
        "Claims of the literature on rank_sweep" in text and "LoRA Without" in text
    )  # the rest of a name may be wrapped
    assert NA in " ".join(text.split())


def test_no_claim_fails_on_a_sweep_that_only_tuned(tmp_path: Path) -> None:
    build(tmp_path, Plan([*pair(10), *targets(0.7, 0.8), Cell("DoRA"), Cell(alpha=8.0)], confirm=0, tune=1))
    found = claims.judge(load(tmp_path))
    assert len({(v.claim, v.source) for v in found}) == len(claims.CLAIMS)
    assert not [v for v in found if v.status in (HOLDS, NOT) and "points" in v.number]


@pytest.mark.parametrize("case", ["missing", "empty", "json is a folder"])
def test_bad_input_exits_2_and_writes_nothing(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, out = tmp_path / "sweep", tmp_path / "out.json"
    if case != "missing":
        sweep.mkdir()
    if case == "json is a folder":
        build(sweep, Plan([Cell()], confirm=0, tune=1))
        out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert face.main([str(sweep), "--json", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
