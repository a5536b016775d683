"""Differences between cells on test: each pair, and the family of comparisons with the one reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lorabench.results import formatting
from lorabench.results.cells import Result, Results, has_same_runs
from lorabench.results.sweep import Sweep
from lorabench.stats import estimates
from lorabench.stats.estimates import Direction, Estimate, Size

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


def comparer(measured: Results, sweep: Sweep) -> Compare:
    """Return the function that compares any two cells; None where they are the same runs or have no seed in common."""
    results = measured.by_cell

    def compare(cell: str, other: str) -> Comparison | None:
        a, b = results[cell], results[other]
        if has_same_runs(a, b):
            return None
        e = measured.difference(a, b)
        if e is None:
            return None
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


def compare_with_reference(
    compare: Compare, reference: str, cells: Sequence[str], declared: Sequence[str] | None, margin: float
) -> dict[str, Comparison]:
    """Every cell against the one reference; directions in the family by Holm's adjusted p, the others exploratory."""
    found = {c: made for c in cells if (made := compare(c, reference))}
    family = {c: replace(made, exploratory=False) for c, made in found.items() if declared is None or c in declared}
    judged = [c for c, made in family.items() if not made.blocked]
    ps = [family[c].p for c in judged]
    for cell, p, level in zip(judged, estimates.holm(ps), estimates.holm_levels(ps), strict=True):
        way: Direction = family[cell].direction if p < 0.05 else "not resolved"
        extent = estimates.size(family[cell].estimate, margin, level)
        family[cell] = replace(family[cell], p=p, direction=way, size=extent, level=level)
    return found | family
