"""What the records say: one result a cell, comparisons with the reference, and the smallest adapter that will do.

Which rate: `select`. How sure: `statistics`. Confirmation runs at the chosen rate alone give test results; the best
adapter is the one with the best validation loss, never the best on test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from lorabench.records import Record
from lorabench.report import formats, measure
from lorabench.report import statistics as st
from lorabench.report.load import Cell, Sweep
from lorabench.report.select import Choice

POOL_FROM = 3  # cells; two would gain no degree of freedom
HOMOGENEOUS = 0.10  # Bartlett's p below which seed variances are not pooled


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
    sample: measure.Sample | None
    test: st.Estimate | None
    val: float | None  # primary metric on validation, mean over `runs`
    val_loss: float | None

    @property
    def id(self) -> str:
        return self.cell.id

    def resource(self, name: str) -> float | None:
        """Mean over the runs that recorded it."""
        found = [float(r.resources[name]) for r in self.runs if r.resources.get(name) is not None]
        return fmean(found) if found else None

    @property
    def solo(self) -> bool:
        """Whether time and memory are of this cell alone: measured so, or its runs had their base to themselves."""
        return self.resource("solo_seconds") is not None or all(r.resources.get("pack_size") == 1 for r in self.runs)

    @property
    def seconds(self) -> float | None:
        return self.resource("solo_seconds") or self.resource("train_seconds")

    @property
    def memory(self) -> float | None:
        return self.resource("solo_peak_memory_bytes") or self.resource("peak_memory_bytes")


@dataclass(frozen=True)
class Comparison:
    """Cell minus other, in the primary metric on test."""

    cell: str
    other: str
    estimate: st.Estimate
    p: float  # adjusted within its family (Holm); unadjusted where it is exploratory
    direction: st.Direction
    size: st.Size
    blocked: str | None  # why there is no verdict


@dataclass(frozen=True)
class Recommendation:
    """Fixed sequence: from the largest adapter down, non-inferior to the reference at each step, first failure stops."""

    cell: str | None
    reference: str
    passed: tuple[str, ...]
    stopped: Comparison | None  # the first that was not shown to be within the margin


@dataclass(frozen=True)
class Findings:
    sweep: Sweep
    metric: formats.Metric
    results: Mapping[str, Result]
    pooled: st.Pooled | None
    reference: str | None
    versus: Mapping[str, Comparison]  # by cell: against the reference
    best: str | None  # adapter cell with the best validation loss
    controls: Mapping[str, Comparison]  # best adapter against "head only" and "full", where they are
    recommendation: Recommendation | None

    @property
    def confirmed(self) -> bool:
        return any(r.test is not None for r in self.results.values())


def find(sweep: Sweep) -> Findings:
    results = {c.id: _result(sweep, c) for c in sweep.cells}
    pooled, seeds = _pool(list(results.values()))
    results = {i: _with_test(r, pooled, seeds) for i, r in results.items()}
    shown = [abs(r.val) for r in results.values() if r.val is not None]
    metric = formats.metric(sweep.metric, lower_is_better=sweep.lower_is_better, largest=max(shown, default=None))
    compare = _comparer(results, pooled, seeds, sweep)
    reference = _reference(sweep, results)
    versus = _family(compare, reference, list(results)) if reference else {}
    best = _best([r for r in results.values() if r.cell.adapter])
    controls = {}
    for method in ("head only", "full"):
        other = _control(results, method, best)
        if best and other and (found := compare(best, other)):
            controls[method] = found
    recommendation = _recommend(results, compare, reference, sweep) if reference else None
    return Findings(sweep, metric, results, pooled, reference, versus, best, controls, recommendation)


# -- one cell ------------------------------------------------------------------------------------------------------------


def _result(sweep: Sweep, cell: Cell) -> Result:
    choice = sweep.choices[cell.id]
    confirm = sweep.ended(cell.confirm)
    lr = choice.lr if choice.rates else _commonest_rate(confirm)
    here = [r for r in confirm if r.config["optimizer"]["lr"] == lr]
    done = [r for r in here if r.status == "completed"]
    role = "confirm" if done else "tune"
    if not done:
        done = [r for r in sweep.done(cell.tune) if r.config["optimizer"]["lr"] == lr]
    return Result(
        cell, sweep.names[cell.id], choice, lr, role, tuple(done), sum(r.status in ("failed", "diverged") for r in here),
        len(confirm) - len(here), measure.sample(done, sweep.store, sweep.metric) if role == "confirm" else None, None,
        _mean(done, f"val/{sweep.metric}"), _mean(done, "val/loss"),
    )  # fmt: skip


def _commonest_rate(records: Sequence[Record]) -> float | None:
    """The rate of confirmation runs that no tuning preceded."""
    rates = [float(r.config["optimizer"]["lr"]) for r in records]
    return max(sorted(set(rates)), key=rates.count) if rates else None


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [float(r.metrics[name]) for r in records if r.metrics.get(name) is not None]
    return fmean(values) if values else None


def _with_test(r: Result, pooled: st.Pooled | None, seeds: tuple[int, ...]) -> Result:
    if r.sample is None:
        return r
    shared = (pooled.within, pooled.df) if pooled and r.cell.adapter and r.sample.seeds == seeds else None
    return replace(r, test=r.sample.estimate(shared))


def _pool(results: Sequence[Result]) -> tuple[st.Pooled | None, tuple[int, ...]]:
    """Seed variance over the adapter cells that share the commonest set of seeds, if it looks the same in all of them."""
    samples = [r.sample for r in results if r.cell.adapter and r.sample is not None and len(r.sample.seeds) > 1]
    sets = [s.seeds for s in samples]
    if not sets:
        return None, ()
    seeds = max(sorted(set(sets)), key=sets.count)
    scores = [s.scores for s in samples if s.seeds == seeds]
    if len(scores) < POOL_FROM:
        return None, seeds
    pooled = st.pool(np.stack(scores))
    return (pooled if pooled.p >= HOMOGENEOUS else None), seeds


# -- comparisons ---------------------------------------------------------------------------------------------------------

Compare = Callable[[str, str], Comparison | None]


def _comparer(results: Mapping[str, Result], pooled: st.Pooled | None, seeds: tuple[int, ...], sweep: Sweep) -> Compare:
    def compare(cell: str, other: str) -> Comparison | None:
        a, b = results[cell], results[other]
        if a.sample is None or b.sample is None or cell == other:
            return None
        made = measure.difference(a.sample, b.sample)
        if made is None:
            return None
        # Methods may differ in their seed noise, so the pooled variance serves adapter against adapter only.
        shared = pooled and a.cell.adapter and b.cell.adapter and made.seeds == seeds
        e = made.estimate((pooled.difference, pooled.df) if pooled and shared else None)
        blocked = _blocked(a, b, e)
        p = e.p_value()
        way: st.Direction = "not resolved"
        size: st.Size = "not resolved"
        if not blocked:
            way, size = st.direction(e, p=p, lower_is_better=sweep.lower_is_better), st.size(e, sweep.margin)
        return Comparison(cell, other, e, p, way, size, blocked)

    return compare


def _blocked(a: Result, b: Result, e: st.Estimate) -> str | None:
    for r in (a, b):
        if r.lost:
            return f"{formats.plural(r.lost, 'confirmation run')} of {r.name} did not survive"
    if not e.verdicts:
        return f"{formats.plural(e.seeds, 'seed')} in common: no verdict below three"
    return None


def _family(compare: Compare, reference: str, cells: Sequence[str]) -> dict[str, Comparison]:
    """Every cell against the one reference; directions by Holm's adjusted p."""
    found = {c: made for c in cells if (made := compare(c, reference))}
    judged = [c for c, made in found.items() if not made.blocked]
    for cell, p in zip(judged, st.holm([found[c].p for c in judged]), strict=True):
        way: st.Direction = found[cell].direction if p < 0.05 else "not resolved"
        found[cell] = replace(found[cell], p=p, direction=way)
    return found


def _reference(sweep: Sweep, results: Mapping[str, Result]) -> str | None:
    """As declared; else the adapter of the largest rank (of most parameters where ranks tie), else full, else the first."""
    declared = sweep.study.get("reference")
    if declared in results:
        return str(declared)
    have = [r for r in results.values() if r.runs]
    adapters = [r for r in have if r.cell.adapter]
    if adapters:
        return max(adapters, key=lambda r: (r.cell.r or 0, r.cell.trainable or 0)).id  # the first of equals
    full = [r.id for r in have if r.cell.method == "full"]
    return full[0] if full else have[0].id if have else None


def _best(results: Sequence[Result]) -> str | None:
    """By validation loss; confirmed cells only where there are any. A tie goes to fewer parameters."""
    confirmed = [r for r in results if r.role == "confirm"]
    found = [r for r in confirmed or results if r.val_loss is not None and r.runs]
    return min(found, key=lambda r: (r.val_loss, r.cell.trainable or 0, r.id)).id if found else None


def _control(results: Mapping[str, Result], method: str, best: str | None) -> str | None:
    """The cell of a method without adapters, under the conditions of the best adapter where there are several."""
    found = [r for r in results.values() if r.cell.method == method and r.runs]
    alike = [r for r in found if best and r.cell.extra == results[best].cell.extra]
    return _best(alike or found)


def _recommend(results: Mapping[str, Result], compare: Compare, reference: str, sweep: Sweep) -> Recommendation | None:
    if results[reference].test is None:
        return None
    passed: list[str] = []
    stopped = None
    for cell in ladder([r.cell for r in results.values() if r.test is not None], results[reference].cell):
        if cell.id == reference:
            passed.append(cell.id)
            continue
        found = compare(cell.id, reference)
        if found is None:
            continue
        if found.blocked or not st.non_inferior(found.estimate, sweep.margin, lower_is_better=sweep.lower_is_better):
            stopped = found
            break
        passed.append(cell.id)
    return Recommendation(passed[-1] if passed else None, reference, tuple(passed), stopped)


def ladder(cells: Sequence[Cell], reference: Cell) -> list[Cell]:
    """The fixed sequence: the reference's own series by rank where that has ranks, else all adapters by size; downwards."""
    series = [c for c in cells if c.adapter and c.series == reference.series and (c.r or 0) <= (reference.r or 0)]
    if len({c.r for c in series}) > 1:
        return sorted(series, key=lambda c: (-(c.r or 0), c.id))
    every = [c for c in cells if c.adapter]
    if reference.adapter:  # what is larger than the reference is not on the way down
        every = [c for c in every if (c.trainable or 0) <= (reference.trainable or 0)]
    return sorted(every, key=lambda c: (-(c.trainable or 0), c.id != reference.id, c.id))
