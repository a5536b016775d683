"""Which rate a cell gets: the best mean validation loss over tuning seeds, among rates at which nothing went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lorabench.config.runs import digest
from lorabench.results.selection import Choice, choose
from lorabench.store.records import Record, Store
from lorabench.sweep.phases import outward_rates

Losses = Mapping[float, list[Any]]  # rate -> validation loss of each seed, or a status, or None for a run not ended


def sweep(*cells: Losses) -> tuple[dict[str, Any], dict[str, Record]]:
    manifest: dict[str, Any] = {"cells": [], "runs": {}}
    records: dict[str, Record] = {}
    for n, cell in enumerate(cells):
        ids = []
        for lr, outcomes in cell.items():
            for seed, outcome in enumerate(outcomes):
                run_id = f"{len(manifest['runs']):012x}"
                ids.append(run_id)
                manifest["runs"][run_id] = {"role": "tune", "lr": lr, "seed": seed}
                config = {"optimizer": {"lr": lr}, "seed": seed}
                if isinstance(outcome, str):
                    records[run_id] = Record(run_id, "tune", outcome, config)
                elif outcome is not None:
                    records[run_id] = Record(run_id, "tune", "completed", config, {"val/loss": outcome})
        manifest["cells"].append({"id": f"c{n}", "runs": {"tune": ids, "confirm": []}})
    return manifest, records


def pick(cell: Losses) -> Choice:
    return choose(*sweep(cell))["c0"]


def test_best_mean_over_seeds() -> None:
    choice = pick({1e-3: [0.5, 0.9], 2e-3: [0.6, 0.7], 4e-3: [0.8, 0.8]})
    assert choice.lr == 2e-3
    assert choice.loss == pytest.approx(0.65)
    assert not choice.edge
    assert [r.lr for r in choice.rates] == [1e-3, 2e-3, 4e-3]
    assert choice.rates[0].losses == (0.5, 0.9)


@pytest.mark.parametrize("lost", ["diverged", "failed", math.nan, math.inf])
def test_a_rate_that_lost_a_seed_is_out(lost: Any) -> None:
    choice = pick({1e-3: [0.9, 0.9], 2e-3: [0.8, 0.8], 4e-3: [0.1, lost]})
    assert choice.lr == 2e-3
    assert choice.ineligible == {4e-3: 1}
    assert choice.rates[2].mean == 0.1


@pytest.mark.parametrize("missing", [None, "pruned"])
def test_a_rate_with_a_seed_missing_waits(missing: Any) -> None:
    choice = pick({1e-3: [0.9, 0.9], 2e-3: [0.1, missing]})
    assert choice.lr == 1e-3
    assert choice.ineligible == {}
    assert choice.rates[1].missing == 1
    assert choice.rates[1].seeds == 2


def test_a_tie_goes_to_the_smaller_rate() -> None:
    assert pick({4e-3: [0.5], 1e-3: [0.5], 2e-3: [0.6]}).lr == 1e-3


@pytest.mark.parametrize(
    ("cell", "side"),
    [
        ({1e-3: [0.1], 2e-3: [0.2], 4e-3: [0.3]}, "low"),
        ({1e-3: [0.3], 2e-3: [0.2], 4e-3: [0.1]}, "high"),
        ({1e-3: [0.3], 2e-3: [0.1], 4e-3: ["diverged"]}, None),  # bounded by the rate that diverged
        ({1e-3: [0.3]}, None),  # one rate is not a grid
    ],
)
def test_the_edge_of_the_grid(cell: Losses, side: str | None) -> None:
    choice = pick(cell)
    assert choice.side == side
    assert choice.edge == (side is not None)


@pytest.mark.parametrize(
    ("cell", "side", "beyond"),
    [
        ({1e-3: ["pruned"], 2e-3: [0.1], 4e-3: [0.2], 8e-3: ["pruned"]}, "low", (1e-3,)),
        ({1e-3: ["pruned"], 2e-3: [0.2], 4e-3: [0.1], 8e-3: ["pruned"]}, "high", (8e-3,)),
        ({1e-3: ["pruned"], 2e-3: [0.2], 4e-3: [0.1], 8e-3: [0.3]}, None, ()),
        ({1e-3: [0.3], 2e-3: ["pruned"], 4e-3: [0.1], 8e-3: [0.3]}, None, ()),  # bounded by 1e-3, on a coarser grid
        ({1e-3: [0.2, 0.2], 2e-3: [0.1, 0.1], 4e-3: ["diverged", "pruned"]}, None, ()),  # bounded by what diverged
        ({1e-3: [0.2, 0.2], 2e-3: [0.1, 0.1], 4e-3: [0.01, "pruned"]}, "high", (4e-3,)),
        ({1e-3: [0.1], 2e-3: [0.2], 4e-3: ["pruned"]}, "low", ()),
        ({1e-3: ["pruned"], 2e-3: [0.1]}, "low", (1e-3,)),
    ],
)
def test_a_pruned_edge_does_not_count_as_covered(cell: Losses, side: str | None, beyond: tuple[float, ...]) -> None:
    choice = pick(cell)
    assert choice.side == side
    assert tuple(r.lr for r in choice.beyond) == beyond


def test_a_pruned_rate_is_never_chosen_and_keeps_its_steps() -> None:
    manifest, records = sweep({1e-3: [0.9, 0.9], 2e-3: [0.1, "pruned"]})
    (gone,) = [r for r in records.values() if r.status == "pruned"]
    gone.metrics |= {"val/loss": 0.01, "pruned_step": 50}
    choice = choose(manifest, records)["c0"]
    assert choice.lr == 1e-3
    assert choice.rates[1].pruned == (50,)
    assert choice.rates[1].losses == (0.1,), "the loss of an earlier step is not one of the rate's losses"


@pytest.mark.parametrize(
    ("cell", "outward"),
    [
        ({1e-3: [0.1], 2e-3: [0.2], 4e-3: [0.3]}, 5e-4),
        ({1e-3: [0.3], 3e-3: [0.1]}, 9e-3),
        ({1e-3: [0.3], 2e-3: [0.1], 4e-3: ["diverged"]}, None),
        ({1e-3: [0.1], 2e-3: ["diverged"]}, 5e-4),
        ({1e-3: [0.3]}, None),
        ({1e-3: ["pruned"], 2e-3: [0.1], 4e-3: [0.2]}, None),
    ],
)
def test_the_next_rate_outward(cell: Losses, outward: float | None) -> None:
    assert pick(cell).outward == outward


def test_no_eligible_rate() -> None:
    choice = pick({1e-3: ["diverged"], 2e-3: [None]})
    assert choice.lr is None
    assert math.isnan(choice.loss)
    assert not choice.edge


def test_a_run_of_two_cells_counts_in_both() -> None:
    manifest, records = sweep({1e-3: [0.3], 2e-3: [0.2]}, {1e-3: [0.1], 4e-3: [0.5]})
    shared = manifest["cells"][0]["runs"]["tune"][1]
    manifest["cells"][1]["runs"]["tune"].append(shared)
    found = choose(manifest, records)
    assert found["c0"].lr == 2e-3
    assert [r.lr for r in found["c1"].rates] == [1e-3, 2e-3, 4e-3]


def test_nothing_to_choose_from() -> None:
    assert choose({}, {}) == {}
    assert pick({}) == Choice(None)


def added_outward(root: Path, cells: Mapping[str, Mapping[float, str | None]]) -> Any:
    """What `outward_rates` says of cells whose rates have ended so (None: not yet); tried here: the first two of each."""
    from types import SimpleNamespace

    store, cell_of = Store(root), {}
    label = {"method": "LoRA", "r": 1, "alpha": 16.0, "alpha_rule": "16", "targets": "all-linear", "extra": {}}
    manifest: dict[str, Any] = {"schema": 1, "study": {}, "cells": [], "runs": {}, "packs": []}
    for name, rates in cells.items():
        ids = {digest([name, lr])[:12]: lr for lr in rates}
        manifest["cells"].append({"id": name, "label": label, "runs": {"tune": list(ids), "confirm": []}})
        manifest["runs"] |= {i: {"role": "tune", "lr": lr, "seed": 0} for i, lr in ids.items()}
        cell_of |= {i: (name, lr) for i, lr in ids.items()}
    store.write_manifest(manifest)
    for i, (name, lr) in cell_of.items():
        if status := cells[name][lr]:
            config = {"method": {"name": "lora"}, "optimizer": {"lr": lr}, "seed": 0}
            metrics = {"val/loss": 1 - 100 * lr} if status == "completed" else {}
            store.write(Record(i, "tune", status, config, metrics))
            assert store.read(i)

    def asked(*, retry: bool = False, more: float = 0) -> dict[str, float]:
        settings: Any = SimpleNamespace(sweep=SimpleNamespace(dir=str(root), retry_failed=retry))
        tried = {name: {*list(rates)[:2], more} for name, rates in cells.items() if name != "unlisted"}
        return outward_rates(settings, tried, dict.fromkeys(cells, 8))

    return asked


DONE = {1e-3: "completed", 2e-3: "completed"}


def test_a_rate_added_outward_that_failed_is_tried_again_when_asked(tmp_path: Path) -> None:
    """It is no rate of the grid: nobody else lists it."""
    asked = added_outward(tmp_path, {"c": {**DONE, 4e-3: "failed"}})
    assert (asked(), asked(retry=True)) == ({}, {"c": 4e-3})
    assert asked(retry=True, more=4e-3) == {}  # once


def test_a_round_of_added_rates_that_was_cut_ends_before_the_next(tmp_path: Path) -> None:
    """Rates that are added together share a pack: one that waits for another must wait after a kill, too."""
    cut, ahead = {**DONE, 4e-3: None}, {**DONE, 4e-3: "completed"}
    assert added_outward(tmp_path / "cut", {"cut": cut, "ahead": ahead})() == {"cut": 4e-3}
    assert added_outward(tmp_path / "on", {"one": ahead, "two": ahead})() == {"one": 8e-3, "two": 8e-3}
    assert added_outward(tmp_path / "other", {"unlisted": cut, "ahead": ahead})() == {"ahead": 8e-3}
