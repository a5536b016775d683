"""What adapters cost to keep and to serve, as `python -m lorabench.costs` measured it: read, and as a table. No torch.

<sweep dir>/analysis/costs.json    {"schema": 1, "setting": {"machine": {"cpu", "cpus", ...}, "threads", "torch", "dtype", "tokens"},
    "cells": {id: {"order", "name", "run", "bytes", "base_bytes", "load": spread, "switch": spread, "merge": spread or null,
                   "latency": {"1": {"plain": spread, "merged": .., "served": .., "ratio": ..}, "32": ..}, "training_memory", ...}},
    "left_out": {cell: reason}}    a spread is {"median", "low", "high" (quartiles), "n"}, in seconds but for ratios
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config.errors import ConfigError
from lorabench.config.method_names import FULL, VERA
from lorabench.report.tables import Column, Row, Table
from lorabench.results import formatting
from lorabench.store.analysis import COSTS_FILE


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of n repeats."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class CellCosts:
    """One saved run of a cell. Seconds; bytes."""

    name: str
    method: str
    run: str
    bytes: int
    base_bytes: int
    base_load: Spread
    load: Spread
    switch: Spread
    merge: Spread | None  # one out, another in; None: full fine-tuning, which switches so
    latency: Mapping[int, Mapping[str, Spread]]  # batch size -> plain, merged, served, ratio (served over merged)
    training_memory: int | None  # peak of a few steps alone


@dataclass(frozen=True)
class Costs:
    """cells: in the order of the report's tables. left_out: name of a cell -> why it was not measured."""

    cpu: str
    cpus: int
    threads: int
    torch: str
    dtype: str
    tokens: int
    cells: tuple[CellCosts, ...]
    left_out: Mapping[str, str]

    @property
    def full_memory(self) -> int | None:
        return next((c.training_memory for c in self.cells if c.method == FULL), None)


def read(root: Path) -> Costs | None:
    """root: the sweep's directory. None where nothing was measured. Raises `ConfigError` for a file that holds no costs."""
    try:
        doc = COSTS_FILE.read(root)
        return None if doc is None else parse(doc)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        why = f"what `python -m lorabench.costs` writes ({type(e).__name__}: {e}); measure again"
        raise ConfigError("costs", str(COSTS_FILE.path(root)), why) from e


def parse(doc: Mapping[str, Any]) -> Costs:
    """The file's content, typed. Raises KeyError, TypeError, ValueError or AttributeError for what is none."""
    s = doc["setting"]
    cells = sorted(doc["cells"].values(), key=lambda x: x["order"])
    return Costs(
        str(s["machine"]["cpu"]), int(s["machine"]["cpus"]), int(s["threads"]), str(s["torch"]), str(s["dtype"]), int(s["tokens"]),
        tuple(map(_cell, cells)), dict(doc["left_out"]),
    )  # fmt: skip


def _cell(x: Mapping[str, Any]) -> CellCosts:
    latency = {int(b): {way: _spread(t) for way, t in ways.items()} for b, ways in x["latency"].items()}
    memory = x["training_memory"]
    return CellCosts(
        str(x["name"]), str(x["method"]), str(x["run"]), int(x["bytes"]), int(x["base_bytes"]), _spread(x["base_load"]), _spread(x["load"]),
        _spread(x["switch"]), None if x["merge"] is None else _spread(x["merge"]), dict(sorted(latency.items())),
        None if memory is None else int(memory),
    )  # fmt: skip


def _spread(x: Mapping[str, Any]) -> Spread:
    return Spread(float(x["median"]), float(x["low"]), float(x["high"]), int(x["n"]))


# -- tables --------------------------------------------------------------------------------------------------------------


def tables(c: Costs) -> list[Table]:
    """What it costs to keep, to load and to switch; and latency. A row a cell."""
    return [_keeping(c), _latency(c)]


def _keeping(c: Costs) -> Table:
    columns = (
        Column("cell", "cell"), Column("bytes", "on disk (of base)", "right"), Column("load", "load ms", "right"),
        Column("switch", "switch ms", "right"), Column("merge", "merged: switch ms", "right"),
        Column("memory", "training memory (of full)", "right"),
    )  # fmt: skip
    rows = []
    for x in c.cells:
        share = (
            ""
            if not c.full_memory or x.training_memory is None
            else f" ({formatting.share(x.training_memory, c.full_memory)})"
        )
        rows.append(Row((
            x.name, f"{_size(x.bytes)} ({formatting.share(x.bytes, x.base_bytes)})", _ms(x.load), _ms(x.switch), _ms(x.merge),
            formatting.memory(x.training_memory) + share,
        ), (x.run,)))  # fmt: skip
    return Table("costs", "What it costs to keep and to serve", columns, tuple(rows), tuple(_notes(c)))


def _latency(c: Costs) -> Table:
    batches = sorted({batch for x in c.cells for batch in x.latency})
    kinds = (("served", "unmerged ms"), ("merged", "merged ms"), ("ratio", "ratio"))
    columns = (
        Column("cell", "cell"), *(Column(f"{key}{b}", f"batch {b}: {said}", "right") for b in batches for key, said in kinds)
    )  # fmt: skip
    rows = tuple(
        Row(
            (x.name, *(_ms(x.latency.get(b, {}).get(key), key == "ratio") for b in batches for key, _ in kinds)),
            (x.run,),
        )
        for x in c.cells
    )
    notes = (
        f"One forward pass over texts of {c.tokens} tokens without padding, no generation. Ratio: unmerged over merged in one round. Merged weights are a plain base's, and so is full "
        "fine-tuning. Medians and quartiles, on the machine named above.",
    )
    return Table("latency", "Latency, unmerged and merged", columns, rows, notes)


def _size(n: int) -> str:
    """KiB below a MiB; a decimal below 100 MiB."""
    if n < 2**20:
        return f"{n / 2**10:,.1f} KiB"
    return f"{n / 2**20:.1f} MiB" if n < 100 * 2**20 else formatting.memory(n)


def _ms(t: Spread | None, ratio: bool = False) -> str:
    """Median and quartiles: milliseconds, or a ratio as it is."""
    if t is None:
        return formatting.DASH
    low, middle, high = (f"{x:.2f}" if ratio else _three(x) for x in (t.low, t.median, t.high))
    return f"{middle} ({low} to {high})"


def _three(seconds: float) -> str:
    """Milliseconds with three significant digits, never in powers of ten."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def _notes(c: Costs) -> Iterator[str]:
    yield (
        f"Measured on {c.cpu}, {formatting.plural(c.cpus, 'processor')}, {formatting.plural(c.threads, 'thread')}, torch {c.torch}, in {c.dtype}, one saved run a cell: medians, quartiles in "
        f"brackets ({_counts(c)} repeats). What is compared took turns. On other hardware times differ, and ratios too."
    )
    loads = sorted({_ms(x.base_load) for x in c.cells})
    yield (
        f"Load: from files the system still holds onto a base that is there, until a text can come; the base itself takes {' or '.join(loads)} ms. Switch: between two that are "
        "loaded; where they are merged, one out and another in. Full fine-tuning writes all of its weights to load and to switch."
    )
    if any(x.method == VERA for x in c.cells):
        yield "VeRA's file holds the frozen pair of matrices too, which could be drawn again from its seed."
    if any(x.training_memory for x in c.cells):
        yield "Training memory: peak of the process, libraries and data with it, in a few steps of the cell alone, on the machine of the sweep; one measurement."
    yield from (f"{name}: not measured, as this asks for {why}" for name, why in c.left_out.items())


def _counts(c: Costs) -> str:
    found = {
        t.n for x in c.cells for t in (x.load, x.switch, *(s for ways in x.latency.values() for s in ways.values()))
    }
    return " to ".join(map(str, sorted({min(found), max(found)}))) if found else "no"
