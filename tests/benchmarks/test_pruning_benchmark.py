"""benchmarks/pruning.py: the replay on hand-made histories, agreement, regret and its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fixtures.jobs import cell
from lorabench.config.runs import RunConfig
from lorabench.store.records import Record, Store

STEPS = (25, 50, 75, 100)
Histories = Mapping[float, Sequence[float]]  # rate -> validation loss at each of STEPS


@pytest.fixture
def pruning(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    import pruning

    return pruning


def write(store: Store, runs: Mapping[int, Histories], **changes: Any) -> None:
    """A finished sweep of one cell, by seed. A history that stops short, or at NaN, is that of a run that diverged."""
    entries: dict[str, Any] = {"id": "c", "label": {"method": "LoRA"}, "runs": {"tune": [], "confirm": []}}
    for seed, histories in runs.items():
        for run in cell(list(histories), seeds=(seed,), **{"trainer.max_steps": 100, **changes}):
            losses = histories[run.optimizer.lr]
            whole = len(losses) == len(STEPS) and math.isfinite(losses[-1])
            add(store, run, losses, "completed" if whole else "diverged")
            entries["runs"]["tune"].append(run.run_id)
    store.write_manifest({"schema": 1, "name": "hand-made", "cells": [entries], "runs": {}, "packs": []})


def add(store: Store, run: RunConfig, losses: Sequence[float], status: str) -> None:
    store.append_history(run.run_id, [{"step": s, "train/loss": 1.0, "val/loss": x} for s, x in zip(STEPS, losses)])
    loss = losses[-1] if run.trainer.keep == "last" else min(losses, default=None)
    metrics = {"val/loss": loss} if status == "completed" else {}
    store.write(Record(run.run_id, "tune", status, run.to_dict(), metrics, {"steps": STEPS[len(losses) - 1]}))


AGREES = {1e-3: (1, 0.9, 0.8, 0.7), 2e-3: (1, 0.8, 0.6, 0.5), 4e-3: (1, 0.9, 0.7, 0.6), 8e-3: (1, 1.0, 0.9, 0.8),
          1.6e-2: (1, 1.2, 1.1, 1.0), 3.2e-2: (1, 2.0, 2.0, 2.0)}  # fmt: skip
# the rate that ends best is the worst at half, far from the leader of that time
LATE = AGREES | {3.2e-2: (1, 2.0, 1.0, 0.4)}


def test_a_cell_on_which_they_agree(pruning: Any, sweep_dir: Path) -> None:
    write(Store(sweep_dir), {0: AGREES})
    (t,) = pruning.trials([sweep_dir], by="cell")
    # best at half is 2e-3; the better half is 1, 2 and 4e-3; at 75 nothing more can go
    assert t.pruned_at == {"0.008": 50, "0.016": 50, "0.032": 50}
    assert (t.exhaustive, t.chosen, t.regret, t.agrees, t.uncovered) == (2e-3, 2e-3, 0.0, True, False)
    assert (t.steps, t.spared) == (600, 150)


def test_a_late_winner_is_lost_and_the_regret_is_its_lead(pruning: Any, sweep_dir: Path) -> None:
    write(Store(sweep_dir), {0: LATE})
    (t,) = pruning.trials([sweep_dir], by="cell")
    assert (t.exhaustive, t.chosen, t.agrees) == (3.2e-2, 2e-3, False)
    assert t.regret == pytest.approx(0.1)


def test_one_trial_a_cell_or_one_a_seed(pruning: Any, sweep_dir: Path) -> None:
    write(Store(sweep_dir), {0: AGREES, 1: LATE})
    (both,) = pruning.trials([sweep_dir], by="cell")
    assert both.seeds == (0, 1) and both.agrees and both.steps == 1200
    assert [(t.seeds, t.agrees) for t in pruning.trials([sweep_dir], by="seed")] == [((0,), True), ((1,), False)]


def test_a_run_that_diverged_is_out_from_then_on(pruning: Any, sweep_dir: Path) -> None:
    """Before half, at an evaluation, and after it was pruned in the replay: its later steps are spared."""
    histories = AGREES | {8e-3: (1,), 1.6e-2: (1, math.nan), 3.2e-2: (1, 2.0, math.nan)}
    write(Store(sweep_dir), {0: histories})
    (t,) = pruning.trials([sweep_dir], by="cell")
    assert t.pruned_at == {"0.032": 50}
    assert (t.steps, t.spared) == (300 + 25 + 50 + 75, 25)
    assert t.agrees


def test_what_is_ranked_is_what_the_record_keeps(pruning: Any, sweep_dir: Path, tmp_path: Path) -> None:
    dips = AGREES | {3.2e-2: (0.1, 2.0, 2.0, 2.0)}
    write(Store(sweep_dir), {0: dips})
    (best,) = pruning.trials([sweep_dir], by="cell")
    assert best.exhaustive == best.chosen == 3.2e-2
    write(Store(tmp_path / "last"), {0: dips}, **{"trainer.keep": "last"})
    (last,) = pruning.trials([tmp_path / "last"], by="cell")
    assert last.exhaustive == last.chosen == 2e-3


def test_a_cell_that_is_never_pruned_is_no_trial(pruning: Any, sweep_dir: Path, tmp_path: Path) -> None:
    write(Store(sweep_dir), {0: {lr: AGREES[lr] for lr in (1e-3, 2e-3, 4e-3)}})
    write(Store(tmp_path / "full"), {0: AGREES}, **{"method.name": "full"})
    assert pruning.trials([sweep_dir, tmp_path / "full"], by="cell") == []
    with pytest.raises(SystemExit) as e:
        pruning.main([str(sweep_dir)])
    assert e.value.code == 2


def test_a_sweep_that_was_pruned_cannot_be_replayed(pruning: Any, sweep_dir: Path, capsys: Any) -> None:
    store = Store(sweep_dir)
    write(store, {0: AGREES})
    record = store.records()[0]
    record.status = "pruned"
    store.write(record)
    with pytest.raises(SystemExit):
        pruning.main([str(sweep_dir)])
    assert "exhaustive sweep is needed" in capsys.readouterr().err


def test_a_history_that_contradicts_its_record_is_refused(pruning: Any, sweep_dir: Path, capsys: Any) -> None:
    store = Store(sweep_dir)
    write(store, {0: AGREES})
    record = store.records()[0]
    record.metrics["val/loss"] += 0.01
    store.write(record)
    with pytest.raises(SystemExit):
        pruning.main([str(sweep_dir)])
    assert "does not lead to its recorded" in capsys.readouterr().err


def wilson(k: int, n: int) -> tuple[float, float]:
    """The closed form: E. B. Wilson (1927), Brown, Cai & DasGupta (2001), section 3.1.1."""
    z, p = 1.959963984540054, k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


@pytest.mark.parametrize(("agree", "n"), [(0, 4), (4, 4), (11, 12), (20, 24), (1, 1)])
def test_the_interval_is_wilsons(pruning: Any, agree: int, n: int) -> None:
    same = pruning.Trial("s", "c", (0,), 4, 1e-3, 1e-3, 0.0, False, 100, 10, {})
    other = pruning.Trial("s", "c", (0,), 4, 1e-3, 2e-3, 0.5, False, 100, 10, {})
    found = pruning.summary([same] * agree + [other] * (n - agree))
    assert found["wilson_95"] == pytest.approx(wilson(agree, n), abs=1e-9)
    assert found["agreement"] == agree / n
    assert found["spared"] == pytest.approx(0.1)
    assert found["regret_mean"] == (0.5 if agree < n else None)


def test_the_reference_sweep(pruning: Any, repo: Path, tmp_path: Path, capsys: Any) -> None:
    """Four cells of four rates with one rung, at half; the best so far and its neighbours stay, so at most two rates go."""
    pruning.main([str(repo / "sweeps/ref_rank_sweep"), "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert "4 of 4 = 100.0%, Wilson 95 % 51.0% to 100.0%" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"cell", "seed"}
    assert {t["cell"]: t["pruned_at"] for t in found["cell"]["list"] if t["pruned_at"]} == {
        "lora-r1-a16-all-linear": {"0.0005": 50},
        **{f"lora-r{r}-a16-all-linear": {"0.0005": 50, "0.001": 50} for r in (4, 16, 64)},
    }
    assert found["cell"]["spared"] == pytest.approx(7 * 50 / 1600)
    assert str(repo) not in (tmp_path / "out.json").read_text()
