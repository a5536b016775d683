"""Sweeps that vary more than the method: each rank is held against ranks of its own condition, and nothing is mixed up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fixtures.planted_sweeps import opened
from fixtures.sweeps import Planted, build
from lorabench.claims.rates import rate_moves_little
from lorabench.report.answer import answer
from lorabench.report.budget import budget
from lorabench.report.cautions import warnings
from lorabench.report.sections import conditions
from lorabench.results import rate_slopes, scores
from lorabench.results.evidence import Evidence
from lorabench.results.findings import Findings

SIZES = (500, 2500, 9600)
QUALITY = {500: (0.63, 0.63, 0.63), 2500: (0.70, 0.72, 0.725), 9600: (0.72, 0.774, 0.776)}


def data_size(root: Path, **changes: Any) -> tuple[Findings, Evidence]:
    """r = 1 is enough at 500 examples, r = 8 at 9,600. The data's fingerprint is that of what a run trained on."""
    cells = [
        Planted(
            "lora",
            (1e-3, 2e-3, 4e-3, 8e-3),
            2e-3,
            q,
            r=r,
            seed_sd=0.002,
            label={"extra": {"task.train_examples": str(n)}},
            config={"task": {"train_examples": n}},
        )
        for n in SIZES
        for r, q in zip((1, 8, 64), QUALITY[n], strict=True)
    ]
    store = build(root, cells, confirm=(100, 101, 102, 103), examples=4000, **changes)
    for x in store.records():
        n = x.config["task"]["train_examples"]
        resources = {**x.resources, "train_examples": n, "examples": n, "steps": -(-n // 32)}
        provenance = {**x.provenance, "precision": "32", "data_fingerprint": f"of {n}"}
        store.write(dataclasses.replace(x, resources=resources, provenance=provenance))
    return opened(store)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Evidence]:
    return data_size(tmp_path_factory.mktemp("sizes") / "s")


def test_sizes_stand_in_their_order_and_the_most_data_is_the_reference(made: tuple[Findings, Evidence]) -> None:
    f = made[0]
    order = [(dict(r.cell.extra)["task.train_examples"], r.cell.r) for r in f.results.values()]
    assert order == [(str(n), r) for n in SIZES for r in (1, 8, 64)]
    assert f.reference is not None and f.results[f.reference].name == "LoRA r = 64 (train_examples 9600)"
    facts = dict(budget(f))
    assert facts["Examples"].startswith("500 or 2,500 or 9,600 train")
    assert facts["Optimizer steps"] == "16; 79; 300"


def test_data_that_differ_as_the_axis_asks_are_no_warning(made: tuple[Findings, Evidence]) -> None:
    f, _ = made
    assert not [w for w in warnings(f) if "version of the data" in w]
    store = f.sweep.store
    run = next(iter(f.results.values())).runs[0]
    try:
        store.write(dataclasses.replace(run, provenance={**run.provenance, "data_fingerprint": "another"}))
        told = [w for w in warnings(opened(store)[0]) if "version of the data" in w]
        assert (
            len(told) == 1
            and "another for LoRA r = 1 (data_fingerprint another, train_examples 500)" in told[0]
            and "9600" not in told[0]
        )
    finally:
        store.write(run)


def test_each_size_has_its_own_smallest_rank(made: tuple[Findings, Evidence]) -> None:
    f = made[0]
    found = conditions.conditions(f)
    assert [(c.name, c.cells[c.enough].cell.r) for c in found] == [
        ("train_examples 500", 1),
        ("train_examples 2500", 8),
        ("train_examples 9600", 8),
    ]
    part = conditions.section(f)
    assert part is not None
    assert part.texts[0].startswith(
        "At train_examples 500: r = 1 is shown to fall short of r = 64 by less than 2.0 points ("
    )
    assert "; r = 1 is not (" in part.texts[2]
    assert (
        part.texts[3].endswith("r = 1 loses ground.")
        and "From train_examples 500 to train_examples 9600" in part.texts[3]
    )
    rows = {(r.texts[0], r.texts[1]): r for r in part.tables[0].rows}
    assert rows["train_examples 500", "64"].texts[4] == "held against"
    assert rows["train_examples 9600", "1"].texts[5:] == ("beyond", "not shown")
    told = dict(answer(f).points)["Under each condition"]
    assert all(f"At {c.name}: r = " in told for c in found)


def test_the_change_of_a_difference_is_that_of_four_cells(made: tuple[Findings, Evidence]) -> None:
    f = made[0]
    found = conditions.conditions(f)
    four = [c.cells[n] for c in (found[-1], found[0]) for n in (0, -1)]
    means = [r.test.mean for r in four if r.test]
    part = conditions.section(f)
    assert part is not None
    change = (means[0] - means[1]) - (means[2] - means[3])
    now, then = (f.metric.difference(means[n] - means[n + 1]) for n in (0, 2))
    assert f"goes from {then} to {now}, by {f.metric.difference(change, unit=True)} (" in part.texts[3]
    a, b = (scores.difference(x.sample, y.sample) for x, y in (four[:2], four[2:]) if x.sample and y.sample)
    both = scores.difference(a, b) if a and b else None
    assert both is not None
    low, high = both.estimate().interval()
    assert f.metric.bounds(low, high) in part.texts[3]


def test_a_claim_on_one_of_several_lines_says_which(made: tuple[Findings, Evidence]) -> None:
    e = made[1]
    assert e.lines(1.0)[0].under == "train_examples 9600"  # of lines of one length that of most examples
    assert "(train_examples 9600)" in rate_moves_little(e).reason
    assert rate_slopes.slopes(e)[0].constant == "s = 16/r, train_examples 9600"


def test_a_sweep_of_one_condition_has_no_such_part(tmp_path: Path) -> None:
    f, e = opened(build(tmp_path / "s", confirm=(100, 101, 102), examples=300))
    assert conditions.section(f) is None and "Under each condition" not in dict(answer(f).points)
    assert e.lines(1.0)[0].under == ""
