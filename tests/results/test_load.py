"""`lorabench.load` on the reference sweep: frames, figures, the answer; and that importing lorabench costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import lorabench
from lorabench.config.errors import ConfigError
from lorabench.report.answer import answer
from lorabench.report.notebook import Study
from lorabench.results.findings import find
from lorabench.results.sweep import load as read


@pytest.fixture(scope="module")
def root() -> Path:
    return Path(__file__).resolve().parent.parent.parent / "sweeps/ref_rank_sweep"


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    return lorabench.load(root)


def test_runs_are_the_records(study: Study, root: Path) -> None:
    runs = study.runs
    stored = {p.parent.name: json.loads(p.read_text()) for p in (root / "runs").glob("*/run.json")}
    assert set(runs.run_id) == set(stored)
    assert runs.columns.is_unique
    for row in runs.itertuples():
        record = stored[str(row.run_id)]
        assert row.lr == record["config"]["optimizer"]["lr"]
        assert (row.seed, row.role, row.status) == (record["config"]["seed"], record["role"], record["status"])
    named = runs.set_index("run_id")
    for run_id, record in stored.items():
        assert named.loc[run_id, "val/accuracy"] == record["metrics"]["val/accuracy"]
        assert named.loc[run_id, "config.trainer.batch_size"] == record["config"]["trainer"]["batch_size"]
    assert runs.loc[runs.role == "tune", "test/accuracy"].isna().all()


def test_history_is_long_and_whole(study: Study, root: Path) -> None:
    history = study.history
    assert history.columns.is_unique
    run_id = sorted(history.run_id)[0]
    rows = [json.loads(x) for x in (root / "runs" / run_id / "history.jsonl").read_text().splitlines()]
    logged = [(r["step"], k, v) for r in rows for k, v in r.items() if k != "step"]
    mine = history[history.run_id == run_id]
    assert list(zip(mine.step, mine.metric, mine.value, strict=True)) == logged
    wide = mine.pivot(index="step", columns="metric", values="value")
    assert wide["train/loss"].notna().sum() == 100


def test_examples_are_those_behind_test(study: Study, root: Path) -> None:
    examples, runs = study.examples, study.runs.set_index("run_id")
    assert examples.columns.is_unique
    confirmed = runs[(runs.role == "confirm") & runs.chosen]
    assert set(examples.run_id) == set(confirmed.index)
    means = examples.groupby("run_id").correct.mean()
    assert np.allclose(means, confirmed.loc[means.index, "test/accuracy"])
    assert (examples.groupby("run_id").example.apply(frozenset).nunique()) == 1


def test_record_is_the_file(study: Study, root: Path) -> None:
    run_id = study.runs.run_id.iloc[0]
    assert study.record(run_id).metrics == json.loads((root / "runs" / run_id / "run.json").read_text())["metrics"]
    with pytest.raises(ConfigError, match="run_id=nothing: one of the 40 runs"):
        study.record("nothing")


def test_cells_are_the_reports(study: Study, root: Path) -> None:
    cells, f = study.cells.set_index("cell"), find(read(root))
    assert list(cells.index) == list(f.results)
    for i, r in f.results.items():
        assert r.test is not None
        assert cells.loc[i, "test"] == r.test.mean
        assert (cells.loc[i, "low"], cells.loc[i, "high"]) == r.test.interval()
        assert cells.loc[i, "lr"] == r.lr
        assert cells.loc[i, "seconds"] == r.seconds
    runs = study.runs
    means = runs[(runs.role == "confirm") & runs.chosen].groupby("cell")["test/accuracy"].mean()
    assert np.allclose(means.loc[cells.index], cells.test, rtol=0, atol=1e-4)
    assert cells.recommended.sum() <= 1
    assert cells.reference.sum() == 1


def test_comparisons_are_the_reports(study: Study, root: Path) -> None:
    found, f = study.comparisons, find(read(root))
    assert set(found.family) == {"reference", "control"}
    family = found[found.family == "reference"].set_index("cell")
    assert set(family.index) == set(f.versus)
    for i, made in f.versus.items():
        assert family.loc[i, "difference"] == made.estimate.mean
        assert (family.loc[i, "low"], family.loc[i, "high"]) == made.interval
        assert (family.loc[i, "direction"], family.loc[i, "size"]) == (made.direction, made.size)
    assert (found.margin == 0.02).all()


def test_frames_are_the_callers_to_change(study: Study) -> None:
    mine = study.cells
    mine["test"] = 0.0
    assert (study.cells.test > 0).all()
    assert isinstance(study.runs, pd.DataFrame)


def test_claims_are_a_frame(study: Study) -> None:
    claims = study.claims
    assert {"claim", "status", "reason", "settle"} <= set(claims.columns)
    assert (claims.reason != "").all()


def test_figures_are_matplotlibs(study: Study, tmp_path: Path) -> None:
    assert study.figures == [
        "metric_by_rank",
        "learning_rates",
        "training",
        "best_rates",
        "pareto",
        "subspaces",
        "spectra",
    ]
    figure = study.figure("metric_by_rank")
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_xlabel() == "rank r (log scale)"
    figure.savefig(tmp_path / "own.png", dpi=50)
    assert (tmp_path / "own.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match=r"figure=nothing: allowed here: metric_by_rank, learning_rates, training"):
        study.figure("nothing")


def test_the_answer_is_the_reports(study: Study, root: Path) -> None:
    said = answer(find(read(root)))
    assert study.answer.startswith(said.lead)
    assert all(text in study.answer for _, text in said.points)
    assert repr(study) == "<Study rank_sweep: 6 cells, 40 runs>"


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sweep dir"):
        lorabench.load(tmp_path / "nothing")
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        lorabench.unload


def test_import_lorabench_imports_nothing_heavy(root: Path) -> None:
    heavy = {"torch", "pytorch_lightning", "transformers", "pandas", "numpy", "matplotlib", "scipy", "hydra", "rich"}
    code = f"""
import sys, lorabench
print(*sorted(set(sys.modules) & {heavy!r}), "|")
study = lorabench.load({str(root)!r})
study.runs, study.cells, study.comparisons, study.claims, study.answer
print(*sorted(set(sys.modules) & {{"torch", "pytorch_lightning", "transformers", "hydra"}}), "|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["|", "|"]
