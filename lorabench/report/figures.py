"""The main figure: the metric against the rank, or cell by cell where rank is not what varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from lorabench.report import curves, theme
from lorabench.report.theme import FAINT, Drawing, Look
from lorabench.results import formatting, scores
from lorabench.results.cells import Result
from lorabench.results.findings import Findings
from lorabench.results.sweep import shorten

RING_COLOUR = "#B35900"
POINT_SIZE = 6.8
MAX_SERIES = 4  # of ranks in one picture

Interval = tuple[float, float, float]  # low, mean, high


def draw(f: Findings) -> list[Drawing]:
    """Return the figures this sweep has the data for, the most telling first."""
    looks = theme.looks(f.sweep.cells)
    scored = [r for r in f.results.values() if score_interval(f, r)]
    main = None
    if len(scored) > 1:
        main = draw_by_rank(f, looks) if is_by_rank(f) else draw_by_cell(f, looks)
    drawings = (main, curves.draw_learning_rates(f, looks), curves.draw_training(f, looks))
    return [d for d in drawings if d is not None]


def is_by_rank(f: Findings) -> bool:
    """Whether rank is an axis: most adapter cells stand in a series of at least two ranks."""
    cells = [r.cell for r in f.results.values() if r.cell.adapter and score_interval(f, r)]
    in_ladders = [c for c in cells if len({o.r for o in cells if o.series == c.series}) > 1]
    return len(in_ladders) > len(cells) / 2 and len({c.series for c in cells}) <= MAX_SERIES


def score_interval(f: Findings, r: Result) -> Interval | None:
    """Return (low, mean, high): test with its 95 % interval, else the validation mean alone."""
    if f.confirmed:
        if r.test is None:
            return None
        low, high = scores.interval(f.metric, r.test) if r.test.seeds > 1 else (r.test.mean, r.test.mean)
        return low, r.test.mean, high
    return None if r.val is None else (r.val, r.val, r.val)


# -- against the rank ------------------------------------------------------------------------------------------------


def draw_by_rank(f: Findings, looks: Mapping[str, Look]) -> Drawing:
    """Draw the metric against the rank: a line a series, a band a method without a rank."""
    cells = [r for r in f.results.values() if r.cell.adapter and score_interval(f, r)]
    without_rank = [r for r in f.results.values() if not r.cell.adapter]
    all_series = list(dict.fromkeys(r.cell.series for r in cells))
    several = len(all_series) > 1
    ranks = sorted({r.cell.r or 0 for r in cells})
    with theme.canvas(theme.panel_width(r.name for r in without_rank), 3.4) as figure:
        ax = figure.add_subplot()
        theme.set_rank_axis(ax, ranks)
        labels = [label for r in without_rank for label in _draw_band(ax, f, r, looks)]
        for i, series in enumerate(all_series):
            members = sorted((r for r in cells if r.cell.series == series), key=lambda r: r.cell.r or 0)
            shift = 2 ** (0.10 * (i - (len(all_series) - 1) / 2))  # side by side
            labels.append(_draw_series(ax, f, members, looks, shift=shift, several=several))
        ax.set_xlim(ranks[0] / 1.35, ranks[-1] * 1.35)
        theme.label_axes(ax, x="rank r (log scale)", y=_metric_axis(f))
        theme.format_metric_ticks(ax, f.metric)
        labels += draw_margin_line(ax, f, several=several)
        theme.draw_end_labels(ax, labels)
        title = f"{formatting.capital(f.metric.title)} against rank"
        caption = _caption(f) + _ring_caption(f)
        return theme.render_drawing("metric_by_rank", title, caption, _alt(f, "against rank"), figure)


def _draw_series(
    ax: Axes, f: Findings, cells: Sequence[Result], looks: Mapping[str, Look], *, shift: float, several: bool
) -> theme.Label:
    """Draw one series with its intervals, points shaded by rank, and return its label."""
    colour = theme.method_colour(cells[0].cell, looks)
    points = [((r.cell.r or 0) * shift, interval, r) for r in cells if (interval := score_interval(f, r))]
    xs, means = [x for x, _, _ in points], [mean for _, (_, mean, _), _ in points]
    ax.plot(xs, means, color=colour, linestyle=looks[cells[0].id].dashes, linewidth=1.8, zorder=3)
    for x, (low, mean, high), r in points:
        ax.vlines(x, low, high, color=looks[r.id].colour, linewidth=2.6, alpha=0.55, zorder=3)
        _draw_point(ax, x, mean, looks[r.id], ringed=_is_recommended(f, r))
    last = cells[-1]
    name = last.name.replace(f" r = {last.cell.r}", "") if several else last.cell.method
    return None, means[-1], name, colour


def _draw_band(ax: Axes, f: Findings, r: Result, looks: Mapping[str, Look]) -> list[theme.Label]:
    """Draw a method without a rank as a line across, its interval as a band; return its label where it has a score."""
    interval = score_interval(f, r)
    if interval is None:
        return []
    low, mean, high = interval
    colour = looks[r.id].colour
    ax.axhspan(low, high, color=colour, alpha=0.10, linewidth=0, zorder=1)
    ax.axhline(mean, color=colour, linewidth=1.3, linestyle=(0, (4, 2)), zorder=2)
    return [(None, mean, r.name, colour)]


def draw_margin_line(ax: Axes, f: Findings, *, several: bool) -> list[theme.Label]:
    """Draw where a cell would fall short of the reference by the margin, and return the line's label.

    several: whether the picture has several series, so that a rank alone does not name a cell.
    """
    reference = f.results[f.reference] if f.reference else None
    if reference is None or reference.test is None or not f.versus:
        return []
    y = reference.test.mean + (f.sweep.margin if f.metric.lower_is_better else -f.sweep.margin)
    ax.axhline(y, color=FAINT, linewidth=1.0, linestyle=theme.DOTTED, zorder=1)
    sign = "+" if f.metric.lower_is_better else "−"
    name = f"r = {reference.cell.r}" if reference.cell.adapter and not several else reference.name
    return [(None, y, f"{name} {sign} {_margin_name(f)}", FAINT)]


# -- cell by cell ----------------------------------------------------------------------------------------------------


def draw_by_cell(f: Findings, looks: Mapping[str, Look]) -> Drawing:
    """Draw a dot with its interval a cell; a band of one margin around the reference."""
    scored = [(r, interval) for r in f.results.values() if (interval := score_interval(f, r))]
    caption = _caption(f)
    with theme.canvas(theme.panel_width(r.name for r, _ in scored), 1.1 + 0.34 * len(scored)) as figure:
        ax = figure.add_subplot()
        if f.reference and f.versus and (reference := f.results[f.reference]).test:
            mean, margin = reference.test.mean, f.sweep.margin
            ax.axvspan(mean - margin, mean + margin, color=FAINT, alpha=0.10, linewidth=0)
            ax.axvline(mean, color=FAINT, linewidth=1.0, linestyle=theme.DOTTED)
            caption += f" The grey band is one {_margin_name(f)} around {reference.name}."
        for y, (r, (low, mean, high)) in enumerate(scored):
            ax.hlines(y, low, high, color=looks[r.id].colour, linewidth=2.8, alpha=0.55)
            _draw_point(ax, mean, y, looks[r.id], ringed=_is_recommended(f, r))
        ax.set_yticks(range(len(scored)), [shorten(r.name, theme.MAX_NAME_LENGTH) for r, _ in scored])
        ax.set_ylim(len(scored) - 0.4, -0.6)
        theme.label_axes(ax, x=_metric_axis(f), y="", grid="x")
        theme.format_metric_ticks(ax, f.metric, "x")
        ax.tick_params(axis="y", length=0)
        if f.recommendation and f.recommendation.cell:
            caption += " The ring marks the recommended adapter."
        title = f"{formatting.capital(f.metric.title)} by cell"
        return theme.render_drawing("metric_by_cell", title, caption, _alt(f, "by cell"), figure)


# -- what both have --------------------------------------------------------------------------------------------------


def _draw_point(ax: Axes, x: float, y: float, look: Look, *, ringed: bool) -> None:
    theme.draw_point(ax, x, y, look, size=POINT_SIZE)
    if ringed:
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": RING_COLOUR, "markeredgewidth": 1.6}
        ax.plot(x, y, "o", markersize=13, zorder=5, **ring)


def _is_recommended(f: Findings, r: Result) -> bool:
    return f.recommendation is not None and f.recommendation.cell == r.id


def _metric_axis(f: Findings) -> str:
    return f"{'test' if f.confirmed else 'validation'} {f.metric.axis}"


def _margin_name(f: Findings) -> str:
    return "margin" if f.sweep.post_hoc is None else "post hoc margin"


def _caption(f: Findings) -> str:
    if not f.confirmed:
        return (
            "Validation at each cell's chosen rate, measured on the seeds that chose it: no interval, no test result."
        )
    return (
        "Mean over confirmation seeds at each cell's chosen rate; "
        "bars and bands are 95 % intervals over seeds and test examples."
    )


def _ring_caption(f: Findings) -> str:
    if f.recommendation and f.recommendation.cell:
        line = f"the dotted line lies one {_margin_name(f)} from the reference"
        return f" The ring marks the recommended adapter; {line}."
    return ""


def _alt(f: Findings, how: str) -> str:
    """Return the picture in words. how: `against rank` or `by cell`."""
    scores = []
    for r in f.results.values():
        if interval := score_interval(f, r):
            low, mean, high = interval
            half = f" ± {f.metric.size((high - low) / 2, unit=False)}" if high > low else ""
            scores.append(f"{r.name} {f.metric.value(mean)}{half}")
    return f"{_metric_axis(f)} {how}: " + "; ".join(scores) + "."
