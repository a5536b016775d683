"""Best learning rate against the rank under each rule that sets alpha: a picture with theory's slopes, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lorabench.report import theme
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table
from lorabench.report.theme import FAINT, INK, Drawing, Look
from lorabench.results import formatting, rate_slopes
from lorabench.results.best_rate import Missing, Optimum
from lorabench.results.cells import Result
from lorabench.results.evidence import Evidence, scale
from lorabench.results.rate_slopes import Slope
from lorabench.results.sweep import shorten

THEORY = "μA (arXiv 2602.06204)"


def section(e: Evidence, looks: Mapping[str, Look]) -> Section | None:
    """Where three ranks lie on a rule's line and two of their best rates lie inside what was tried."""
    made = [s for s in rate_slopes.slopes(e) if sum(isinstance(o, Optimum) for o in s.optima) > 1]
    if not made:
        return None
    tables = (_slopes(made), _rates(e, made))
    return Section("best_rates", "How the best rate moves with the rank", (), (draw(made, looks),), tables)


def bounds(s: Slope) -> str:
    """`−0.12 (−0.30 to 0.06)`."""
    if s.slope is None:
        return formatting.DASH
    low, high = s.estimate.interval() if s.estimate else (math.nan, math.nan)
    said = f" ({formatting.number(low, 2)} to {formatting.number(high, 2)})" if s.estimate else ""
    return formatting.number(s.slope, 2) + said


# -- the picture ---------------------------------------------------------------------------------------------------------


def draw(made: Sequence[Slope], looks: Mapping[str, Look]) -> Drawing:
    """A panel a rule, log-log, one pair of axes."""
    cells = rate_slopes.cells(made)
    grid = sorted({x.lr for r in cells for x in r.choice.rates})
    ranks = sorted({r.cell.r or 0 for r in cells})
    meet = rate_slopes.anchors(made)
    with theme.canvas(4.6 if len(made) == 1 else 3.3 * len(made), 3.9) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(made), sharey=True))
        for ax, s in zip(axes, made, strict=True):
            theme.set_rank_axis(ax, ranks)
            theme.set_rate_axis(ax, grid, "y")
            theme.label_axes(ax, x="rank r (log scale)", y="best learning rate (log scale)" if ax is axes[0] else "")
            ax.set_xlim(ranks[0] / 1.5, ranks[-1] * 1.5)
            _anchor(ax, [r for r, _ in meet if r in s.line.ranks])
            _rule(ax, s, looks)
        caption = _caption(made, meet)
        alt = "Best learning rate against rank. " + " ".join(_said(s) for s in made)
        return theme.render_drawing("best_rates", "Best learning rate against rank", caption, alt, figure)


def _rule(ax: Axes, s: Slope, looks: Mapping[str, Look]) -> None:
    low, high = ax.get_ylim()
    for r, o in zip(s.line.cells, s.optima, strict=True):
        look, at = looks[r.id], r.cell.r or 0
        if isinstance(o, Missing):
            if r.choice.lr is not None:
                ax.plot(
                    at,
                    r.choice.lr,
                    marker=_side(r),
                    color=look.colour,
                    markersize=7,
                    markerfacecolor="white",
                    markeredgewidth=1.5,
                    zorder=4,
                )
            continue
        if o.variance is not None:
            a, b = o.interval()
            ax.vlines(at, max(a, low), min(b, high), color=look.colour, linewidth=2.6, alpha=0.45, zorder=3)
        used = s.slope is None or r in s.narrow.cells
        edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.8}
        if not used:
            edge = {"markerfacecolor": "white", "markeredgewidth": 1.5}
        ax.plot(at, o.lr, marker=look.marker, color=look.colour, markersize=6.8, zorder=5, **edge)
    _lines(ax, s, theme.method_colour(s.line.cells[-1].cell, looks))
    second = f"slope {bounds(s)}" if s.slope is not None else "no slope: a best rate is not located"
    title = f"{s.rule.name}: {s.constant}\n{shorten(second, 44)}\ntheory {formatting.number(s.rule.theory, 2)}"
    ax.set_title(title, fontsize=10, linespacing=1.35)


def _side(r: Result) -> str:
    """Where the minimum may lie: beyond the largest or the smallest rate that every seed survives, or between them."""
    tried = [x.lr for x in r.choice.rates if x.eligible]
    return "^" if r.choice.lr == max(tried) else "v" if r.choice.lr == min(tried) else "d"


def _lines(ax: Axes, s: Slope, colour: str) -> None:
    """Theory's slope, and the fitted one where there is one, both through the mean of the points."""
    have = [(r, o) for r, o in zip(s.line.cells, s.optima, strict=True) if isinstance(o, Optimum)]
    if s.slope is not None:
        have = [(r, o) for r, o in have if r in s.narrow.cells]
    x = np.log2([r.cell.r or 1 for r, _ in have])
    middle, height = float(x.mean()), float(np.mean([o.log2_rate for _, o in have]))
    ends = np.log2(np.array([min(s.line.ranks) / 1.25, max(s.line.ranks) * 1.25]))
    drawn: list[tuple[float, str, Any, float, int]] = [(s.rule.theory, INK, (0, (4, 2.5)), 1.3, 4)]
    drawn += [(s.slope, colour, "-", 2.4, 3)] if s.slope is not None else []
    for slope, ink, dashes, width, z in drawn:
        ax.plot(
            2**ends, 2 ** (height + slope * (ends - middle)), color=ink, linestyle=dashes, linewidth=width, zorder=z
        )


def _anchor(ax: Axes, ranks: Sequence[int]) -> None:
    for r in ranks:
        ax.axvline(r, color=FAINT, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
        ax.annotate("anchor", (r, 0.02), xycoords=ax.get_xaxis_transform(), xytext=(4, 0), textcoords="offset points", color=FAINT,
                    fontsize=9, bbox={"facecolor": "white", "linewidth": 0, "pad": 1})  # fmt: skip


def _caption(made: Sequence[Slope], meet: Sequence[tuple[int, float]]) -> str:
    text = ("Minimum of a parabola in log2 of the rate, through the mean validation losses around each cell's best rate; bars are 95 % intervals "
            f"(delta method), cut at the figure's edge. Solid: the fitted slope; dashed: {THEORY}, through the same mean point.")  # fmt: skip
    if any(isinstance(o, Missing) for s in made for o in s.optima):
        text += " Hollow triangles (or diamonds): the parabola has no minimum inside what was tried; the best rate tried is shown."
    if any(s.slope is not None and len(s.narrow.cells) < len(s.line.cells) for s in made):
        text += " Hollow points: r not far below the width, left out of the slope."
    if meet:
        points = "; ".join(f"r = {r}, s = {s:g}" for r, s in meet)
        text += f" The rules meet at the anchor ({points})."
    return text


def _said(s: Slope) -> str:
    rates = ", ".join(
        f"{r.cell.r}: {'none inside the grid' if isinstance(o, Missing) else formatting.rate(float(f'{o.lr:.3g}'))}"
        for r, o in zip(s.line.cells, s.optima, strict=True)
    )
    return f"{s.rule.name} ({s.constant}), by rank {rates}; slope {bounds(s)}, theory {formatting.number(s.rule.theory, 2)}."


# -- the numbers ---------------------------------------------------------------------------------------------------------


def _slopes(made: Sequence[Slope]) -> Table:
    columns = (
        Column("rule", "rule"), Column("line", "scale"), Column("ranks", "ranks"), Column("slope", "slope (95 %)", "right"),
        Column("theory", "theory", "right"), Column("why", ""),
    )  # fmt: skip
    rows = []
    for s in made:
        ranks = ", ".join(map(str, (s.narrow if s.slope is not None else s.line).ranks))
        gone = [str(n) for n in s.line.ranks if n not in s.narrow.ranks]
        why = (
            [s.missing.reason]
            if s.missing
            else []
            if s.estimate
            else ["the losses leave nothing to judge an interval by"]
        )
        why += [f"r = {', '.join(gone)} left out: not far below the width"] if gone and s.slope is not None else []
        runs = tuple(i for r in s.narrow.cells for i in r.cell.tune)
        texts = (s.rule.name, s.constant, ranks, bounds(s), formatting.number(s.rule.theory, 2), "; ".join(why))
        rows.append(Row(texts, runs))
    note = (
        f"Slope of log best rate on log r by least squares over the cells' interpolated best rates. Theory: {THEORY}, for a drawn A, B = 0 and r far "
        "below the width. Whether a slope agrees with it is judged among the claims."
    )
    return Table("slopes", "Slopes of the best rate", columns, tuple(rows), (note,))


def _rates(e: Evidence, made: Sequence[Slope]) -> Table:
    columns = (
        Column("cell", "cell"), Column("s", "s", "right"), Column("tried", "best tried", "right"),
        Column("best", "interpolated best (95 %)", "right"), Column("over", "interval from"),
    )  # fmt: skip
    rows = []
    for r in rate_slopes.cells(made):
        o = e.optima[r.id]
        texts = (r.name, f"{scale(r.cell):.3g}", formatting.rate(r.choice.lr), *_best(o))
        rows.append(Row(texts, r.cell.tune))
    return Table("best_rates", "Interpolated best rates", columns, tuple(rows))


def _best(o: Optimum | Missing) -> tuple[str, str]:
    if isinstance(o, Missing):
        return formatting.DASH, o.reason
    best = formatting.rate(float(f"{o.lr:.3g}"))
    if o.variance is None:
        return best, "none: three rates of one seed leave no scatter"
    low, high = o.interval()
    over = f"{o.seeds} tuning seeds" if o.how == "seeds" else "the losses' scatter around the parabola"
    return f"{best} ({_round(low)} to {_round(high)})", over


def _round(x: float) -> str:
    return "∞" if math.isinf(x) or x > 1e3 else "0" if x < 1e-12 else formatting.rate(float(f"{x:.2g}"))
