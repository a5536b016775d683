"""Measure what adapters cost to keep and to serve."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lorabench.config.errors import ConfigError, UntrustedFile
from lorabench.config.method_names import FULL
from lorabench.runtime import provenance
from lorabench.store.analysis import COSTS_FILE
from lorabench.store.records import Store

if TYPE_CHECKING:
    from lorabench.costs.timings import Bench
    from lorabench.results.cells import Result
    from lorabench.training.saved_run import SavedRun


DEFAULT_TOKENS = 32  # of a text where no record counts them

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CostsRequest:
    """What is measured. cells: ids, which may hold * and ?; empty: all. again: what is known, too.

    trust: whether Python files that records name may run.
    """

    cells: tuple[str, ...] = ()
    repeats: int = 15
    again: bool = False
    trust: bool = False


@dataclass
class SavedRuns:
    """A saved run for each cell, another one to switch to where there is one, and why others are left out."""

    runs: dict[str, list[SavedRun]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def measure_costs(
    sweep_dir: str | Path, asked: CostsRequest, tick: Tick = lambda cell, done, total: None
) -> dict[str, Any]:
    """Measure one saved run of each cell asked for, write the file, and return what it holds.

    tick: called with the cell at hand, the parts done and the parts to do.

    The file is written whole after each cell, so that a killed measurement goes on where it was. Raises `ConfigError`
    for a directory without finished runs or saved weights, unknown cells, and bases that changed.
    """
    from lorabench.results.cells import cell_results, select_cells
    from lorabench.results.sweep import load

    if asked.repeats < 3:
        raise ConfigError("--repeats", asked.repeats, "at least 3: a median and quartiles are taken")
    every = cell_results(load(sweep_dir)).by_cell
    chosen = select_cells(every, asked.cells)
    source = _open_runs(sweep_dir, chosen, asked.trust)
    setting = _conditions(every, source)
    doc = _reusable_content(COSTS_FILE.read_reusable(sweep_dir), every, chosen, source, setting)
    todo = [i for i in source.runs if asked.again or not _is_measured(doc["cells"].get(i), source.runs[i][0])]
    _measure_cells(doc, todo, every, source, asked, tick, lambda: COSTS_FILE.write(sweep_dir, doc))
    COSTS_FILE.write(sweep_dir, doc)
    return COSTS_FILE.read_reusable(sweep_dir)


def _measure_cells(
    doc: dict[str, Any],
    todo: Sequence[str],
    every: Mapping[str, Result],
    source: SavedRuns,
    asked: CostsRequest,
    tick: Tick,
    keep: Callable[[], None],
) -> None:
    """Measure the cells of `todo` into the file's content. One base is held at a time."""
    from lorabench.costs import timings

    held: tuple[str, Bench] | None = None
    for n, i in enumerate(todo):
        done = [n * timings.STEPS]

        def step(cell: str = every[i].name, done: list[int] = done) -> None:
            tick(cell, done[0], len(todo) * timings.STEPS)
            done[0] += 1

        step()
        first, *others = source.runs[i]
        if held is None or held[0] != first.base_key:
            held = None  # the one before goes first
            held = (first.base_key, timings.open_bench(first, doc["setting"]["dtype"], asked.repeats))
        base = held[1]
        folders = [first.folder, (others or [first])[0].folder]
        about = {
            "run": first.record.run_id,
            "weights": first.checksum,
            "bytes": timings.disk_bytes(first.folder),
            "base_bytes": base.bytes,
            "base_load": base.load,
        }
        tokens = doc["setting"]["tokens"]
        doc["cells"][i] = about | timings.time_cell(base, folders, tokens=tokens, repeats=asked.repeats, tick=step)
        doc["cells"][i] |= _cell_entry(every, i)
        keep()


def _open_runs(sweep_dir: str | Path, chosen: Mapping[str, Result], trust: bool) -> SavedRuns:
    """Return up to two runs with weights for each cell. Raises `ConfigError` where no cell has one."""
    from lorabench.training.saved_run import open_run

    store, source = Store(sweep_dir), SavedRuns()
    for r in chosen.values():
        why = "no finished run at its chosen rate"
        for run in r.runs:
            try:
                saved = open_run(store.run_dir(run.run_id), trust=trust)
                saved.weights()
            except UntrustedFile:
                raise
            except ConfigError as e:
                why = e.allowed
                continue
            found = source.runs.setdefault(r.id, [])
            found.append(saved)
            if len(found) == 2:
                break
        if r.id not in source.runs:
            source.left_out[r.id] = why
    if not source.runs:
        told = next(iter(source.left_out.values()), "no cell has a finished run")
        raise ConfigError(
            "sweep dir", str(sweep_dir), f"a sweep whose finished runs kept what they trained; asked for: {told}"
        )
    return source


def _conditions(every: Mapping[str, Result], source: SavedRuns) -> dict[str, Any]:
    """Return the conditions that all cells of the file share: machine, torch, threads, types, length of a text.

    The type and attention are those the adapters' runs were evaluated with, for full fine-tuning too.
    """
    import torch

    adapters = [s for i, (s, *_) in source.runs.items() if every[i].cell.method != FULL]
    first = (adapters or [s for s, *_ in source.runs.values()])[0].record.provenance
    used = [x.resources for r in every.values() for x in r.runs]
    lengths = [u["tokens"] / u["examples"] for u in used if u.get("tokens") and u.get("examples")]
    machine = {k: v for k, v in provenance.machine().items() if k != "host"}
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "device": "cpu",
        "dtype": first.get("base_dtype") or "float32",
        "tokens": round(median(lengths)) if lengths else DEFAULT_TOKENS,
    }


# -- the file --------------------------------------------------------------------------------------------------------


def _reusable_content(
    old: Mapping[str, Any],
    every: Mapping[str, Result],
    chosen: Mapping[str, Result],
    source: SavedRuns,
    setting: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the file's content to go on from: the sweep's cells that were measured under these conditions."""
    same = old.get("setting") == json.loads(json.dumps(setting))
    cells = {
        i: entry | _cell_entry(every, i) for i, entry in (old.get("cells", {}) if same else {}).items() if i in every
    }
    cells = {i: entry for i, entry in cells.items() if i not in source.left_out}
    names = {r.name for i, r in every.items() if i not in chosen}
    left_out = {name: why for name, why in old.get("left_out", {}).items() if name in names}
    left_out |= {every[i].name: why for i, why in source.left_out.items()}
    return {"setting": dict(setting), "cells": cells, "left_out": left_out}


def _cell_entry(every: Mapping[str, Result], cell: str) -> dict[str, Any]:
    """Return what the records and the manifest say of a cell: this is never measured here."""
    r = every[cell]
    return {
        "order": list(every).index(cell),
        "name": r.name,
        "method": r.cell.method,
        "r": r.cell.r,
        "trainable": r.cell.trainable,
        "training_memory": r.timed.get("peak_memory_bytes"),
    }


def _is_measured(entry: Mapping[str, Any] | None, saved: SavedRun) -> bool:
    return entry is not None and entry["weights"] == saved.checksum
