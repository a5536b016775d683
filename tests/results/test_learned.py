"""What a user is told of data that were left out, of a sweep in which nothing was learned, and of a long wait."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fixtures.sweeps import RANK_SWEEP, build
from lorabench.report.answer import answer
from lorabench.report.cautions import warnings
from lorabench.results.data_notes import data_caveats
from lorabench.results.findings import Findings, find, majority_baseline
from lorabench.results.sweep import load
from lorabench.sweep.progress import announce_slow

LABELS = {"no": 300, "yes": 1500, "perhaps": 200}  # always "yes": 75 %


def told(
    root: Path, quality: float, *, confirm: tuple[int, ...] = (100, 101, 102), metric: str = "accuracy"
) -> Findings:
    """A sweep of adapters of one accuracy, whose records count the labels."""
    cells = [replace(cell, quality=quality, seed_sd=0.0, diverges_at=float("inf")) for cell in RANK_SWEEP[:3]]
    store = build(root, cells, confirm=confirm, metric=metric)
    for record in store.records():
        notes = {s: {"examples": 2000, "labels": LABELS} for s in ("val", "test")}
        record.provenance["data_notes"] = {"source": "file", "rows": 2100, "rows_without_text_or_label": 100, **notes}
        store.write(record)
    return find(load(root))


def test_cells_that_all_give_one_answer_show_nothing(tmp_path: Path) -> None:
    said = answer(told(tmp_path / "a", 0.70))
    assert said.lead.startswith("Nothing was learned: no cell does better on test than always answering yes (75.0 %)")
    assert said.command is None
    assert not answer(told(tmp_path / "b", 0.85)).lead.startswith("Nothing")


@pytest.mark.parametrize(("metric", "baseline"), [("macro_f1", 0.2857), ("mcc", 0.0)])
def test_of_another_metric_the_one_answer_has_its_own_score(tmp_path: Path, metric: str, baseline: float) -> None:
    """Always "yes" at 75 % accuracy: F1 of .857 for one label of three, and no correlation at all."""
    f = told(tmp_path / "a", 0.85, metric=metric)
    assert majority_baseline(f) is None
    for record in f.sweep.store.records():
        for split in ("val", "test"):
            if f"{split}/{metric}" in record.metrics:
                record.metrics[f"{split}/{metric}"] = baseline - 1e-3
        f.sweep.store.write(record)
    assert majority_baseline(find(load(tmp_path / "a"))) == ("yes", pytest.approx(baseline, abs=1e-4))


def test_nor_do_they_on_validation(tmp_path: Path) -> None:
    found = warnings(told(tmp_path / "a", 0.70, confirm=()))
    assert found[0] == "No cell does better on validation than always answering yes (75.0 %): nothing was learned."
    assert not any("nothing was learned" in w for w in warnings(told(tmp_path / "b", 0.85, confirm=())))


def test_rows_that_were_left_out_are_told_once(tmp_path: Path) -> None:
    found = warnings(told(tmp_path / "a", 0.85))
    assert found.count("Of 2,100 rows of data 100 without text or label are left out.") == 1


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ({"source": "file", "rows": 9}, []),
        ({"source": "tweets", "rows": 9, "duplicates_removed": 3}, []),  # a shipped set: its page says so
        (
            {"source": "file", "rows": 9, "rows_without_text": 2, "duplicates_removed": 1, "label_conflicts": 1},
            ["of 9 rows of data 2 without text and 1 duplicate (1 text with unlike labels) are left out"],
        ),
        ({"truncation": {"train": {"truncated_share": 0.04, "max_length": 128}}}, []),
        (
            {"truncation": {"train": {"truncated_share": 0.5, "max_length": 128}}},
            ["50 % of the training texts are cut at task.max_length=128 tokens"],
        ),
    ],
)
def test_what_is_said_of_data(notes: dict[str, object], said: list[str]) -> None:
    assert data_caveats(notes) == said


def test_what_takes_long_is_announced() -> None:
    said = threading.Event()

    class Heard(io.StringIO):
        def flush(self) -> None:
            said.set()

    console = Console(file=Heard())
    with announce_slow("reading the data", after=0.0, console=console):
        assert said.wait(60)
    with announce_slow("never said", after=600.0, console=console):
        pass
    assert console.file.getvalue() == "reading the data\n"  # type: ignore[attr-defined]
