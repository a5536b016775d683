"""The report of a sweep with pruned runs, on synthetic records: listed with their step, never compared, never covering an edge."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fixtures.sweeps import Planted, build
from lorabench.report import curves, render, theme
from lorabench.report.budget import budget
from lorabench.report.cautions import warnings
from lorabench.report.runs_csv import runs_csv
from lorabench.report.tables import lost_runs, rates
from lorabench.results.findings import Findings, find
from lorabench.results.sweep import load
from lorabench.store.records import Store
from lorabench.training.pruning import prune_reason

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
CELLS = (Planted("lora", RATES, 2e-3, 0.75, r=4), Planted("lora", RATES, 4e-3, 0.76, r=16))
FIRST, SECOND = "lora-r4-a16-all-linear", "lora-r16-a16-all-linear"


def drop(store: Store, cell: str, at: Mapping[float, int], *, error: bool = True) -> None:
    """Make the tuning runs of a cell at these rates pruned ones: what they had when they left is better than anything."""
    (entry,) = [c for c in store.manifest()["cells"] if c["id"] == cell]
    for run_id in entry["runs"]["tune"]:
        record = store.read(run_id)
        assert record is not None
        step = at.get(record.config["optimizer"]["lr"])
        if step is not None:
            metrics = record.metrics | {"val/loss": 0.001, "val/accuracy": 0.999, "pruned_step": step}
            found = record.resources | {"steps": step}
            text = prune_reason(step, 100) if error else None
            store.write(dataclasses.replace(record, status="pruned", metrics=metrics, resources=found, error=text))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two cells x six rates x two seeds. In the first one both ends are pruned, in the second all above the best."""
    made = build(tmp_path_factory.mktemp("sweeps") / "s", CELLS, tune=(0, 1))
    drop(made, FIRST, {5e-4: 60, 1.6e-2: 60, 8e-3: 80})
    drop(made, SECOND, {5e-4: 60, 8e-3: 60, 1.6e-2: 60}, error=False)
    return made


@pytest.fixture(scope="module")
def found(store: Store) -> Findings:
    return find(load(store.root))


def test_they_are_not_chosen(found: Findings) -> None:
    assert {i: r.lr for i, r in found.results.items()} == {FIRST: 2e-3, SECOND: 4e-3}
    assert all(x.status == "completed" for r in found.results.values() for x in r.runs)
    assert all(r.val_loss is not None and r.val_loss > 0.1 for r in found.results.values())


def test_a_side_that_was_pruned_is_not_covered(found: Findings) -> None:
    said = warnings(found)
    assert not any(w.startswith("LoRA r = 4: ") for w in said), "both neighbours of its best ended"
    (about,) = [w for w in said if w.startswith("LoRA r = 16: ")]
    assert "every rate above the best one, 4e-3, was pruned (8e-3, 1.6e-2)" in about
    assert "sweep.prune=false" in about
    assert "of its grid" not in about


def test_the_table_of_rates_has_no_loss_for_them(found: Findings) -> None:
    table = rates(found)
    rows = {(row.texts[0], row.texts[1]): row.texts[2:] for row in table.rows}
    assert rows["LoRA r = 4", "8e-3"] == ("–", "0 of 2", "", "pruned at step 80")
    assert rows["LoRA r = 4", "2e-3"][-1] == "chosen"
    assert rows["LoRA r = 16", "4e-3"][-1] == "chosen, at the edge"
    assert any("no loss to compare" in note for note in table.notes)


def test_the_list_of_lost_runs_names_the_step(found: Findings) -> None:
    rows = [
        dict(zip((c.key for c in lost_runs(found).columns), row.texts, strict=True)) for row in lost_runs(found).rows
    ]
    assert len(rows) == 12
    assert all(r["status"] == "pruned" for r in rows)
    assert {r["why"] for r in rows if r["cell"] == "LoRA r = 4"} == {prune_reason(60, 100), prune_reason(80, 100)}
    assert {r["why"] for r in rows if r["cell"] == "LoRA r = 16"} == {"pruned at step 60"}


def test_the_budget_counts_them_and_what_they_spared(found: Findings) -> None:
    facts = dict(budget(found))
    assert facts["Runs"] == "30 runs: 18 completed, 12 pruned"
    assert facts["Pruned"] == "12 of 24 tuning runs, at step 60 and 80; 18 % of the tuning steps were spared"
    assert facts["Optimizer steps"] == "100"


def test_the_csv_has_the_step(found: Findings) -> None:
    rows = list(csv.DictReader(io.StringIO(runs_csv(found))))
    assert {(r["status"], r["pruned_step"]) for r in rows} == {("completed", ""), ("pruned", "60"), ("pruned", "80")}


def test_the_curve_shows_no_loss_of_theirs(found: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[float, float, Any]] = []
    plot = Axes.plot

    def spy(self: Axes, x: Any, y: Any, *args: Any, **how: Any) -> Any:
        pairs = zip(x, y) if isinstance(x, list) else [(x, y)]
        drawn.extend((a, b, how.get("marker")) for a, b in pairs if isinstance(a, float))
        return plot(self, x, y, *args, **how)

    monkeypatch.setattr(Axes, "plot", spy)
    curve = curves.draw_learning_rates(found, theme.looks(found.sweep.cells))
    assert curve is not None
    assert "A bar at the top: pruned" in curve.caption
    assert "pruned: 5e-4, 8e-3, 1.6e-2" in curve.alt
    assert all(y > 0.1 for _, y, _ in drawn)
    bars = sorted(x for x, _, m in drawn if m == "|")
    assert bars == pytest.approx([x for x in (5e-4, 8e-3, 1.6e-2) for _ in CELLS], rel=0.03), (
        "each cell's beside the other's"
    )
    assert {x for x, _, m in drawn if m != "|"} == {1e-3, 2e-3, 4e-3}


@pytest.mark.usefixtures("undrawn")
def test_it_renders_and_says_nothing_of_pruning_where_there_was_none(store: Store, tmp_path: Path) -> None:
    render(store.root, tmp_path / "out")
    assert "pruned at step 80" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    render(build(tmp_path / "plain", CELLS).root, tmp_path / "none")
    assert "runed" not in (tmp_path / "none/report.md").read_text(encoding="utf-8")
    assert "pruned" not in (tmp_path / "none/runs.csv").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_a_cell_with_every_rate_out(tmp_path: Path) -> None:
    made = build(tmp_path / "s", CELLS, confirm=())
    drop(made, FIRST, dict.fromkeys(RATES, 60))
    said = warnings(find(load(made.root)))
    assert (
        "LoRA r = 4: no learning rate is eligible; at every one a seed diverged, failed, was pruned or has not ended."
        in said
    )
    render(made.root, tmp_path / "out")
