"""How a cell's best learning rate moves with the rank, under each of the rules that set alpha. Pure, no pictures.

With s = alpha / r and one alpha s * r is constant, with alpha in proportion to r s itself is, under rsLoRA with one
alpha s * sqrt(r) is. Theory's slopes of log best rate on log r are μA's (arXiv 2602.06204) for a drawn A, B = 0 and r
far below the width: 0, -1/2 and -1/4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorabench.results import best_rate
from lorabench.results.best_rate import Missing, Optimum
from lorabench.results.cells import Result
from lorabench.results.evidence import Evidence, Line
from lorabench.results.weights import width
from lorabench.stats.estimates import Estimate

MIN_WIDTH_PER_RANK = 8  # "width much larger than r": r up to a width / 8
MIN_RANKS = 3  # ranks: a slope through two says nothing of whether a line fits


@dataclass(frozen=True)
class Rule:
    """s * r^power is one constant."""

    name: str
    power: float
    theory: float  # slope of log best rate on log r


FIXED = Rule("α fixed", 1.0, 0.0)
PROPORTIONAL = Rule("α in proportion to r", 0.0, -0.5)
ROOT = Rule("rsLoRA, α fixed", 0.5, -0.25)
RULES = (FIXED, PROPORTIONAL, ROOT)


@dataclass(frozen=True)
class Slope:
    """One rule's cells and the slope of their interpolated best rates; `slope` is None where some cell has none."""

    rule: Rule
    line: Line
    optima: tuple[Optimum | Missing, ...]  # of the line's cells
    narrow: Line  # the cells the slope is over: of r far below the width
    slope: float | None
    estimate: Estimate | None  # None where a rate's variance is not known
    missing: Missing | None

    @property
    def constant(self) -> str:
        """`s = 16/r`."""
        over = {1.0: "/r", 0.5: "/√r", 0.0: ""}[self.rule.power]
        return f"s = {self.line.constant:.4g}{over}" + (f", {self.line.under}" if self.line.under else "")


def slopes(e: Evidence) -> list[Slope]:
    """Return for every rule the line of most ranks, where that has three."""
    side = width(e.sweep, e.weights)
    lines = [(rule, next(iter(e.lines(rule.power)), None)) for rule in RULES]
    return [_slope(e, rule, line, side) for rule, line in lines if line is not None and len(line.cells) >= MIN_RANKS]


def _slope(e: Evidence, rule: Rule, line: Line, side: int | None) -> Slope:
    small = narrow_line(line, side)
    optima = tuple(e.optima[r.id] for r in line.cells)
    if len(small.cells) < MIN_RANKS:
        few = Missing(f"{len(small.cells)} of its ranks lie far below the width, {side}", "smaller ranks")
        return Slope(rule, line, optima, small, None, None, few)
    found = e.located(small.cells)
    if isinstance(found, Missing):
        return Slope(rule, line, optima, small, None, None, found)
    return Slope(rule, line, optima, small, *fit(found, small.ranks), None)


def narrow_line(line: Line, side: int | None) -> Line:
    """The line's cells of r far below the width; all where the width is not known."""
    return replace(
        line, cells=tuple(r for r in line.cells if side is None or (r.cell.r or 0) * MIN_WIDTH_PER_RANK <= side)
    )


def fit(found: Sequence[Optimum], ranks: Sequence[int]) -> tuple[float, Estimate | None]:
    """Least-squares slope of log best rate on log r, and with its variance where every rate's is known."""
    weights = best_rate.slope_weights([math.log2(n) for n in ranks])
    return best_rate.contrast_mean(found, weights), best_rate.contrast(found, weights)


def anchors(made: Sequence[Slope]) -> list[tuple[int, float]]:
    """(r, s) of the ranks at which two rules or more have one scale."""
    points: dict[tuple[int, float], int] = {}
    for slope in made:
        for r in slope.line.ranks:
            key = (r, float(f"{slope.line.constant / r**slope.rule.power:.3g}"))
            points[key] = points.get(key, 0) + 1
    return sorted(key for key, n in points.items() if n > 1)


def cells(made: Sequence[Slope]) -> list[Result]:
    """The cells of all rules, each once, in the order of the rules and ranks."""
    return list({r.id: r for slope in made for r in slope.line.cells}.values())
