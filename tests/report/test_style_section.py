"""What replies took on of the data's tone, as records have it, in the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fixtures.planted_sweeps import opened
from fixtures.sweeps import RANK_SWEEP, build
from lorabench.report.sections import style as tone
from lorabench.results.findings import Findings

MOVED = {4: (0.50, 0.52, 0.54), 64: (0.60, 0.62, 0.64)}


def styled(root: Path, *, moved: bool = True) -> Findings:
    store = build(root, (RANK_SWEEP[1], RANK_SWEEP[3]), arrays=False)
    for x in store.records():
        if x.role != "confirm":
            continue
        at = MOVED[x.config["method"]["r"]][x.config["seed"] - 100]
        found = {"real": 0.8, "base": 0.2, "adapted": 0.2 + 0.6 * at, "examples": 100}
        found |= {"moved": at, "moved_low": at - 0.1, "moved_high": at + 0.1} if moved else {}
        store.write(dataclasses.replace(x, metrics=x.metrics | {f"style/{k}": v for k, v in found.items()}))
    return opened(store)[0]


def test_a_row_a_cell_with_its_intervals_and_its_runs(tmp_path: Path) -> None:
    f = styled(tmp_path / "s")
    part = tone.section(f)
    assert part is not None
    small, large = part.tables[0].rows
    assert small.texts[2:5] == ("0.80", "0.20", "0.51")
    assert small.texts[5:] == (
        "0.52 ± 0.05",
        "0.42 to 0.62",
        "−0.10 (−0.17 to −0.03)",
    )  # t of 2 degrees of freedom for each cell's seeds
    assert large.texts[5:] == ("0.62 ± 0.05", "0.52 to 0.72", "reference")
    assert small.runs == tuple(x.run_id for x in f.results["lora-r4-a16-all-linear"].runs)
    assert "100 held-out replies" in part.tables[0].notes[0]


def test_where_the_classifier_cannot_tell_nothing_moved(tmp_path: Path) -> None:
    part = tone.section(styled(tmp_path / "s", moved=False))
    assert part is not None
    assert part.tables[0].rows[0].texts[5:7] == ("–", "–")
    assert part.tables[0].notes[-1].startswith("A run without “moved”")


def test_nothing_without_the_measure(tmp_path: Path) -> None:
    assert tone.section(opened(build(tmp_path / "s", (RANK_SWEEP[1],), arrays=False))[0]) is None
