"""A sweep that has not ended: no verdict, what is missing, and how to go on, in plain words at the top."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.sweeps import RANK_SWEEP, build
from lorabench.report import render
from lorabench.report.answer import answer
from lorabench.report.cautions import warnings
from lorabench.results import unfinished
from lorabench.results.findings import Findings, find
from lorabench.results.sweep import load
from lorabench.store.records import Store


def without(store: Store, role: str, keep: int) -> Findings:
    """The first `keep` runs of a phase alone have ended."""
    ids = [i for c in store.manifest()["cells"] for i in c["runs"][role]]
    for run_id in ids[keep:]:
        (store.run_dir(run_id) / "run.json").unlink()
    return find(load(store.root))


@pytest.mark.usefixtures("undrawn")
def test_tuning_under_way(tmp_path: Path) -> None:
    store = build(tmp_path / "ref_synthetic", confirm=())
    f = without(store, "tune", 4)  # all of the first cell, none of the five others
    said = answer(f)
    assert said.lead.startswith("No verdict yet: 4 of 24 tuning runs have ended and nothing is confirmed")
    points = dict(said.points)
    assert points["Missing"].startswith(
        "20 tuning runs (LoRA r = 4, LoRA r = 16, LoRA r = 64, head only, full fine-tuning). After them confirmation runs with fresh seeds"
    )
    command = f"python -m lorabench +experiment=rank_sweep sweep.dir={tmp_path.name}/ref_synthetic"
    assert (said.command, said.does) == (command, "Go on with it")
    assert "what has ended is not trained again" in points["To go on"] and "To confirm" not in points
    told = warnings(f)
    assert told[0].startswith("20 runs of 24 had not ended")
    assert told[1].startswith(
        "No run has ended yet of 5 cells of 6: LoRA r = 4, LoRA r = 16, LoRA r = 64, head only, full"
    )
    assert not any("no learning rate is eligible" in w for w in told)
    render(store.root, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert f"Go on with it:\n\n    {command}\n" in text
    assert "– solo" not in text and "– (" not in text and "(–)" not in text


def test_confirmation_under_way(tmp_path: Path) -> None:
    f = without(build(tmp_path / "synthetic"), "confirm", 4)
    assert not answer(f).lead.startswith("No verdict yet")
    assert unfinished.missing_runs(f).startswith("14 confirmation runs (LoRA r = 4, LoRA r = 16")
    assert "is not trained again: python -m lorabench +experiment=rank_sweep sweep.name=synthetic." in warnings(f)[0]


def test_nothing_is_missing_of_what_has_ended(tmp_path: Path) -> None:
    f = find(load(build(tmp_path / "s", RANK_SWEEP, confirm=()).root))
    assert answer(f).command is None and unfinished.missing_runs(f) == "" and unfinished.cells_without_runs(f) == []
    assert answer(f).lead.startswith("No verdict yet. Tuning only") and "To confirm" in dict(answer(f).points)


def test_an_experiment_that_is_not_known_has_no_command(tmp_path: Path) -> None:
    store = build(tmp_path / "s")
    store.write_manifest({**store.manifest(), "experiment": None})
    assert unfinished.continue_command(load(store.root)) is None


def test_the_command_that_goes_on_is_the_one_that_launched_it(tmp_path: Path) -> None:
    store = build(tmp_path / "s")
    words = ["-m", "--config-dir", "mine", "method.r=1,4", "task.train_examples=500"]
    store.write_manifest({**store.manifest(), "command": [*words, "sweep.dir=old/place"], "experiment": None})
    launched = "python -m lorabench " + " ".join(words)
    assert unfinished.continue_command(load(store.root)) == f"{launched} sweep.dir={tmp_path.name}/s"
    store.write_manifest({**store.manifest(), "command": [*words, "sweep.dir=/elsewhere/s"]})
    assert unfinished.continue_command(load(store.root)) == f"{launched} sweep.dir=/elsewhere/s"
