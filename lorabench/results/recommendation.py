"""The reference of a sweep, and the smallest cell that does as well.

Candidates are all cells that train fewer parameters than the reference under its conditions, whatever their method: a
rank of one method is no size of another. One candidate stands for each size, chosen by the tuning runs alone. They are
tested in a fixed sequence, from the largest down, each by one one-sided test at 5 % for falling short of the reference
by less than the margin; the first that is not shown to do so stops the sequence, which keeps the error of the whole at
5 %. A cell that cannot be tested (a lost run, no seed in common) is passed over: it stops nothing but itself.

Where a cell is shown better than the reference, with its error controlled among all comparisons with the reference, the
best of those takes the reference's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorabench.results.cells import Result, has_same_runs
from lorabench.results.comparisons import Compare, Comparison
from lorabench.results.reference import default_reference
from lorabench.results.sweep import Sweep
from lorabench.stats import estimates


@dataclass(frozen=True)
class Recommendation:
    """What the fixed sequence came to."""

    cell: str | None  # the last that passed; None where none did, or where nothing could be tested
    reference: str  # what candidates were tested against
    passed: tuple[str, ...]  # the reference first, where it is an adapter
    stopped: Comparison | None  # the first that was not shown to be within the margin
    skipped: tuple[tuple[str, str], ...] = ()  # cells that could not be tested, and why
    beaten: str | None = None  # the study's reference, where `reference` was shown better than it
    tests: Mapping[str, Comparison] | None = None  # by cell: the test of each candidate that was reached


def choose_reference(sweep: Sweep, results: Mapping[str, Result]) -> str | None:
    """Return the declared reference, else the one noted when the sweep began, else the default among tested cells."""
    for said in (sweep.study.get("reference"), (sweep.manifest.get("frozen") or {}).get("reference")):
        if said in results:
            return str(said)
    tested = [r for r in results.values() if r.test is not None] or [r for r in results.values() if r.runs]
    return default_reference([r.cell for r in tested]).id if tested else None


def recommend(
    sweep: Sweep, results: Mapping[str, Result], compare: Compare, reference: str, versus: Mapping[str, Comparison]
) -> Recommendation | None:
    """Return what the sequence came to; None where there is nothing to choose from."""
    if results[reference].test is None or is_only_one_tested(results):
        return None
    best = _best_shown(sweep, results, reference, versus)
    base = best or reference
    family = sweep.study.get("family")
    allowed = [r for r in results.values() if r.test is not None and (family is None or r.id in (reference, *family))]
    passed = [base] if results[base].cell.adapter or best else []
    skipped: list[tuple[str, str]] = []
    tests: dict[str, Comparison] = {}
    stopped = None
    for r in candidates(allowed, results[base]):
        test = versus.get(r.id) if base == reference else compare(r.id, base)
        if test is None or test.blocked:
            skipped.append((r.id, "shares no seed or no test examples with it" if test is None else str(test.blocked)))
            continue
        tests[r.id] = test
        if not estimates.non_inferior(test.estimate, sweep.margin, lower_is_better=sweep.lower_is_better):
            stopped = test
            break
        passed.append(r.id)
    untested = passed == [reference] and not tests and bool(skipped)
    cell = None if untested or not passed else passed[-1]
    return Recommendation(cell, base, tuple(passed), stopped, tuple(skipped), reference if best else None, tests)


def is_only_one_tested(results: Mapping[str, Result]) -> bool:
    """Whether one cell has a test result and no other does: there is nothing to choose from."""
    return sum(r.test is not None for r in results.values()) == 1


def _best_shown(
    sweep: Sweep, results: Mapping[str, Result], reference: str, versus: Mapping[str, Comparison]
) -> str | None:
    """Return the best on test of the cells that are shown better than the reference within the declared family."""
    conditions = results[reference].cell.conditions
    better = [
        c
        for c, x in versus.items()
        if x.direction == "better"
        and not x.exploratory
        and not x.blocked
        and has_same_conditions(results[c].cell.conditions, conditions)
    ]
    sign = -1 if sweep.lower_is_better else 1
    return max(better, key=lambda c: (sign * versus[c].estimate.mean, c), default=None)


def candidates(results: Iterable[Result], base: Result) -> list[Result]:
    """Return the cells that train fewer parameters than `base` under its conditions, downwards, one of each size."""
    sizes: dict[Any, list[Result]] = {}
    for r in results:
        comparable = has_same_conditions(r.cell.conditions, base.cell.conditions)
        if r.id != base.id and comparable and not has_same_runs(r, base) and is_smaller(r, base):
            sizes.setdefault(r.cell.trainable or ("r", r.cell.r), []).append(r)
    chosen = [min(members, key=lambda r: _by_tuning(r, base)) for members in sizes.values()]
    return sorted(chosen, key=lambda r: (-(r.cell.trainable or 0), -(r.cell.r or 0), r.id))


def _by_tuning(r: Result, base: Result) -> tuple[Any, ...]:
    """A key: the best by its tuning runs first; where nothing was tuned one of the reference's own series."""
    tuned = r.tuned if r.tuned is not None else float("inf")
    return tuned, r.cell.series != base.cell.series, r.id


def is_smaller(r: Result, base: Result) -> bool:
    """Whether a cell trains fewer parameters.

    Where a source does not say how many (results of other tools) by rank, of one method on the same layers.
    """
    a, b = r.cell, base.cell
    if a.trainable and b.trainable:
        return a.trainable < b.trainable
    alike = (a.method, a.targets) == (b.method, b.targets)
    return alike and a.r is not None and b.r is not None and a.r < b.r


def has_same_conditions(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether two have one value wherever both have one."""
    return all(a[k] == b[k] for k in a.keys() & b.keys())
