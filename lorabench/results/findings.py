"""What the records say: comparisons with the reference, and the smallest adapter that will do.

Which rate: `results.selection`. How sure: `stats.estimates`. Confirmation runs at the chosen rate alone give test
results; the best adapter is the best on validation by the metric that chose the rates, never the best on test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from lorabench.config.method_names import FULL, HEAD_ONLY
from lorabench.results import formatting, scores, units
from lorabench.results.cells import Result, Results, has_same_runs
from lorabench.results.cells import cell_results as measure_cells
from lorabench.results.formatting import Metric
from lorabench.results.sweep import Cell, Sweep
from lorabench.stats import estimates
from lorabench.stats.estimates import Direction, Estimate, Pooled, Size
from lorabench.store.records import Record

Compare = Callable[[str, str], "Comparison | None"]


@dataclass(frozen=True)
class Comparison:
    """Cell minus other, in the primary metric on test."""

    cell: str
    other: str
    estimate: Estimate
    p: float  # adjusted within its family (Holm); unadjusted where it is exploratory
    direction: Direction
    size: Size
    blocked: str | None  # why there is no verdict
    level: float = 0.95  # of the interval shown: higher within a family, by Holm's steps
    exploratory: bool = True  # until it is put into the declared family

    @property
    def interval(self) -> tuple[float, float]:
        return self.estimate.interval(self.level)

    @property
    def bounded(self) -> bool:
        """Whether there is an interval to speak of: of one seed it would leave the seed out."""
        return self.estimate.seeds > 1

    def turned(self) -> Comparison:
        """Other minus cell."""
        ways: dict[Direction, Direction] = {"better": "worse", "worse": "better"}
        way, e = ways.get(self.direction, self.direction), self.estimate
        return replace(self, cell=self.other, other=self.cell, estimate=replace(e, mean=-e.mean), direction=way)


@dataclass(frozen=True)
class Recommendation:
    """Fixed sequence: from the largest adapter down, non-inferior to the reference at each step, first failure
    stops."""

    cell: str | None  # None where no adapter passed, or where the first step had too few runs for a verdict
    reference: str
    passed: tuple[str, ...]
    stopped: Comparison | None  # the first that was not shown to be within the margin
    skipped: tuple[str, ...] = ()  # shares no seed, or no test examples, with the reference


@dataclass(frozen=True)
class Findings:
    sweep: Sweep
    metric: Metric
    results: Mapping[str, Result]
    pooled: Pooled | None
    reference: str | None
    versus: Mapping[str, Comparison]  # by cell: against the reference
    best: str | None  # adapter cell that is best on validation
    controls: Mapping[str, Comparison]  # best adapter against "head only" and "full", where they are
    recommendation: Recommendation | None
    compare: Compare = field(repr=False)  # any two cells, exploratory
    seeds: tuple[int, ...]  # whose variance is pooled

    def cell_records(self) -> Iterator[tuple[Result, Record]]:
        """Give each cell's result with each record of its runs, by seed, then run_id. A run in two cells comes
        twice."""
        for result in self.results.values():
            for record in self.sweep.records_of((*result.cell.tune, *result.cell.confirm)):
                yield result, record

    @property
    def confirmed(self) -> bool:
        return any(r.test is not None for r in self.results.values())

    @property
    def alone(self) -> bool:
        """One cell has a test result and no other does."""
        return _is_only_one_tested(self.results)


def find(sweep: Sweep) -> Findings:
    measured = measure_cells(sweep)
    results, pooled = measured.by_cell, measured.pooled
    metric = units.primary_metric(sweep, (r.val for r in results.values()))
    compare = _comparer(measured, sweep)
    reference = _reference(sweep, results)
    versus = _against_reference(compare, reference, list(results), sweep.study.get("family")) if reference else {}
    best = _best([r for r in results.values() if r.cell.adapter])
    controls = {}
    for method in (HEAD_ONLY, FULL):
        other = _control(results, method, best)
        if best and other and (found := _pair_in_family(versus, reference, best, other) or compare(best, other)):
            controls[method] = found
    recommendation = _recommend(results, compare, reference, sweep) if reference else None
    return Findings(
        sweep, metric, results, pooled, reference, versus, best, controls, recommendation, compare, measured.seeds
    )


def _comparer(measured: Results, sweep: Sweep) -> Compare:
    results, pooled = measured.by_cell, measured.pooled

    def compare(cell: str, other: str) -> Comparison | None:
        a, b = results[cell], results[other]
        if a.sample is None or b.sample is None or has_same_runs(a, b):
            return None
        made = scores.difference(a.sample, b.sample)
        if made is None:
            return None
        # Methods may differ in their seed noise, so the pooled variance serves adapter against adapter only.
        shared = pooled and a.cell.adapter and b.cell.adapter and made.seeds == measured.seeds
        e = made.estimate((pooled.difference, pooled.df) if pooled and shared else None)
        blocked = _why_no_verdict(a, b, e)
        p = e.p_value()
        way: Direction = "not resolved"
        size: Size = "not resolved"
        if not blocked:
            way, size = (
                estimates.direction(e, p=p, lower_is_better=sweep.lower_is_better),
                estimates.size(e, sweep.margin),
            )
        return Comparison(cell, other, e, p, way, size, blocked)

    return compare


def _why_no_verdict(a: Result, b: Result, e: Estimate) -> str | None:
    for r in (a, b):
        if r.lost:
            return f"{formatting.plural(r.lost, 'confirmation run')} of {r.name} did not survive"
    if not e.allows_verdict:
        return f"{formatting.plural(e.seeds, 'seed')} in common, a verdict takes three"
    return NO_SPREAD if e.variance == 0 else None


NO_SPREAD = "the difference is the same for every seed and every test example known, so nothing says how sure it is"


def _against_reference(
    compare: Compare, reference: str, cells: Sequence[str], declared: Sequence[str] | None
) -> dict[str, Comparison]:
    """Every cell against the one reference; directions in the family by Holm's adjusted p, the others exploratory."""
    found = {c: made for c in cells if (made := compare(c, reference))}
    family = {c: replace(made, exploratory=False) for c, made in found.items() if declared is None or c in declared}
    judged = [c for c, made in family.items() if not made.blocked]
    ps = [family[c].p for c in judged]
    for cell, p, level in zip(judged, estimates.holm(ps), estimates.holm_levels(ps), strict=True):
        way: Direction = family[cell].direction if p < 0.05 else "not resolved"
        family[cell] = replace(family[cell], p=p, direction=way, level=level)
    return found | family


def _pair_in_family(
    versus: Mapping[str, Comparison], reference: str | None, cell: str, other: str
) -> Comparison | None:
    """A pair as the family has it, whichever of the two is the reference; None for any other pair."""
    if other == reference:
        return versus.get(cell)
    return versus[other].turned() if cell == reference and other in versus else None


def _reference(sweep: Sweep, results: Mapping[str, Result]) -> str | None:
    """Return the cell that others are compared with: the declared one, else the largest rank, else full, else the
    first.

    Where ranks tie it is the one of most parameters, then of most training data.
    """
    declared = sweep.study.get("reference")
    if declared in results:
        return str(declared)
    have = [r for r in results.values() if r.test is not None] or [r for r in results.values() if r.runs]
    adapters = [r for r in have if r.cell.adapter]
    if adapters:
        most = max(adapters, key=lambda r: (r.cell.r or 0, r.cell.trainable or 0, r.resource("train_examples") or 0))
        return most.id  # the first of equals
    full = [r.id for r in have if r.cell.method == FULL]
    return full[0] if full else have[0].id if have else None


def _best(results: Sequence[Result]) -> str | None:
    """By the selection metric on validation; confirmed cells only where there are any. A tie goes to fewer
    parameters."""
    confirmed = [r for r in results if r.role == "confirm"]
    found = [r for r in confirmed or results if r.val_selection is not None and r.runs]
    return min(found, key=lambda r: (r.val_selection, r.cell.trainable or 0, r.id)).id if found else None


def _control(results: Mapping[str, Result], method: str, best: str | None) -> str | None:
    """The cell of a method without adapters, under the conditions of the best adapter."""
    found = [r for r in results.values() if r.cell.method == method and r.runs]
    return _best([r for r in found if best and _has_same_conditions(r.cell.conditions, results[best].cell.conditions)])


def _is_only_one_tested(results: Mapping[str, Result]) -> bool:
    return sum(r.test is not None for r in results.values()) == 1


def _recommend(results: Mapping[str, Result], compare: Compare, reference: str, sweep: Sweep) -> Recommendation | None:
    if results[reference].test is None or _is_only_one_tested(results):  # nothing to choose from
        return None
    passed: list[str] = []
    skipped: list[str] = []
    stopped = None
    family = sweep.study.get("family")
    allowed = [
        r.cell for r in results.values() if r.test is not None and (family is None or r.id in (reference, *family))
    ]
    for cell in ladder(allowed, results[reference].cell):
        if cell.id == reference:
            passed.append(cell.id)
            continue
        found = compare(cell.id, reference)
        if found is None:
            skipped += [] if has_same_runs(results[cell.id], results[reference]) else [cell.id]
            continue
        if found.blocked or not estimates.non_inferior(
            found.estimate, sweep.margin, lower_is_better=sweep.lower_is_better
        ):
            stopped = found
            break
        passed.append(cell.id)
    if passed == [reference] and stopped and stopped.blocked:
        return Recommendation(None, reference, (reference,), stopped, tuple(skipped))
    return Recommendation(passed[-1] if passed else None, reference, tuple(passed), stopped, tuple(skipped))


def ladder(cells: Sequence[Cell], reference: Cell) -> list[Cell]:
    """The fixed sequence: the reference's own series by rank where that has ranks, else all smaller adapters under its
    conditions, by size; downwards."""
    series = [c for c in cells if c.adapter and c.series == reference.series and (c.r or 0) <= (reference.r or 0)]
    if len({c.r for c in series}) > 1:
        return sorted(series, key=lambda c: (-(c.r or 0), c.id))
    every = [c for c in cells if c.adapter and _has_same_conditions(c.conditions, reference.conditions)]
    if reference.adapter:  # what is no smaller than the reference is not on the way down
        every = [c for c in every if c.id == reference.id or _is_smaller(c, reference)]
    return sorted(every, key=lambda c: (-(c.trainable or 0), -(c.r or 0), c.id != reference.id, c.id))


def _is_smaller(cell: Cell, reference: Cell) -> bool:
    """By parameters; where a source does not say them (results of other tools) by rank, on the same layers."""
    if cell.trainable and reference.trainable:
        return cell.trainable < reference.trainable
    alike = (cell.method, cell.targets) == (reference.method, reference.targets)
    return alike and (cell.r or 0) < (reference.r or 0)


def _has_same_conditions(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether two have one value wherever both have one."""
    return all(a[k] == b[k] for k in a.keys() & b.keys())


def majority_baseline(f: Findings) -> tuple[str, float] | None:
    """The commonest label and its share, where no cell's accuracy is above what always answering it would give.

    Of the test examples in a confirmed sweep, else of those validated on; None for other metrics and where records do
    not count their labels.
    """
    split = "test" if f.confirmed else "val"
    runs = {r.id: [x for x in r.runs if f"{split}/accuracy" in x.metrics] for r in f.results.values()}
    first = next((found[0] for found in runs.values() if found), None)
    told = first.provenance.get("data_notes") if first else None
    for key in (split, "labels"):
        told = told.get(key) if isinstance(told, dict) else None
    labels = {k: n for k, n in told.items() if isinstance(n, int) and n > 0} if isinstance(told, dict) else {}
    if f.sweep.metric != "accuracy" or not labels or any(dict(r.cell.conditions) for r in f.results.values()):
        return None
    name = max(sorted(labels), key=lambda label: labels[label])
    share = labels[name] / sum(labels.values())
    best = max(fmean(float(x.metrics[f"{split}/accuracy"]) for x in found) for found in runs.values() if found)
    return (name, share) if best <= share + 1e-9 else None
