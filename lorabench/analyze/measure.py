"""Measure what a sweep's runs trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.store.analysis import WEIGHTS_FILE

if TYPE_CHECKING:
    from lorabench.analyze.deltas import Bases, Opened
    from lorabench.analyze.scope import Asked, Comparison, Source
    from lorabench.results.cells import Result

ALONE = "Adapters of one seed share their start: without a second seed there is no similarity between ranks."


def analyze(
    sweep_dir: str | Path, asked: Asked, tick: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Measure, write the file, and return what it holds. tick: (layers measured, layers to measure) as they are done.

    The file is written whole after each run, so that a killed analysis goes on where it was. Raises `ConfigError`
    for a directory without finished runs or saved weights, unknown cells or layers, and bases that changed.
    """
    from lorabench.analyze import scope
    from lorabench.results import cells as result_cells
    from lorabench.results.cells import cell_results
    from lorabench.results.sweep import load

    every = cell_results(load(sweep_dir)).by_cell
    chosen = result_cells.select_cells(every, asked.cells)
    source = scope.opened(sweep_dir, every, chosen)
    from lorabench.analyze.deltas import Bases

    bases = Bases()
    wanted = scope.layers(source, chosen, asked.layers, bases)
    doc = _kept(WEIGHTS_FILE.read_reusable(sweep_dir), every, chosen, source)
    todo = {i: names for i, names in wanted.items() if not _known(doc["runs"].get(i), source.runs[i], names, asked)}
    total, done = sum(map(len, todo.values())), 0
    for run_id, names in todo.items():
        ahead = partial(_tick, tick, done, total)
        doc["runs"][run_id] = _measured(source.runs[run_id], names, bases, asked, ahead)
        done += len(names)
        WEIGHTS_FILE.write(sweep_dir, _rounded(doc))
    doc["similarity"] = _similarities(
        doc, scope.comparisons(list(chosen.values()), set(wanted)), source, bases, set(todo)
    )
    WEIGHTS_FILE.write(sweep_dir, _rounded(doc))
    return WEIGHTS_FILE.read_reusable(sweep_dir)


def _tick(tick: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    tick(before + done, total)


def _measured(
    opened: Opened, names: Sequence[str], bases: Bases, asked: Asked, tick: Callable[[int], None]
) -> dict[str, Any]:
    from lorabench.analyze.deltas import measure

    run = opened.saved.run
    about = {"weights": opened.checksum, "seed": run.seed, "lr": run.optimizer.lr, "intruders": asked.intruders}
    return about | measure(opened, names, bases.of(opened), intruders=asked.intruders, tick=tick)


def _similarities(
    doc: Mapping[str, Any], asked: Sequence[Comparison], source: Source, bases: Bases, fresh: set[str]
) -> list[dict[str, Any]]:
    """phi of each comparison; those of runs that were all known before are taken over, as are those of other cells.

    fresh: run_ids that were measured just now.
    """
    from lorabench.analyze.subspaces import compare

    cells = {c for comparison in asked for c in comparison.cells}
    found = [x for x in doc["similarity"] if not set(x["cells"]) <= cells]
    for c in asked:
        ids = {i for pair in c.pairs for i in pair}
        shared = set.intersection(*(set(doc["runs"][i]["layers"]) for i in ids))
        about = {"kind": c.kind, "cells": list(c.cells), "runs": [list(pair) for pair in c.pairs]}
        old = [x for x in doc["similarity"] if all(x[k] == v for k, v in about.items())]
        if ids & fresh or not old:
            layers = [name for name in doc["runs"][c.pairs[0][0]]["layers"] if name in shared]
            old = [about | entry for entry in compare(c.pairs, layers, source.runs, bases)]
        found += old
    return found


# -- the file ------------------------------------------------------------------------------------------------------------


def _rounded(value: Any) -> Any:
    """Six significant digits: equal weights give equal files whatever the last bits of an SVD."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _kept(
    old: Mapping[str, Any], every: Mapping[str, Result], chosen: Mapping[str, Result], source: Source
) -> dict[str, Any]:
    """The file to fill: chosen cells anew, other cells as they were while their runs are the same."""
    before = old.get("cells", {})
    cells = {i: _cell(r, order) for order, (i, r) in enumerate(every.items())}
    cells = {i: cell for i, cell in cells.items() if i in chosen or before.get(i, {}).get("runs") == cell["runs"]}
    here = {x.run_id for r in chosen.values() for x in r.runs}
    runs = {i for cell in cells.values() for i in cell["runs"]}
    left_out = {i: why for i, why in old.get("left_out", {}).items() if i in runs - here} | source.left_out
    runs -= set(left_out)
    lone = [r.id for r in chosen.values() if r.cell.adapter and len({x.config["seed"] for x in r.runs}) == 1]
    return {
        "cells": cells, "left_out": left_out, "notes": [ALONE] if len(lone) > 1 else [],
        "runs": {i: entry for i, entry in old.get("runs", {}).items() if i in runs},
        "similarity": [x for x in old.get("similarity", []) if {i for pair in x["runs"] for i in pair} <= runs],
    }  # fmt: skip


def _cell(r: Result, order: int) -> dict[str, Any]:
    c = r.cell
    return {
        "order": order, "name": r.name, "method": c.method, "r": c.r, "alpha": c.alpha, "targets": c.targets, "role": r.role,
        "lr": r.lr, "runs": [x.run_id for x in r.runs],
    }  # fmt: skip


def _known(entry: Mapping[str, Any] | None, opened: Opened, names: Sequence[str], asked: Asked) -> bool:
    """Whether an earlier analysis measured these layers of these very weights, with intruders if they are asked for."""
    if entry is None or entry["weights"] != opened.checksum or (asked.intruders and not entry["intruders"]):
        return False
    if any("magnitude" not in x for x in entry["layers"].values()):  # of an earlier version
        return False
    return {*entry["layers"], *entry["left_out"]} == set(names)
