"""What a point of the metric costs: parameters, seconds and memory of a cell against its test metric, and the fronts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from lorabench.report import theme
from lorabench.report.figures import score_interval
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, plus_minus
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
    """Measured alone: its solo steps scaled to a run, or runs that had their base to themselves."""
    measured = r.timed.get("seconds") or r.resource("solo_seconds") is not None
    return r.seconds if measured or _alone(r) else None


def _memory(r: Result) -> float | None:
    measured = r.timed.get("peak_memory_bytes") or r.resource("solo_peak_memory_bytes")
    return r.memory if measured or _alone(r) else None


def _alone(r: Result) -> bool:
    return bool(r.runs) and all(x.resources.get("pack_size") == 1 for x in r.runs)


COSTS = (
    Cost("trainable", "trainable parameters", "trainable parameters (log scale)", lambda r: r.cell.trainable, formatting.count, log=True),
    Cost("seconds", "training time", "seconds of a run alone", _seconds, formatting.seconds, same=EQUAL_COST_FACTOR),
    Cost("memory", "peak memory", "peak memory alone", _memory, formatting.memory, same=EQUAL_COST_FACTOR),
)  # fmt: skip


def section(f: Findings, e: Evidence, looks: Mapping[str, Look]) -> Section | None:
    """Where three cells or more have a test result and a cost."""
    found = fronts(f)
    if not found:
        return None
    texts = (*(_said(f, e, front) for front in found), *_alike(f))
    return Section("pareto", "What a point costs", texts, (draw(f, found, looks),), (_table(f, found),))


def fronts(f: Findings) -> list[Front]:
    """Of the costs that tell cells apart."""
    made = [(cost, _priced(f, cost)) for cost in COSTS]
    return [
        Front(cost, cells, front(f, cost, cells))
        for cost, cells in made
        if len(cells) >= MIN_CELLS and _apart(cost, cells)
    ]


def _priced(f: Findings, cost: Cost) -> tuple[Result, ...]:
    """Tested cells that have the cost, cheapest first; one of those that are the same runs."""
    tested = unique_results([r for r in f.results.values() if r.test is not None])
    return tuple(sorted((r for r in tested if cost.of(r)), key=lambda r: (cost.of(r) or 0.0, r.id)))


def _apart(cost: Cost, cells: Sequence[Result]) -> bool:
    return (cost.of(cells[-1]) or 0.0) > (cost.of(cells[0]) or 0.0) * cost.same


def _alike(f: Findings) -> Iterator[str]:
    """A cost that is the same for all says so, as there is no front of it."""
    for cost in COSTS:
        cells = _priced(f, cost)
        if len(cells) >= MIN_CELLS and not _apart(cost, cells):
            within = f" within {PER_CENT} %" if cost.same > 1 else ""
            unit = " s" if cost.key == "seconds" else ""
            yield f"{formatting.capital(cost.title)}: the same{within} for all, {cost.text(cost.of(cells[0]))}{unit}."


def front(f: Findings, cost: Cost, cells: Sequence[Result]) -> tuple[Result, ...]:
    """Cells that no other beats by its point estimate: none costs no more, does no worse, and is better in one of the two.
    Costs within `cost.same` of each other are equal here."""
    sign = -1.0 if f.metric.lower_is_better else 1.0
    at = {r.id: (cost.of(r) or 0.0, sign * (r.test.mean if r.test else 0.0)) for r in cells}

    def beaten(r: Result) -> bool:
        x, y = at[r.id]
        return any(a <= x * cost.same and b >= y and (a * cost.same < x or b > y) for a, b in at.values())

    return tuple(r for r in cells if not beaten(r))


def unresolved(e: Evidence, on: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Neighbours on a front whose difference on test is not shown: its 95 % interval holds zero, or there is none."""
    out = []
    for a, b in pairwise(on):
        made = e.difference(a, b)
        if isinstance(made, Missing) or made.interval()[0] <= 0 <= made.interval()[1]:
            out.append((a, b))
    return out


def _said(f: Findings, e: Evidence, made: Front) -> str:
    names = ", ".join(r.name for r in made.on)
    open_pairs = unresolved(e, made.on)
    text = f"{formatting.capital(made.cost.title)}: on the front, from cheap to dear, {names}."
    if len(made.on) == 1:
        more = (made.cost.of(made.on[0]) or 0.0) / (made.cost.of(made.cells[0]) or 1.0) - 1
        return (
            f"{text} It costs {f'{100 * more:.1f} % more than the cheapest' if more > 0 else 'least'} and scores best."
        )
    if not open_pairs:
        return f"{text} Each is resolved from its neighbour (95 %, exploratory)."
    pairs = "; ".join(f"{a.name} and {b.name}" for a, b in open_pairs)
    return (
        f"{text} Not resolved from each other (95 %, exploratory): {pairs}. A new sweep may put them in another order."
    )


# -- the picture ---------------------------------------------------------------------------------------------------------


def draw(f: Findings, found: Sequence[Front], looks: Mapping[str, Look]) -> Drawing:
    """A panel a cost, one below the other."""
    with theme.canvas(
        theme.panel_width(shorten(r.name, MAX_POINT_NAME) for made in found for r in made.on), 0.3 + 2.4 * len(found)
    ) as figure:
        axes = np.atleast_1d(figure.subplots(len(found), 1, sharey=True))
        for ax, made in zip(axes, found, strict=True):
            _panel(ax, f, made, looks)
        costs = ", ".join(made.cost.title for made in found)
        caption = ("In colour and joined: cells that no other beats on both axes, by their point estimates. Grey: the others. Bars are 95 % intervals over "
                   "seeds and test examples.")  # fmt: skip
        if measured := [made.cost.key for made in found if made.cost.same > 1]:
            caption += f" {formatting.capital(' and '.join(measured))} {'are' if len(measured) > 1 or measured == ['seconds'] else 'is'} of a cell measured alone; {EQUAL_COSTS_SENTENCE}."
        alt = f"Test {f.metric.axis} against {costs}. " + " ".join(_alt(f, made) for made in found)
        return theme.render_drawing(
            "pareto", f"{f.metric.title[:1].upper() + f.metric.title[1:]} against its cost", caption, alt, figure
        )


def _alt(f: Findings, made: Front) -> str:
    said = "; ".join(f"{r.name} {made.cost.text(made.cost.of(r))}, {plus_minus(f, r)}" for r in made.on)
    return f"On the front of {made.cost.title}: {said}."


def _panel(ax: Axes, f: Findings, made: Front, looks: Mapping[str, Look]) -> None:
    scale, unit = _unit(made)
    if made.cost.log:
        ax.set_xscale("log")
    else:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    xy = {r.id: ((made.cost.of(r) or 0.0) / scale, *(score_interval(f, r) or (0.0, 0.0, 0.0))) for r in made.cells}
    for r in made.cells:
        x, low, mean, high = xy[r.id]
        on = r in made.on
        colour = looks[r.id].colour if on else BEATEN_COLOUR
        ax.vlines(
            x, low, high, color=colour, linewidth=2.6 if on else 1.8, alpha=0.55 if on else 0.7, zorder=4 if on else 2
        )
        ax.plot(
            x,
            mean,
            marker=looks[r.id].marker,
            color=colour,
            markersize=7 if on else 5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=5 if on else 3,
        )
    ax.plot(
        [xy[r.id][0] for r in made.on],
        [xy[r.id][2] for r in made.on],
        drawstyle="steps-post",
        color=INK,
        linewidth=1.1,
        zorder=2.5,
    )
    theme.label_axes(ax, x=f"{made.cost.axis}{unit}", y=f"test {f.metric.axis}")
    theme.format_metric_ticks(ax, f.metric)
    if made.cost.log:
        _decades(ax, [xy[r.id][0] for r in made.cells])
    ax.margins(y=0.13)  # a name beyond the outermost point stays inside
    names = [(xy[r.id][0], xy[r.id][2], shorten(r.name, MAX_POINT_NAME), looks[r.id].colour) for r in made.on]
    _room(ax, [(x, text) for x, _, text, _ in names])
    _names(ax, names, below=f.metric.lower_is_better)


def _unit(made: Front) -> tuple[float, str]:
    """What a number on the axis stands for, and its name: memory in the unit that the table has it in."""
    if made.cost.key != "memory":
        return 1, ""
    gib = all((made.cost.of(r) or 0) >= 2**30 for r in made.cells)
    return (2**30, " (GiB)") if gib else (2**20, " (MiB)")


def _decades(ax: Axes, values: Sequence[float]) -> None:
    """Ticks at powers of ten, at 2 and 5 too where they are few."""
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [t for p in powers for k in steps if low / 1.5 <= (t := k * 10.0**p) <= high * 1.5]
    ax.set_xticks(ticks, [formatting.compact(t).replace(".0 ", " ") for t in ticks])
    ax.minorticks_off()


def _room(ax: Axes, names: Sequence[tuple[float, str]]) -> None:
    """Left of the cheapest cells for the names that end at each x."""
    low, high = ax.get_xlim()
    log = ax.get_xscale() == "log"
    figure = ax.get_figure(root=True)
    assert figure is not None
    inches = figure.get_figwidth() - 0.9  # of the axis; the layout settles later
    room = 0.05
    for x, text in names:
        at = math.log(x / low) / math.log(high / low) if log else (x - low) / (high - low)
        share = 0.03 + len(text) * 0.074 / inches  # inches a character at 9 points
        room = max(room, (share - at) / (1 - share))
    ax.set_xlim(low * (low / high) ** room if log else low - room * (high - low), high)


def _names(ax: Axes, labels: Sequence[tuple[float, float, str, str]], *, below: bool) -> None:
    """Left of and above each point of a front (below, where less is better): no cell can lie there. Moved apart where they overlap."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    log = ax.get_xscale() == "log"
    lift, gap = (-0.075 if below else 0.075), 0.09
    ordered = sorted(labels, key=lambda label: (label[1], label[0]))
    wanted = [(y - low) / (high - low) + lift for _, y, _, _ in ordered]
    places = theme.spread_apart(wanted, gap)
    room = max(0.0, 0.05 - min(places, default=1.0)) * (
        high - low
    )  # a name below the lowest point stays above the axis
    ax.set_ylim(low - room, high)
    for at, (x, y, text, colour) in zip(places, ordered, strict=True):
        across = math.log(x / left) / math.log(right / left) if log else (x - left) / (right - left)
        ax.annotate(
            text, (x, y), xytext=(across - 0.014, low + at * (high - low)), textcoords=("axes fraction", "data"), ha="right", va="center", fontsize=9, zorder=6,
            color=theme.readable_colour(colour), bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.6},
        )  # fmt: skip


def _table(f: Findings, found: Sequence[Front]) -> Table:
    unit = f" ({f.metric.measured_in})" if f.metric.measured_in else ""
    titles = {"trainable": "trainable", "seconds": "train s (solo)", "memory": "memory (solo peak)"}
    columns = (
        Column("cell", "cell"), Column("test", f"test {f.metric.title}{unit}", "right"),
        *(Column(made.cost.key, titles[made.cost.key], "right") for made in found), Column("on", "on the front of"),
    )  # fmt: skip
    rows = []
    for r in (r for r in f.results.values() if any(r in made.cells for made in found)):
        costs = tuple(made.cost.text(made.cost.of(r)) for made in found)
        on = ", ".join(made.cost.title for made in found if r in made.on)
        rows.append(Row((r.name, plus_minus(f, r), *costs, on or formatting.DASH), tuple(x.run_id for x in r.runs)))
    notes = [
        "A cell is on a front by its point estimates: no other cell costs no more and scores no worse. Which neighbours are resolved from each other is said in the text."
    ]
    if any(made.cost.same > 1 for made in found):
        notes.append(f"{formatting.capital(EQUAL_COSTS_SENTENCE)}.")
    return Table("pareto", "Costs and fronts", columns, tuple(rows), tuple(notes))
