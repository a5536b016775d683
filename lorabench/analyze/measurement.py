"""Measure what a sweep's runs trained, and keep it in <sweep>/analysis/weights.json. Torch is imported when it is
needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.analyze import scope
from lorabench.analyze.scope import SimilarityPairs, TrainedRuns, WeightsRequest
from lorabench.store.analysis import WEIGHTS_FILE

if TYPE_CHECKING:
    from lorabench.analyze.deltas import BaseCache, TrainedRun
    from lorabench.results.cells import Result

ONE_SEED_NOTE = "Adapters of one seed share their start: without a second seed there is no similarity between ranks."


def measure_weights(
    sweep_dir: str | Path, request: WeightsRequest, tick: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Measure, write the file, and return what it holds. tick: (layers measured, layers to measure) after each layer.

    The file is written whole after each run, so that a killed analysis goes on where it was. Raises `ConfigError` for a
    directory without finished runs or saved weights, unknown cells or layers, and bases that changed.
    """
    from lorabench.results.cells import cell_results, select_cells
    from lorabench.results.sweep import load

    results = cell_results(load(sweep_dir)).by_cell
    chosen = select_cells(results, request.cells)
    source = scope.open_runs(sweep_dir, results, chosen, trust=request.trust)
    from lorabench.analyze.deltas import BaseCache

    bases = BaseCache()
    wanted = scope.layers_by_run(source, chosen, request.layers, bases)
    doc = _reusable_content(WEIGHTS_FILE.read_reusable(sweep_dir), results, chosen, source)
    todo = {
        run_id: names
        for run_id, names in wanted.items()
        if not _is_measured(doc["runs"].get(run_id), source.runs[run_id], names, request)
    }
    total, done = sum(map(len, todo.values())), 0

    def tick_layer() -> None:
        nonlocal done
        done += 1
        tick(done, total)

    for run_id, names in todo.items():
        doc["runs"][run_id] = _run_entry(source.runs[run_id], names, bases, request, tick_layer)
        _write(sweep_dir, doc)
    comparisons = scope.pairs_to_compare(list(chosen.values()), set(wanted))
    doc["similarity"] = _similarities(doc, comparisons, source, bases, set(todo))
    _write(sweep_dir, doc)
    return WEIGHTS_FILE.read_reusable(sweep_dir)


def _run_entry(
    run: TrainedRun, names: Sequence[str], bases: BaseCache, request: WeightsRequest, tick: Callable[[], None]
) -> dict[str, Any]:
    from lorabench.analyze.deltas import measure_run

    config = run.saved.run
    return {
        "weights": run.checksum,
        "seed": config.seed,
        "lr": config.optimizer.lr,
        "intruders": request.intruders,
        **measure_run(run, names, bases.weights(run), intruders=request.intruders, tick=tick),
    }


def _similarities(
    doc: Mapping[str, Any],
    comparisons: Sequence[SimilarityPairs],
    source: TrainedRuns,
    bases: BaseCache,
    fresh: set[str],
) -> list[dict[str, Any]]:
    """Return phi of each comparison. Entries of other cells, and of runs that were all known before, are taken over.

    fresh: run_ids that were measured just now.
    """
    from lorabench.analyze.subspaces import similarity_entries

    cells = {cell for comparison in comparisons for cell in comparison.cells}
    similarities = [x for x in doc["similarity"] if not set(x["cells"]) <= cells]
    for c in comparisons:
        run_ids = {run_id for pair in c.pairs for run_id in pair}
        shared = set.intersection(*(set(doc["runs"][run_id]["layers"]) for run_id in run_ids))
        about = {"kind": c.kind, "cells": list(c.cells), "runs": [list(pair) for pair in c.pairs]}
        entries = [x for x in doc["similarity"] if all(x[key] == value for key, value in about.items())]
        if run_ids & fresh or not entries:
            layers = [name for name in doc["runs"][c.pairs[0][0]]["layers"] if name in shared]
            entries = [about | entry for entry in similarity_entries(c.pairs, layers, source.runs, bases)]
        similarities += entries
    return similarities


# -- the file --------------------------------------------------------------------------------------------------------


def _write(sweep_dir: str | Path, doc: Mapping[str, Any]) -> None:
    WEIGHTS_FILE.write(sweep_dir, _round(doc))


def _round(value: Any) -> Any:
    """Round every float to six significant digits: equal weights give equal files whatever the last bits of an SVD."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {k: _round(v) for k, v in value.items()}
    return [_round(v) for v in value] if isinstance(value, (list, tuple)) else value


def _reusable_content(
    old: Mapping[str, Any], results: Mapping[str, Result], chosen: Mapping[str, Result], source: TrainedRuns
) -> dict[str, Any]:
    """Return the content to fill: chosen cells anew, other cells as they were while their runs are the same."""
    before = old.get("cells", {})
    cells = {i: _cell_entry(result, order) for order, (i, result) in enumerate(results.items())}
    cells = {i: cell for i, cell in cells.items() if i in chosen or before.get(i, {}).get("runs") == cell["runs"]}
    chosen_runs = {run.run_id for result in chosen.values() for run in result.runs}
    runs = {i for cell in cells.values() for i in cell["runs"]}
    left_out = {i: why for i, why in old.get("left_out", {}).items() if i in runs - chosen_runs} | source.left_out
    runs -= set(left_out)
    one_seed = [r for r in chosen.values() if r.cell.adapter and len({run.config["seed"] for run in r.runs}) == 1]
    return {
        "cells": cells,
        "left_out": left_out,
        "notes": [ONE_SEED_NOTE] if len(one_seed) > 1 else [],
        "runs": {i: entry for i, entry in old.get("runs", {}).items() if i in runs},
        "similarity": [x for x in old.get("similarity", []) if {i for pair in x["runs"] for i in pair} <= runs],
    }


def _cell_entry(result: Result, order: int) -> dict[str, Any]:
    cell = result.cell
    return {
        "order": order,
        "name": result.name,
        "method": cell.method,
        "r": cell.r,
        "alpha": cell.alpha,
        "targets": cell.targets,
        "role": result.role,
        "lr": result.lr,
        "runs": [run.run_id for run in result.runs],
    }


def _is_measured(
    entry: Mapping[str, Any] | None, run: TrainedRun, names: Sequence[str], request: WeightsRequest
) -> bool:
    """Whether an earlier analysis measured these layers of these very weights, with intruders if they are asked for."""
    if entry is None or entry["weights"] != run.checksum or (request.intruders and not entry["intruders"]):
        return False
    if any("magnitude" not in x for x in entry["layers"].values()):  # measured by an earlier version
        return False
    return {*entry["layers"], *entry["left_out"]} == set(names)
