"""The main figure: the metric against the rank, or cell by cell where rank is not what varies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from lorabench.report import curves, theme
from lorabench.report.theme import FAINT, Drawing
from lorabench.results import formatting
from lorabench.results.cells import Result
from lorabench.results.findings import Findings
from lorabench.results.sweep import shorten


def draw(f: Findings) -> list[Drawing]:
    """The figures this sweep has the data for, the most telling first."""
    found = theme.looks(f.sweep.cells)
    shown = [r for r in f.results.values() if score_interval(f, r)]
    main = None if len(shown) < 2 else draw_by_rank(f, found) if is_by_rank(f) else draw_by_cell(f, found)
    return [d for d in (main, curves.draw_learning_rates(f, found), curves.draw_training(f, found)) if d is not None]


def is_by_rank(f: Findings) -> bool:
    """Whether rank is an axis: most adapter cells stand in a series of at least two ranks."""
    cells = [r.cell for r in f.results.values() if r.cell.adapter and score_interval(f, r)]
    ladders = [c for c in cells if len({o.r for o in cells if o.series == c.series}) > 1]
    return len(ladders) > len(cells) / 2 and len({c.series for c in cells}) <= 4


def score_interval(f: Findings, r: Result) -> tuple[float, float, float] | None:
    """(low, mean, high): test with its 95 % interval, else the validation mean alone."""
    if f.confirmed:
        if r.test is None:
            return None
        low, high = r.test.interval() if r.test.seeds > 1 else (r.test.mean, r.test.mean)
        return low, r.test.mean, high
    return None if r.val is None else (r.val, r.val, r.val)


def _what(f: Findings) -> str:
    return f"{'test' if f.confirmed else 'validation'} {f.metric.axis}"


def _caption(f: Findings) -> str:
    if not f.confirmed:
        return (
            "Validation at each cell's chosen rate, measured on the seeds that chose it: no interval, no test result."
        )
    return "Mean over confirmation seeds at each cell's chosen rate; bars and bands are 95 % intervals over seeds and test examples."


def draw_by_rank(f: Findings, found: dict[str, theme.Look]) -> Drawing:
    cells = [r for r in f.results.values() if r.cell.adapter and score_interval(f, r)]
    series = list(dict.fromkeys(r.cell.series for r in cells))
    ranks = sorted({r.cell.r or 0 for r in cells})
    with theme.canvas(theme.panel_width(r.name for r in f.results.values() if not r.cell.adapter), 3.4) as figure:
        ax = figure.add_subplot()
        theme.set_rank_axis(ax, ranks)
        labels = [label for r in f.results.values() if not r.cell.adapter for label in _band(ax, f, r, found)]
        for i, key in enumerate(series):
            mine = sorted((r for r in cells if r.cell.series == key), key=lambda r: r.cell.r or 0)
            labels.append(
                _line(ax, f, mine, found, shift=2 ** (0.10 * (i - (len(series) - 1) / 2)), several=len(series) > 1)
            )
        ax.set_xlim(ranks[0] / 1.35, ranks[-1] * 1.35)
        theme.label_axes(ax, x="rank r (log scale)", y=_what(f))
        theme.format_metric_ticks(ax, f.metric)
        labels += _margin_line(ax, f, several=len(series) > 1)
        theme.draw_end_labels(ax, labels)
        title = f"{formatting.capital(f.metric.title)} against rank"
        return theme.render_drawing("metric_by_rank", title, _caption(f) + _ring(f), _alt(f, "against rank"), figure)


def _line(
    ax: Axes, f: Findings, mine: Sequence[Result], found: dict[str, theme.Look], *, shift: float, several: bool
) -> theme.Label:
    """One series with its intervals, points shaded by rank; answers with its label."""
    colour, look = theme.method_colour(mine[0].cell, found), found[mine[0].id]
    points = [(r, (r.cell.r or 0) * shift, score_interval(f, r)) for r in mine]
    xs, ys = [x for _, x, _ in points], [s[1] for _, _, s in points if s]
    ax.plot(xs, ys, color=colour, linestyle=look.dashes, linewidth=1.8, zorder=3)
    for r, x, s in points:
        assert s is not None
        ax.vlines(x, s[0], s[2], color=found[r.id].colour, linewidth=2.6, alpha=0.55, zorder=3)
        _point(ax, x, s[1], found[r.id], ringed=_recommended(f, r))
    name = mine[-1].name.replace(f" r = {mine[-1].cell.r}", "") if several else mine[-1].cell.method
    return None, ys[-1], name, colour


RING_COLOUR = "#B35900"


def _point(ax: Axes, x: float, y: float, look: theme.Look, *, ringed: bool) -> None:
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.8}
    ax.plot(x, y, marker=look.marker, color=look.colour, markersize=6.8, zorder=4, **edge)
    if ringed:
        ax.plot(
            x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=RING_COLOUR, markeredgewidth=1.6, zorder=5
        )


def _recommended(f: Findings, r: Result) -> bool:
    return f.recommendation is not None and f.recommendation.cell == r.id


def _band(ax: Axes, f: Findings, r: Result, found: dict[str, theme.Look]) -> list[theme.Label]:
    """A method without a rank: a line across, with its interval as a band."""
    s = score_interval(f, r)
    if s is None:
        return []
    colour = found[r.id].colour
    ax.axhspan(s[0], s[2], color=colour, alpha=0.10, linewidth=0, zorder=1)
    ax.axhline(s[1], color=colour, linewidth=1.3, linestyle=(0, (4, 2)), zorder=2)
    return [(None, s[1], r.name, colour)]


def _margin_line(ax: Axes, f: Findings, *, several: bool) -> list[theme.Label]:
    """Where a cell would fall short of the reference by the margin."""
    reference = f.results[f.reference] if f.reference else None
    if reference is None or reference.test is None or not f.versus:
        return []
    y = reference.test.mean + (f.sweep.margin if f.metric.lower_is_better else -f.sweep.margin)
    ax.axhline(y, color=FAINT, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    sign = "+" if f.metric.lower_is_better else "−"
    name = f"r = {reference.cell.r}" if reference.cell.adapter and not several else reference.name
    return [(None, y, f"{name} {sign} {_margin(f)}", FAINT)]


def _margin(f: Findings) -> str:
    return "margin" if f.sweep.post_hoc is None else "post hoc margin"


def _ring(f: Findings) -> str:
    if f.recommendation and f.recommendation.cell:
        return f" The ring marks the recommended adapter; the dotted line lies one {_margin(f)} from the reference."
    return ""


def _alt(f: Findings, what: str) -> str:
    said = []
    for r in f.results.values():
        if s := score_interval(f, r):
            half = f" ± {f.metric.size((s[2] - s[0]) / 2, unit=False)}" if s[2] > s[0] else ""
            said.append(f"{r.name} {f.metric.value(s[1])}{half}")
    return f"{_what(f)} {what}: " + "; ".join(said) + "."


def draw_by_cell(f: Findings, found: dict[str, theme.Look]) -> Drawing:
    """A dot with its interval a cell; a band of one margin around the reference."""
    shown = [r for r in f.results.values() if score_interval(f, r)]
    caption = _caption(f)
    with theme.canvas(theme.panel_width(r.name for r in shown), 1.1 + 0.34 * len(shown)) as figure:
        ax = figure.add_subplot()
        if f.reference and f.versus and (reference := f.results[f.reference]).test:
            at, margin = reference.test.mean, f.sweep.margin
            ax.axvspan(at - margin, at + margin, color=FAINT, alpha=0.10, linewidth=0)
            ax.axvline(at, color=FAINT, linewidth=1.0, linestyle=(0, (1, 2)))
            caption += f" The grey band is one {_margin(f)} around {reference.name}."
        for y, r in enumerate(shown):
            s = score_interval(f, r)
            assert s is not None
            ax.hlines(y, s[0], s[2], color=found[r.id].colour, linewidth=2.8, alpha=0.55)
            _point(ax, s[1], y, found[r.id], ringed=_recommended(f, r))
        ax.set_yticks(range(len(shown)), [shorten(r.name, theme.MAX_NAME_LENGTH) for r in shown])
        ax.set_ylim(len(shown) - 0.4, -0.6)
        theme.label_axes(ax, x=_what(f), y="", grid="x")
        theme.format_metric_ticks(ax, f.metric, "x")
        ax.tick_params(axis="y", length=0)
        if f.recommendation and f.recommendation.cell:
            caption += " The ring marks the recommended adapter."
        title = f"{formatting.capital(f.metric.title)} by cell"
        return theme.render_drawing("metric_by_cell", title, caption, _alt(f, "by cell"), figure)
