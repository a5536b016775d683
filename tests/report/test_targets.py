"""Targets at one rank and at one number of parameters: who is compared with whom, in which order, against what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fixtures.planted_sweeps import opened, target_sweep
from fixtures.sweeps import RANK_SWEEP, build
from lorabench.report import theme
from lorabench.report.answer import answer
from lorabench.report.sections import targets
from lorabench.results import findings, scores
from lorabench.results.cells import Result
from lorabench.results.evidence import Evidence
from lorabench.results.findings import Findings
from lorabench.results.recommendation import candidates
from lorabench.results.sweep import load


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Evidence]:
    return opened(target_sweep(tmp_path_factory.mktemp("targets") / "s", study={"reference": "lora-r20-a2r-all"}))


def test_equal_rank_and_equal_parameters_best_first(made: tuple[Findings, Evidence]) -> None:
    by_rank, by_size = targets.groups(made[0])
    assert {r.cell.targets for r in by_rank.cells} == {"q", "v", "q+v", "mlp", "all"}
    assert {r.cell.r for r in by_rank.cells} == {8}
    assert {(r.cell.targets, r.cell.r) for r in by_size.cells} == {("attention", 45), ("mlp", 36), ("all", 20)}
    for g in (by_rank, by_size):
        means = [r.test.mean for r in g.cells if r.test]
        assert means == sorted(means, reverse=True)
    assert by_rank.title == "equal rank: r = 8, α = 16" and by_size.title == "equal parameters: about 1.9 M"


def test_differences_are_the_estimates_of_the_evidence(made: tuple[Findings, Evidence]) -> None:
    f, e = made
    part = targets.section(f, e, theme.looks(f.sweep.cells))
    assert part is not None
    rows = {(r.texts[0].split(":")[0], r.texts[1]): r for r in part.tables[0].rows}
    assert len(rows) == 8
    assert rows["equal parameters", "all"].texts[6] == "held against"  # the declared reference
    assert rows["equal rank", "mlp"].texts[6] == "held against"  # no reference there: the one that trains most
    cells = {(r.cell.targets, r.cell.r): r for r in e.cells}
    a, b = cells["attention", 45], cells["all", 20]
    assert a.sample and b.sample
    by_hand = scores.difference(a.sample, b.sample)
    assert by_hand is not None
    shown = rows["equal parameters", "attention"].texts[6]
    assert shown.startswith(f.metric.difference(by_hand.scores.mean()))
    assert set(rows["equal rank", "q"].runs) == {x.run_id for x in cells["q", 8].runs}


def test_words_say_what_is_resolved(made: tuple[Findings, Evidence]) -> None:
    f, e = made
    part = targets.section(f, e, theme.looks(f.sweep.cells))
    assert part is not None
    assert "attention, r = 45 below all, r = 20" in part.texts[1]
    assert "below mlp" in part.texts[0] and "exploratory" in part.texts[0]
    again = targets.section(f, e, theme.looks(f.sweep.cells))
    assert again is not None and again.drawings == part.drawings
    assert len(part.drawings[0].figure.axes) == 2
    assert "attention, r = 45" in part.drawings[0].alt


def test_a_sweep_of_one_set_of_targets_has_no_such_part(tmp_path: Path) -> None:
    f, e = opened(build(tmp_path / "a", RANK_SWEEP[1:4]))
    assert targets.section(f, e, theme.looks(f.sweep.cells)) is None


def test_nothing_without_confirmation(tmp_path: Path) -> None:
    f, e = opened(target_sweep(tmp_path / "s", confirm=()))
    assert targets.section(f, e, theme.looks(f.sweep.cells)) is None


def test_sets_of_as_many_parameters_are_no_smaller_adapters(made: tuple[Findings, Evidence]) -> None:
    """Attention at r = 45 trains as much as all at r = 20: within the margin of it, it still saves nothing."""
    f = made[0]
    assert f.reference is not None
    steps = [r.cell for r in candidates(f.results.values(), f.results[f.reference])]
    sizes = [c.trainable for c in steps]
    assert sizes == sorted(set(sizes), key=lambda n: -(n or 0)) and max(n or 0 for n in sizes) < 850_000
    assert [(c.targets, c.r) for c in steps[:2]] == [("mlp", 8), ("all", 8)]
    assert "100 % of its trainable parameters" not in answer(f).lead


def test_candidates_keep_to_the_conditions_of_the_reference(made: tuple[Findings, Evidence]) -> None:
    f = made[0]
    assert f.reference is not None

    def under(n: str) -> list[Result]:
        """The cells at a size of the data, as other runs."""
        extra = (("task.train_examples", n),)
        return [
            dataclasses.replace(r, cell=dataclasses.replace(r.cell, id=f"{r.id}-{n}", extra=extra), runs=())
            for r in f.results.values()
        ]

    few, many = under("500"), under("9600")
    reference = next(r for r in many if r.id == f"{f.reference}-9600")
    assert {r.cell.extra for r in candidates([*few, *many], reference)} == {reference.cell.extra}


def test_the_answer_says_that_sets_of_targets_do_equally_well() -> None:
    """Three sets at equal parameters, of a real sweep that has others besides."""
    whole = load(Path(__file__).resolve().parent.parent.parent / "sweeps/ref_target_sweep")
    manifest = {**whole.manifest, "cells": [c for c in whole.manifest["cells"] if c["label"]["alpha_rule"] == "2r"]}
    f = findings.find(dataclasses.replace(whole, manifest=manifest, cells=tuple(c for c in whole.cells if c.r != 8)))
    said = "LoRA r = 45 on attention and LoRA r = 36 on mlp are within 2.0 points of it"
    assert f"there is no smaller one here to set against it, and {said}." in answer(f).lead
    undecided = {c: dataclasses.replace(made, size="not resolved") for c, made in f.versus.items()}
    for versus in (undecided, dict([*f.versus.items()][:1]) | dict([*undecided.items()][1:])):
        assert "of it" not in answer(dataclasses.replace(f, versus=versus)).lead
