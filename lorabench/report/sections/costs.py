"""What adapters cost to keep and to serve, as `python -m lorabench.costs` measured it: read, and as a table. No torch.

<sweep dir>/analysis/costs.json:
    {"schema": 1,
     "setting": {"machine": {"cpu", "cpus", ...}, "threads", "torch", "dtype", "tokens"},
     "cells": {id: {"order", "name", "run", "bytes", "base_bytes", "load": spread, "switch": spread,
                    "merge": spread or null, "training_memory", ...,
                    "latency": {"1": {"plain": spread, "merged": .., "served": .., "ratio": ..}, "32": ..}}},
     "left_out": {cell: reason}}
    A spread is {"median", "low", "high" (quartiles), "n"}, in seconds but for ratios.
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
    """What one saved run of a cell costs, in seconds and bytes."""

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
    """What was measured on one machine, cells in the order of the report's tables."""

    cpu: str
    cpus: int
    threads: int
    torch: str
    dtype: str
    tokens: int
    cells: tuple[CellCosts, ...]
    left_out: Mapping[str, str]  # name of a cell -> why it was not measured

    @property
    def full_memory(self) -> int | None:
        """Peak memory of full fine-tuning, in bytes."""
        return next((c.training_memory for c in self.cells if c.method == FULL), None)


def read(root: Path) -> Costs | None:
    """Read what was measured on a sweep; None where nothing was. root: the sweep's directory.

    Raises `ConfigError` for a file that holds no costs.
    """
    try:
        doc = COSTS_FILE.read(root)
        return None if doc is None else parse(doc)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        why = f"what `python -m lorabench.costs` writes ({type(e).__name__}: {e}); measure again"
        raise ConfigError("costs", str(COSTS_FILE.path(root)), why) from e


def parse(doc: Mapping[str, Any]) -> Costs:
    """Return the file's content, typed. Raises KeyError, TypeError, ValueError or AttributeError for what is none."""
    setting = doc["setting"]
    return Costs(
        cpu=str(setting["machine"]["cpu"]),
        cpus=int(setting["machine"]["cpus"]),
        threads=int(setting["threads"]),
        torch=str(setting["torch"]),
        dtype=str(setting["dtype"]),
        tokens=int(setting["tokens"]),
        cells=tuple(map(_cell, sorted(doc["cells"].values(), key=lambda x: x["order"]))),
        left_out=dict(doc["left_out"]),
    )


def _cell(x: Mapping[str, Any]) -> CellCosts:
    latency = {int(b): {way: _spread(t) for way, t in ways.items()} for b, ways in x["latency"].items()}
    memory = x["training_memory"]
    return CellCosts(
        name=str(x["name"]),
        method=str(x["method"]),
        run=str(x["run"]),
        bytes=int(x["bytes"]),
        base_bytes=int(x["base_bytes"]),
        base_load=_spread(x["base_load"]),
        load=_spread(x["load"]),
        switch=_spread(x["switch"]),
        merge=None if x["merge"] is None else _spread(x["merge"]),
        latency=dict(sorted(latency.items())),
        training_memory=None if memory is None else int(memory),
    )


def _spread(x: Mapping[str, Any]) -> Spread:
    return Spread(float(x["median"]), float(x["low"]), float(x["high"]), int(x["n"]))


# -- tables ----------------------------------------------------------------------------------------------------------


def tables(c: Costs) -> list[Table]:
    """Return what it costs to keep, to load and to switch; and latency. A row a cell."""
    return [_keeping_table(c), _latency_table(c)]


def _keeping_table(c: Costs) -> Table:
    columns = (
        Column("cell", "cell"),
        Column("bytes", "on disk (of base)", "right"),
        Column("load", "load ms", "right"),
        Column("switch", "switch ms", "right"),
        Column("merge", "merged: switch ms", "right"),
        Column("memory", "training memory (of full)", "right"),
    )
    rows = tuple(_keeping_row(x, c.full_memory) for x in c.cells)
    return Table("costs", "What it costs to keep and to serve", columns, rows, tuple(_notes(c)))


def _keeping_row(x: CellCosts, full_memory: int | None) -> Row:
    size = f"{_size(x.bytes)} ({formatting.share(x.bytes, x.base_bytes)})"
    memory = formatting.memory(x.training_memory)
    if full_memory and x.training_memory is not None:
        memory += f" ({formatting.share(x.training_memory, full_memory)})"
    return Row((x.name, size, _ms(x.load), _ms(x.switch), _ms(x.merge), memory), (x.run,))


def _latency_table(c: Costs) -> Table:
    batches = sorted({batch for x in c.cells for batch in x.latency})
    kinds = {"served": "unmerged ms", "merged": "merged ms", "ratio": "ratio"}
    measured = [Column(f"{key}{b}", f"batch {b}: {kinds[key]}", "right") for b in batches for key in kinds]
    rows = []
    for x in c.cells:
        spreads = ((key, x.latency.get(b, {}).get(key)) for b in batches for key in kinds)
        rows.append(Row((x.name, *(_ratio(s) if key == "ratio" else _ms(s) for key, s in spreads)), (x.run,)))
    note = (
        f"One forward pass over texts of {c.tokens} tokens without padding, no generation. "
        "Ratio: unmerged over merged in one round. Merged weights are a plain base's, and so is full fine-tuning. "
        "Medians and quartiles, on the machine named above."
    )
    columns = (Column("cell", "cell"), *measured)
    return Table("latency", "Latency, unmerged and merged", columns, tuple(rows), (note,))


def _size(n: int) -> str:
    """Return KiB below a MiB; a decimal below 100 MiB."""
    if n < 2**20:
        return f"{n / 2**10:,.1f} KiB"
    return f"{n / 2**20:.1f} MiB" if n < 100 * 2**20 else formatting.memory(n)


def _ms(t: Spread | None) -> str:
    """Return median and quartiles in milliseconds."""
    if t is None:
        return formatting.DASH
    return f"{_three_digits(t.median)} ({_three_digits(t.low)} to {_three_digits(t.high)})"


def _ratio(t: Spread | None) -> str:
    """Return median and quartiles of a ratio."""
    return formatting.DASH if t is None else f"{t.median:.2f} ({t.low:.2f} to {t.high:.2f})"


def _three_digits(seconds: float) -> str:
    """Return milliseconds with three significant digits, never in powers of ten."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def _notes(c: Costs) -> Iterator[str]:
    machine = f"{c.cpu}, {formatting.plural(c.cpus, 'processor')}, {formatting.plural(c.threads, 'thread')}"
    yield (
        f"Measured on {machine}, torch {c.torch}, in {c.dtype}, one saved run a cell: "
        f"medians, quartiles in brackets ({_repeats(c)} repeats). What is compared took turns. "
        "On other hardware times differ, and ratios too."
    )
    loads = " or ".join(sorted({_ms(x.base_load) for x in c.cells}))
    yield (
        "Load: from files the system still holds onto a base that is there, until a text can come; "
        f"the base itself takes {loads} ms. "
        "Switch: between two that are loaded; where they are merged, one out and another in. "
        "Full fine-tuning writes all of its weights to load and to switch."
    )
    if any(x.method == VERA for x in c.cells):
        yield "VeRA's file holds the frozen pair of matrices too, which could be drawn again from its seed."
    if any(x.training_memory for x in c.cells):
        yield (
            "Training memory: peak of the process, libraries and data with it, in a few steps of the cell alone, "
            "on the machine of the sweep; one measurement."
        )
    yield from (f"{name}: not measured, as this asks for {why}" for name, why in c.left_out.items())


def _repeats(c: Costs) -> str:
    latencies = (s for x in c.cells for ways in x.latency.values() for s in ways.values())
    counts = {s.n for s in (*(s for x in c.cells for s in (x.load, x.switch)), *latencies)}
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "no"
