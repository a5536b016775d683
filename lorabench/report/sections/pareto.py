"""What a point of the metric costs: parameters, seconds and memory of a cell against its test metric, and the
fronts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from lorabench.report import theme
from lorabench.report.figures import Interval, score_interval
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, metric_title, plus_minus, run_ids
from lorabench.report.theme import INK, Drawing, Look
from lorabench.results import formatting
from lorabench.results.best_rate import Missing
from lorabench.results.cells import Result, unique_results
from lorabench.results.evidence import Evidence
from lorabench.results.findings import Findings
from lorabench.results.sweep import shorten

BEATEN_COLOUR = "#9A9A9A"
MAX_POINT_NAME = 28  # characters of a name beside a point
MIN_CELLS = 3  # cells; of two there is no front to speak of
EQUAL_COST_FACTOR = 1.02  # measured costs within this factor are one cost: a second measurement may turn them round


@dataclass(frozen=True)
class Cost:
    """One thing that is paid, of a cell by itself."""

    key: str
    title: str
    axis: str
    of: Callable[[Result], float | None]
    text: Callable[[float | None], str]
    log: bool = False
    same: float = 1.0  # costs within this factor count as equal


@dataclass(frozen=True)
class Front:
    cost: Cost
    cells: tuple[Result, ...]  # all that have it, cheapest first
    on: tuple[Result, ...]  # of these the ones no other beats, cheapest first


PER_CENT = round(100 * (EQUAL_COST_FACTOR - 1))
EQUAL_COSTS_SENTENCE = f"measured costs within {PER_CENT} % of each other count as equal"


def _seconds(r: Result) -> float | None:
    """Return seconds measured alone: its solo steps scaled to a run, or runs that had their base to themselves."""
    measured = r.timed.get("seconds") or r.resource("solo_seconds") is not None
    return r.seconds if measured or _alone(r) else None


def _memory(r: Result) -> float | None:
    measured = r.timed.get("peak_memory_bytes") or r.resource("solo_peak_memory_bytes")
    return r.memory if measured or _alone(r) else None


def _alone(r: Result) -> bool:
    return bool(r.runs) and all(x.resources.get("pack_size") == 1 for x in r.runs)


COSTS = (
    Cost(
        "trainable",
        "trainable parameters",
        "trainable parameters (log scale)",
        lambda r: r.cell.trainable,
        formatting.count,
        log=True,
    ),
    Cost("seconds", "training time", "seconds of a run alone", _seconds, formatting.seconds, same=EQUAL_COST_FACTOR),
    Cost("memory", "peak memory", "peak memory alone", _memory, formatting.memory, same=EQUAL_COST_FACTOR),
)


def section(f: Findings, e: Evidence, looks: Mapping[str, Look]) -> Section | None:
    """Return the section where three cells or more have a test result and a cost."""
    by_cost = fronts(f)
    if not by_cost:
        return None
    texts = (*(_front_sentence(f, e, x) for x in by_cost), *_equal_cost_sentences(f))
    return Section("pareto", "What a point costs", texts, (draw(f, by_cost, looks),), (_table(f, by_cost),))


def fronts(f: Findings) -> list[Front]:
    """Return the fronts of the costs that tell cells apart."""
    priced = [(cost, _priced(f, cost)) for cost in COSTS]
    return [
        Front(cost, cells, front(f, cost, cells))
        for cost, cells in priced
        if len(cells) >= MIN_CELLS and _tells_apart(cost, cells)
    ]


def _priced(f: Findings, cost: Cost) -> tuple[Result, ...]:
    """Return tested cells that have the cost, cheapest first; one of those that are the same runs."""
    tested = unique_results([r for r in f.results.values() if r.test is not None])
    return tuple(sorted((r for r in tested if cost.of(r)), key=lambda r: (cost.of(r) or 0.0, r.id)))


def _tells_apart(cost: Cost, cells: Sequence[Result]) -> bool:
    return (cost.of(cells[-1]) or 0.0) > (cost.of(cells[0]) or 0.0) * cost.same


def _equal_cost_sentences(f: Findings) -> Iterator[str]:
    """Yield the costs that are the same for all, of which there is no front."""
    for cost in COSTS:
        cells = _priced(f, cost)
        if len(cells) >= MIN_CELLS and not _tells_apart(cost, cells):
            within = f" within {PER_CENT} %" if cost.same > 1 else ""
            unit = " s" if cost.key == "seconds" else ""
            yield f"{formatting.capital(cost.title)}: the same{within} for all, {cost.text(cost.of(cells[0]))}{unit}."


def front(f: Findings, cost: Cost, cells: Sequence[Result]) -> tuple[Result, ...]:
    """Return the cells that no other beats by its point estimate.

    A cell is beaten by one that costs no more, does no worse, and is better in one of the two. Costs within `cost.same`
    of each other are equal here.
    """
    sign = -1.0 if f.metric.lower_is_better else 1.0
    at = {r.id: (cost.of(r) or 0.0, sign * (r.test.mean if r.test else 0.0)) for r in cells}

    def beaten(r: Result) -> bool:
        x, y = at[r.id]
        return any(a <= x * cost.same and b >= y and (a * cost.same < x or b > y) for a, b in at.values())

    return tuple(r for r in cells if not beaten(r))


def unresolved(e: Evidence, on: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Return neighbours on a front whose difference on test is not shown: its 95 % interval holds zero, or there is
    none."""
    pairs = []
    for a, b in pairwise(on):
        difference = e.difference(a, b)
        if isinstance(difference, Missing) or difference.interval()[0] <= 0 <= difference.interval()[1]:
            pairs.append((a, b))
    return pairs


def _front_sentence(f: Findings, e: Evidence, x: Front) -> str:
    names = ", ".join(r.name for r in x.on)
    text = f"{formatting.capital(x.cost.title)}: on the front, from cheap to dear, {names}."
    if len(x.on) == 1:
        more = (x.cost.of(x.on[0]) or 0.0) / (x.cost.of(x.cells[0]) or 1.0) - 1
        costs = f"{100 * more:.1f} % more than the cheapest" if more > 0 else "least"
        return f"{text} It costs {costs} and scores best."
    open_pairs = unresolved(e, x.on)
    if not open_pairs:
        return f"{text} Each is resolved from its neighbour (95 %, exploratory)."
    pairs = "; ".join(f"{a.name} and {b.name}" for a, b in open_pairs)
    return (
        f"{text} Not resolved from each other (95 %, exploratory): {pairs}. A new sweep may put them in another order."
    )


# -- the picture -----------------------------------------------------------------------------------------------------


def draw(f: Findings, by_cost: Sequence[Front], looks: Mapping[str, Look]) -> Drawing:
    """Draw the metric against the costs, a panel each, one below the other."""
    width = theme.panel_width(shorten(r.name, MAX_POINT_NAME) for x in by_cost for r in x.on)
    with theme.canvas(width, 0.3 + 2.4 * len(by_cost)) as figure:
        axes = np.atleast_1d(figure.subplots(len(by_cost), 1, sharey=True))
        for ax, x in zip(axes, by_cost, strict=True):
            _draw_panel(ax, f, x, looks)
        costs = ", ".join(x.cost.title for x in by_cost)
        alt = f"Test {f.metric.axis} against {costs}. " + " ".join(_alt(f, x) for x in by_cost)
        title = f"{f.metric.title[:1].upper() + f.metric.title[1:]} against its cost"
        return theme.render_drawing("pareto", title, _caption(by_cost), alt, figure)


def _caption(by_cost: Sequence[Front]) -> str:
    text = (
        "In colour and joined: cells that no other beats on both axes, by their point estimates. "
        "Grey: the others. Bars are 95 % intervals over seeds and test examples."
    )
    if measured := [x.cost.key for x in by_cost if x.cost.same > 1]:
        verb = "is" if measured == ["memory"] else "are"
        costs = formatting.capital(" and ".join(measured))
        text += f" {costs} {verb} of a cell measured alone; {EQUAL_COSTS_SENTENCE}."
    return text


def _alt(f: Findings, x: Front) -> str:
    cells = "; ".join(f"{r.name} {x.cost.text(x.cost.of(r))}, {plus_minus(f, r)}" for r in x.on)
    return f"On the front of {x.cost.title}: {cells}."


def _draw_panel(ax: Axes, f: Findings, x: Front, looks: Mapping[str, Look]) -> None:
    scale, unit = _unit(x)
    if x.cost.log:
        ax.set_xscale("log")
    else:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    costs = {r.id: (x.cost.of(r) or 0.0) / scale for r in x.cells}
    means = {}
    for r in x.cells:
        low, mean, high = score_interval(f, r) or (0.0, 0.0, 0.0)
        means[r.id] = mean
        _draw_cell(ax, costs[r.id], (low, mean, high), looks[r.id], on_front=r in x.on)
    front_costs, front_means = [costs[r.id] for r in x.on], [means[r.id] for r in x.on]
    ax.plot(front_costs, front_means, drawstyle="steps-post", color=INK, linewidth=1.1, zorder=2.5)
    theme.label_axes(ax, x=f"{x.cost.axis}{unit}", y=f"test {f.metric.axis}")
    theme.format_metric_ticks(ax, f.metric)
    if x.cost.log:
        ticks = theme.decade_ticks(min(costs.values()), max(costs.values()))
        ax.set_xticks(ticks, [formatting.compact(t).replace(".0 ", " ") for t in ticks])
        ax.minorticks_off()
    ax.margins(y=0.13)  # a name beyond the outermost point stays inside
    names = [(costs[r.id], means[r.id], shorten(r.name, MAX_POINT_NAME), looks[r.id].colour) for r in x.on]
    _make_room(ax, [(cost, text) for cost, _, text, _ in names])
    _draw_names(ax, names, below=f.metric.lower_is_better)


def _draw_cell(ax: Axes, cost: float, interval: Interval, look: Look, *, on_front: bool) -> None:
    low, mean, high = interval
    if on_front:
        ax.vlines(cost, low, high, color=look.colour, linewidth=2.6, alpha=0.55, zorder=4)
        theme.draw_point(ax, cost, mean, look, zorder=5)
    else:
        ax.vlines(cost, low, high, color=BEATEN_COLOUR, linewidth=1.8, alpha=0.7, zorder=2)
        theme.draw_point(ax, cost, mean, look, size=5, zorder=3, color=BEATEN_COLOUR)


def _unit(x: Front) -> tuple[float, str]:
    """Return what a number on the axis stands for, and its name: memory in the unit that the table has it in."""
    if x.cost.key != "memory":
        return 1, ""
    gib = all((x.cost.of(r) or 0) >= 2**30 for r in x.cells)
    return (2**30, " (GiB)") if gib else (2**20, " (MiB)")


def _make_room(ax: Axes, names: Sequence[tuple[float, str]]) -> None:
    """Widen the axis to the left for the names that end at each x."""
    low, high = ax.get_xlim()
    log = ax.get_xscale() == "log"
    figure = ax.get_figure(root=True)
    assert figure is not None
    inches = figure.get_figwidth() - 0.9  # near the width of the axis, which the layout settles on later
    room = 0.05
    for x, text in names:
        share = 0.03 + len(text) * 0.074 / inches  # inches a character at 9 points
        at = _share_of_axis(ax, x)
        room = max(room, (share - at) / (1 - share))
    ax.set_xlim(low * (low / high) ** room if log else low - room * (high - low), high)


def _share_of_axis(ax: Axes, x: float) -> float:
    """Return where x lies on the axis, from 0 (left) to 1."""
    low, high = ax.get_xlim()
    return math.log(x / low) / math.log(high / low) if ax.get_xscale() == "log" else (x - low) / (high - low)


def _draw_names(ax: Axes, labels: Sequence[tuple[float, float, str, str]], *, below: bool) -> None:
    """Write names left of and above each point of a front (below, where less is better): no cell can lie there.

    They are moved apart where they overlap.
    """
    low, high = ax.get_ylim()
    lift, gap = (-0.075 if below else 0.075), 0.09
    ordered = sorted(labels, key=lambda label: (label[1], label[0]))
    wanted = [(y - low) / (high - low) + lift for _, y, _, _ in ordered]
    heights = theme.spread_apart(wanted, gap)
    room = max(0.0, 0.05 - min(heights, default=1.0))  # a name below the lowest point stays above the axis
    ax.set_ylim(low - room * (high - low), high)
    for height, (x, y, text, colour) in zip(heights, ordered, strict=True):
        ax.annotate(
            text,
            (x, y),
            xytext=(_share_of_axis(ax, x) - 0.014, low + height * (high - low)),
            textcoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=9,
            zorder=6,
            color=theme.readable_colour(colour),
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.6},
        )


# -- the table -------------------------------------------------------------------------------------------------------

NOTE = (
    "A cell is on a front by its point estimates: no other cell costs no more and scores no worse. "
    "Which neighbours are resolved from each other is said in the text."
)
COST_TITLES = {"trainable": "trainable", "seconds": "train s (solo)", "memory": "memory (solo peak)"}


def _table(f: Findings, by_cost: Sequence[Front]) -> Table:
    columns = (
        Column("cell", "cell"),
        Column("test", metric_title(f, "test"), "right"),
        *(Column(x.cost.key, COST_TITLES[x.cost.key], "right") for x in by_cost),
        Column("on", "on the front of"),
    )
    priced = (r for r in f.results.values() if any(r in x.cells for x in by_cost))
    notes = [NOTE]
    if any(x.cost.same > 1 for x in by_cost):
        notes.append(f"{formatting.capital(EQUAL_COSTS_SENTENCE)}.")
    rows = tuple(_row(f, r, by_cost) for r in priced)
    return Table("pareto", "Costs and fronts", columns, rows, tuple(notes))


def _row(f: Findings, r: Result, by_cost: Sequence[Front]) -> Row:
    costs = (x.cost.text(x.cost.of(r)) for x in by_cost)
    on = ", ".join(x.cost.title for x in by_cost if r in x.on)
    return Row((r.name, plus_minus(f, r), *costs, on or formatting.DASH), run_ids(r))
