"""Best learning rate against the rank under each alpha rule: a picture with theory's slopes, and the numbers."""

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
    """Return the section where three ranks lie on a rule's line, two of their best rates inside what was tried."""
    slopes = [s for s in rate_slopes.slopes(e) if sum(isinstance(o, Optimum) for o in s.optima) > 1]
    if not slopes:
        return None
    tables = (_slopes_table(slopes), _rates_table(e, slopes))
    return Section("best_rates", "How the best rate moves with the rank", (), (draw(slopes, looks),), tables)


def bounds(s: Slope) -> str:
    """Return a slope and its interval, such as `−0.12 (−0.30 to 0.06)`."""
    slope = formatting.number(s.slope, 2)
    if s.slope is None or s.estimate is None:
        return slope
    low, high = s.estimate.interval()
    return f"{slope} ({formatting.number(low, 2)} to {formatting.number(high, 2)})"


# -- the picture -----------------------------------------------------------------------------------------------------


def draw(slopes: Sequence[Slope], looks: Mapping[str, Look]) -> Drawing:
    """Draw best rates against ranks, a panel a rule, log-log, with one pair of axes."""
    cells = rate_slopes.cells(slopes)
    tried = sorted({x.lr for r in cells for x in r.choice.rates})
    ranks = sorted({r.cell.r or 0 for r in cells})
    anchors = rate_slopes.anchors(slopes)
    with theme.canvas(4.6 if len(slopes) == 1 else 3.3 * len(slopes), 3.9) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(slopes), sharey=True))
        for ax, s in zip(axes, slopes, strict=True):
            theme.set_rank_axis(ax, ranks)
            theme.set_rate_axis(ax, tried, "y")
            y_title = "best learning rate (log scale)" if ax is axes[0] else ""
            theme.label_axes(ax, x="rank r (log scale)", y=y_title)
            ax.set_xlim(ranks[0] / 1.5, ranks[-1] * 1.5)
            _draw_anchors(ax, [r for r, _ in anchors if r in s.line.ranks])
            _draw_rule(ax, s, looks)
        caption = _caption(slopes, anchors)
        alt = "Best learning rate against rank. " + " ".join(_alt(s) for s in slopes)
        return theme.render_drawing("best_rates", "Best learning rate against rank", caption, alt, figure)


def _draw_rule(ax: Axes, s: Slope, looks: Mapping[str, Look]) -> None:
    for r, optimum in zip(s.line.cells, s.optima, strict=True):
        if isinstance(optimum, Optimum):
            _draw_optimum(ax, r, optimum, looks[r.id], in_slope=s.slope is None or r in s.narrow.cells)
        elif r.choice.lr is not None:
            hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": looks[r.id].colour}
            style = hollow | {"marker": _side_marker(r), "markeredgewidth": 1.5}
            theme.draw_point(ax, r.cell.r or 0, r.choice.lr, looks[r.id], **style)
    _draw_slopes(ax, s, theme.method_colour(s.line.cells[-1].cell, looks))
    slope = f"slope {bounds(s)}" if s.slope is not None else "no slope: a best rate is not located"
    theory = f"theory {formatting.number(s.rule.theory, 2)}"
    title = f"{s.rule.name}: {s.constant}\n{shorten(slope, 44)}\n{theory}"
    ax.set_title(title, fontsize=10, linespacing=1.35)


def _draw_optimum(ax: Axes, r: Result, optimum: Optimum, look: Look, *, in_slope: bool) -> None:
    """Draw an interpolated best rate with its interval; hollow where the slope leaves it out."""
    rank = r.cell.r or 0
    if optimum.variance is not None:
        bottom, top = ax.get_ylim()
        low, high = optimum.interval()
        ax.vlines(rank, max(low, bottom), min(high, top), color=look.colour, linewidth=2.6, alpha=0.45, zorder=3)
    hollow = {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.5}
    theme.draw_point(ax, rank, optimum.lr, look, size=6.8, zorder=5, **({} if in_slope else hollow))


def _side_marker(r: Result) -> str:
    """Return where the minimum may lie: beyond the largest or smallest rate that all seeds survive, or between."""
    tried = [x.lr for x in r.choice.rates if x.eligible]
    return "^" if r.choice.lr == max(tried) else "v" if r.choice.lr == min(tried) else "d"


def _draw_slopes(ax: Axes, s: Slope, colour: str) -> None:
    """Draw theory's slope, and the fitted one where there is one, both through the mean of the points."""
    located = [(r, o) for r, o in zip(s.line.cells, s.optima, strict=True) if isinstance(o, Optimum)]
    if s.slope is not None:
        located = [(r, o) for r, o in located if r in s.narrow.cells]
    middle = float(np.log2([r.cell.r or 1 for r, _ in located]).mean())
    height = float(np.mean([o.log2_rate for _, o in located]))
    ends = np.log2(np.array([min(s.line.ranks) / 1.25, max(s.line.ranks) * 1.25]))

    def line(slope: float, **style: Any) -> None:
        ax.plot(2**ends, 2 ** (height + slope * (ends - middle)), **style)

    line(s.rule.theory, color=INK, linestyle=(0, (4, 2.5)), linewidth=1.3, zorder=4)
    if s.slope is not None:
        line(s.slope, color=colour, linestyle="-", linewidth=2.4, zorder=3)


def _draw_anchors(ax: Axes, ranks: Sequence[int]) -> None:
    for r in ranks:
        ax.axvline(r, color=FAINT, linewidth=1.0, linestyle=theme.DOTTED, zorder=1)
        ax.annotate(
            "anchor",
            (r, 0.02),
            xycoords=ax.get_xaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            color=FAINT,
            fontsize=9,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        )


def _caption(slopes: Sequence[Slope], anchors: Sequence[tuple[int, float]]) -> str:
    text = (
        "Minimum of a parabola in log2 of the rate, through the mean validation losses around each cell's best rate; "
        "bars are 95 % intervals over two tuning seeds or more (delta method), cut at the figure's edge. "
        f"Solid: the fitted slope; dashed: {THEORY}, through the same mean point."
    )
    if any(isinstance(o, Missing) for s in slopes for o in s.optima):
        text += (
            " Hollow triangles (or diamonds): the parabola has no minimum inside what was tried; "
            "the best rate tried is shown."
        )
    if any(s.slope is not None and len(s.narrow.cells) < len(s.line.cells) for s in slopes):
        text += " Hollow points: r not far below the width, left out of the slope."
    if anchors:
        points = "; ".join(f"r = {r}, s = {s:g}" for r, s in anchors)
        text += f" The rules meet at the anchor ({points})."
    return text


def _alt(s: Slope) -> str:
    rates = ", ".join(
        f"{r.cell.r}: {'none inside the grid' if isinstance(o, Missing) else _best_rate(o)}"
        for r, o in zip(s.line.cells, s.optima, strict=True)
    )
    theory = formatting.number(s.rule.theory, 2)
    return f"{s.rule.name} ({s.constant}), by rank {rates}; slope {bounds(s)}, theory {theory}."


# -- the numbers -----------------------------------------------------------------------------------------------------

SLOPE_NOTE = (
    "Slope of log best rate on log r by least squares over the cells' interpolated best rates. "
    f"Theory: {THEORY}, for a drawn A, B = 0 and r far below the width. "
    "Whether a slope agrees with it is judged among the claims."
)


def _slopes_table(slopes: Sequence[Slope]) -> Table:
    columns = (
        Column("rule", "rule"),
        Column("line", "scale"),
        Column("ranks", "ranks"),
        Column("slope", "slope (95 %)", "right"),
        Column("theory", "theory", "right"),
        Column("why", ""),
    )
    return Table("slopes", "Slopes of the best rate", columns, tuple(map(_slope_row, slopes)), (SLOPE_NOTE,))


def _slope_row(s: Slope) -> Row:
    ranks = (s.narrow if s.slope is not None else s.line).ranks
    remarks = []
    if s.missing:
        remarks.append(s.missing.reason)
    elif not s.estimate:
        remarks.append("no interval: it takes two tuning seeds")
    wide = [str(n) for n in s.line.ranks if n not in s.narrow.ranks]
    if wide and s.slope is not None:
        remarks.append(f"r = {', '.join(wide)} left out: not far below the width")
    theory = formatting.number(s.rule.theory, 2)
    texts = (s.rule.name, s.constant, ", ".join(map(str, ranks)), bounds(s), theory, "; ".join(remarks))
    return Row(texts, tuple(i for r in s.narrow.cells for i in r.cell.tune))


def _rates_table(e: Evidence, slopes: Sequence[Slope]) -> Table:
    columns = (
        Column("cell", "cell"),
        Column("s", "s", "right"),
        Column("tried", "best tried", "right"),
        Column("best", "interpolated best (95 %)", "right"),
        Column("over", "interval from"),
    )
    rows = tuple(
        Row(
            (r.name, f"{scale(r.cell):.3g}", formatting.rate(r.choice.lr), *_optimum_texts(e.optima[r.id])), r.cell.tune
        )
        for r in rate_slopes.cells(slopes)
    )
    return Table("best_rates", "Interpolated best rates", columns, rows)


def _optimum_texts(o: Optimum | Missing) -> tuple[str, str]:
    """Return the best rate, and what its interval is from."""
    if isinstance(o, Missing):
        return formatting.DASH, o.reason
    if o.variance is None:
        return _best_rate(o), "none: it takes two tuning seeds, the same at every rate"
    low, high = o.interval()
    source = f"{o.seeds} tuning seeds"
    return f"{_best_rate(o)} ({_rate_bound(low)} to {_rate_bound(high)})", source


def _best_rate(o: Optimum) -> str:
    return formatting.rate(float(f"{o.lr:.3g}"))


def _rate_bound(x: float) -> str:
    return "∞" if math.isinf(x) or x > 1e3 else "0" if x < 1e-12 else formatting.rate(float(f"{x:.2g}"))
