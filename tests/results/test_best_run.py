"""Which run of a whole sweep `export` and `predict` take, and what they say of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.sweeps import RANK_SWEEP, build
from lorabench.config.errors import ConfigError
from lorabench.results.best_run import best_run
from lorabench.results.findings import find
from lorabench.results.sweep import load
from lorabench.store.records import Store


@pytest.fixture
def sweep(tmp_path: Path) -> Store:
    """A finished rank sweep, each of whose runs has a folder of weights."""
    store = build(tmp_path / "ranks", RANK_SWEEP)
    for record in store.records():
        (store.run_dir(record.run_id) / "adapter").mkdir()
    return store


def confirmed(store: Store, cell: str) -> list[tuple[float, str]]:
    """(validation loss, run_id) of a cell's confirmation runs, the best first."""
    result = find(load(store.root)).results[cell]
    assert result.role == "confirm"
    return sorted((r.metrics["val/loss"], r.run_id) for r in result.runs)


class TestBestRun:
    def test_the_recommended_cell_by_validation(self, sweep: Store) -> None:
        recommended = find(load(sweep.root)).recommendation
        assert recommended and recommended.cell
        (loss, run_id), *others = confirmed(sweep, recommended.cell)
        worst = sweep.read(others[-1][1])
        assert worst  # a test result, however good, chooses nothing
        sweep.write(replace(worst, metrics=worst.metrics | {"test/loss": 0.0}))
        found = best_run(sweep.root)
        assert found.path == sweep.run_dir(run_id)
        assert found.why and "the recommended cell" in found.why and run_id in found.why
        assert f"of 3 confirmation runs the best by validation loss ({loss:.4g})" in found.why

    def test_another_cell_by_id_or_by_name(self, sweep: Store) -> None:
        found = find(load(sweep.root))
        full = next(r for r in found.results.values() if r.cell.method == "full")
        for name in (full.id, full.name):
            assert best_run(sweep.root, name).path == sweep.run_dir(confirmed(sweep, full.id)[0][1])
        with pytest.raises(ConfigError, match=r"--cell=r8: a cell of this sweep: .*" + full.id):
            best_run(sweep.root, "r8")

    def test_a_single_run_is_itself(self, sweep: Store) -> None:
        run = sweep.run_dir(sweep.records()[0].run_id)
        assert (best_run(run).path, best_run(run).why) == (run, None)
        with pytest.raises(ConfigError, match="--cell=x: with a sweep's directory"):
            best_run(run, "x")

    def test_a_run_without_weights_is_passed_over_and_a_cell_without_any_is_said(self, sweep: Store) -> None:
        cell = find(load(sweep.root)).recommendation.cell  # type: ignore[union-attr]
        order = confirmed(sweep, str(cell))
        shutil.rmtree(sweep.run_dir(order[0][1]) / "adapter")
        assert best_run(sweep.root).path == sweep.run_dir(order[1][1])
        for _, run_id in order[1:]:
            shutil.rmtree(sweep.run_dir(run_id) / "adapter")
        with pytest.raises(ConfigError, match=f"{cell} has none: trainer.save_weights was false.*--cell takes another"):
            best_run(sweep.root)

    def test_tuning_alone_is_said(self, tmp_path: Path) -> None:
        store = build(tmp_path / "tuned", RANK_SWEEP[1:3], confirm=())
        for record in store.records():
            (store.run_dir(record.run_id) / "adapter").mkdir()
        found = best_run(store.root)
        assert found.why and "nothing is recommended; the best adapter of the tuning runs" in found.why
        assert "no confirmation run has ended" in found.why
