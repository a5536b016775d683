"""One result a cell: the runs its numbers come from, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

import numpy as np

from lorabench.config.errors import ConfigError
from lorabench.results import scores
from lorabench.results.scores import Sample
from lorabench.results.selection import Choice
from lorabench.results.sweep import Cell, Sweep
from lorabench.stats import estimates
from lorabench.stats.estimates import Estimate, Typical
from lorabench.store.records import Record

MIN_TYPICAL_CELLS = 4  # cells that say what is typical of them: one noisy cell of three would move the median


@dataclass(frozen=True)
class Result:
    """One cell: the runs its numbers come from, and the numbers."""

    cell: Cell
    name: str
    choice: Choice
    lr: float | None
    role: str  # of `runs`: confirm, or tune where nothing is confirmed
    runs: tuple[Record, ...]  # completed, at `lr`
    lost: int  # confirmation runs at `lr` that diverged or failed
    stale: int  # confirmation runs at a rate that is no longer the chosen one
    sample: Sample | None
    test: Estimate | None
    val: float | None  # primary metric on validation, mean over `runs`
    val_loss: float | None
    tuned: float | None  # of the tuning runs at `lr`: the metric that chose it, its sign turned where more is better

    @property
    def id(self) -> str:
        return self.cell.id

    def resource(self, name: str) -> float | None:
        """Mean over the runs that recorded it."""
        found = [float(r.resources[name]) for r in self.runs if r.resources.get(name) is not None]
        return fmean(found) if found else None

    @property
    def timed(self) -> Mapping[str, Any]:
        """What was measured of this cell alone, as far as that is what its runs do."""
        return usable_timing(self.cell.solo, self.runs)

    @property
    def solo(self) -> bool:
        """Whether time and memory are of this cell alone: measured so, or its runs had their base to themselves."""
        alone = bool(self.timed) or self.resource("solo_seconds") is not None
        return alone or bool(self.runs) and all(r.resources.get("pack_size") == 1 for r in self.runs)

    @property
    def seconds(self) -> float | None:
        """Training time of a run: alone, from a few steps scaled by tokens (steps where none are counted) and the
        frozen trunk's one pass; else its share."""
        own, timed = self.resource("solo_seconds"), self.timed
        if own is not None or not timed.get("seconds"):
            return own if own is not None else self.resource("train_seconds")
        for unit in ("tokens", "steps"):
            whole, part = self.resource(unit), timed.get(unit)
            if whole and part:
                return float(timed["seconds"]) * whole / part + float(timed.get("trunk_seconds") or 0.0)
        return self.resource("train_seconds")

    @property
    def memory(self) -> float | None:
        return (
            self.timed.get("peak_memory_bytes")
            or self.resource("solo_peak_memory_bytes")
            or self.resource("peak_memory_bytes")
        )


def usable_timing(solo: Mapping[str, Any] | None, runs: Iterable[Record]) -> Mapping[str, Any]:
    """A cell's measurement alone; empty where its runs were served a frozen trunk's output and the measurement, by an
    older version, was not: it computed in every step what a run computes once."""
    solo = solo or {}
    stale = "reused_blocks" not in solo and any(r.provenance.get("reused_blocks") for r in runs)
    return {} if stale else solo


def cells_with_timing(manifest: Mapping[str, Any], records: Mapping[str, Record]) -> set[str]:
    """Cells that need not be measured alone again. records: of runs that ended well, by run_id."""
    cells = manifest["cells"]
    runs = {c["id"]: [records[i] for ids in c["runs"].values() for i in ids if i in records] for c in cells}
    return {c["id"] for c in cells if usable_timing(c.get("solo"), runs[c["id"]])}


@dataclass(frozen=True)
class Scatter:
    """How far seeds scatter in the adapter cells of one condition that have these seeds."""

    seeds: tuple[int, ...]
    cells: int
    typical: Typical


@dataclass(frozen=True)
class Results:
    """All cells, in the order of tables. scatter: by cell id, of the adapters that have seeds and condition in common.

    Methods may differ in their seed noise, and so may sizes of data: what is typical of adapters under one condition
    serves no other cell.
    """

    by_cell: dict[str, Result]
    scatter: Mapping[str, Scatter]

    def difference(self, a: Result, b: Result) -> Estimate | None:
        """Return a - b in the primary metric on test; None without a seed in common, or over other examples."""
        paired = scores.difference(a.sample, b.sample) if a.sample and b.sample else None
        if paired is None:
            return None
        shared = self.scatter.get(a.id)
        if shared is None or shared is not self.scatter.get(b.id):
            return paired.estimate()
        return paired.estimate(shared.typical.difference)


def cell_results(sweep: Sweep) -> Results:
    """Return every cell's result, with what its seeds' scatter is compared with."""
    untested = {c.id: _result(sweep, c) for c in sweep.cells}
    scatter = _scatter(list(untested.values()))
    return Results({i: _with_test(r, scatter.get(i)) for i, r in untested.items()}, scatter)


def _result(sweep: Sweep, cell: Cell) -> Result:
    choice = sweep.choices[cell.id]
    confirm = sweep.records_of(cell.confirm)
    lr = choice.lr if choice.rates else _untuned_rate(sweep, confirm)
    here = [r for r in confirm if r.config["optimizer"]["lr"] == lr]
    done = [r for r in here if r.status == "completed"]
    role = "confirm" if done else "tune"
    if not done:
        done = [r for r in sweep.completed_records(cell.tune) if r.config["optimizer"]["lr"] == lr]
    chosen = next((rate.score for rate in choice.rates if rate.lr == choice.lr), None)
    return Result(
        cell,
        sweep.names[cell.id],
        choice,
        lr,
        role,
        tuple(done),
        sum(r.status in ("failed", "diverged") for r in here),
        len(confirm) - len(here),
        scores.sample(done, sweep.store, sweep.metric) if role == "confirm" else None,
        None,
        _mean(done, f"val/{sweep.metric}"),
        _mean(done, "val/loss"),
        None if chosen is None else sweep.worse(chosen),
    )


def _untuned_rate(sweep: Sweep, records: Sequence[Record]) -> float | None:
    """The rate of confirmation runs that no tuning preceded: of most runs; among equals the best on validation, then
    the least."""
    by_rate: dict[float, list[Record]] = {}
    for r in records:
        by_rate.setdefault(float(r.config["optimizer"]["lr"]), []).append(r)

    def worth(lr: float) -> tuple[int, float]:
        found = _mean(by_rate[lr], f"val/{sweep.selection}")
        return len(by_rate[lr]), -math.inf if found is None else -sweep.worse(found)

    return max(sorted(by_rate), key=worth, default=None)


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [float(r.metrics[name]) for r in records if r.metrics.get(name) is not None]
    return fmean(values) if values else None


def has_same_runs(a: Result, b: Result) -> bool:
    """One cell under two names: two rules of alpha list the same runs where they meet."""
    return _run_ids(a) == _run_ids(b)


def unique_results(results: Sequence[Result]) -> list[Result]:
    """The first of those that are the same runs."""
    found: dict[Any, Result] = {}
    for r in results:
        found.setdefault(_run_ids(r), r)
    return list(found.values())


def _run_ids(r: Result) -> Any:
    return frozenset(x.run_id for x in r.runs) or r.id


def _with_test(r: Result, scatter: Scatter | None) -> Result:
    if r.sample is None:
        return r
    return replace(r, test=r.sample.estimate(scatter.typical.within if scatter else None))


def _scatter(results: Sequence[Result]) -> dict[str, Scatter]:
    """Return what is typical of adapter cells with one set of seeds under one condition, where they are enough."""
    groups: dict[Any, list[Result]] = {}
    for r in results:
        if r.cell.adapter and r.sample is not None and len(r.sample.seeds) > 1:
            groups.setdefault((r.sample.seeds, tuple(sorted(r.cell.conditions.items()))), []).append(r)
    found: dict[str, Scatter] = {}
    for (seeds, _), members in groups.items():
        values = [r.sample.scores for r in unique_results(members) if r.sample is not None]
        if len(values) >= MIN_TYPICAL_CELLS:
            scatter = Scatter(seeds, len(values), estimates.typical_variances(np.stack(values)))
            found |= {r.id: scatter for r in members}
    return found


def select_cells(every: Mapping[str, Result], patterns: Sequence[str]) -> dict[str, Result]:
    """Those that a pattern matches. Raises `ConfigError` for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(i, pattern) for i in every):
            raise ConfigError("--cells", pattern, f"cells of this sweep: {', '.join(every)}")
    return {i: r for i, r in every.items() if not patterns or any(fnmatchcase(i, p) for p in patterns)}
