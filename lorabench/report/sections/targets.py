"""Where the adapters are: sets of target modules at one rank, and at one number of trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from lorabench.report import theme
from lorabench.report.figures import score_interval
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, metric_title, plus_minus, run_ids
from lorabench.report.theme import Drawing, Look
from lorabench.results import formatting
from lorabench.results.best_rate import Missing
from lorabench.results.cells import Result
from lorabench.results.evidence import MAX_PARAMETER_GAP, Evidence, parameter_gap
from lorabench.results.findings import Findings
from lorabench.results.sweep import shorten


@dataclass(frozen=True)
class Group:
    """Cells of one method that differ in their targets, best first on test."""

    title: str
    cells: tuple[Result, ...]
    by_rank: bool

    def label(self, r: Result) -> str:
        """Return what a cell is called inside its group."""
        return shorten(r.cell.targets, 24) + ("" if self.by_rank else f", r = {r.cell.r}")


def section(f: Findings, e: Evidence, looks: Mapping[str, Look]) -> Section | None:
    """Return the section where two sets of targets are confirmed at one rank, or at one number of parameters."""
    compared = groups(f)
    if not compared:
        return None
    texts = tuple(_verdict_sentence(f, e, g) for g in compared)
    tables = (_table(f, e, compared),)
    return Section("targets", "Where the adapters go", texts, (draw(f, compared, looks),), tables)


def groups(f: Findings) -> list[Group]:
    """Return the largest group at equal rank and alpha, and the largest of equal parameters."""
    tested = [r for r in f.results.values() if r.cell.adapter and r.test is not None]
    by_rank: dict[tuple[object, ...], list[Result]] = {}
    for r in tested:
        by_rank.setdefault((r.cell.method, r.cell.r, r.cell.alpha, r.cell.extra), []).append(r)
    by_size = [[o for o in tested if _has_equal_parameters(r, o)] for r in tested if r.cell.trainable]
    widest = []
    if cells := _widest(list(by_rank.values())):
        first = cells[0].cell
        alpha = "" if first.alpha is None else f", α = {first.alpha:.4g}"
        widest.append(Group(f"equal rank: r = {first.r}{alpha}", _best_first(f, cells), True))
    if cells := _widest(by_size):
        count = formatting.compact(cells[0].cell.trainable)
        widest.append(Group(f"equal parameters: about {count}", _best_first(f, cells), False))
    return widest


def _has_equal_parameters(smallest: Result, other: Result) -> bool:
    """Whether a cell is no smaller than another, and within what counts as equal."""
    same = (smallest.cell.method, smallest.cell.extra) == (other.cell.method, other.cell.extra)
    larger = (other.cell.trainable or 0) >= (smallest.cell.trainable or 0)
    return same and larger and parameter_gap(smallest, other) <= MAX_PARAMETER_GAP


def _widest(candidates: Sequence[Sequence[Result]]) -> list[Result]:
    """Return the group of most sets of targets, each once.

    Of two cells with one set it is that of the lower validation loss.
    """
    unique = []
    for group in candidates:
        best: dict[str, Result] = {}
        for r in sorted(group, key=lambda r: (r.val_loss is None, r.val_loss or 0.0, r.id)):
            best.setdefault(r.cell.targets, r)
        unique.append(list(best.values()))
    widest = max(unique, key=len, default=[])
    return widest if len(widest) > 1 else []


def _best_first(f: Findings, cells: Sequence[Result]) -> tuple[Result, ...]:
    sign = 1 if f.metric.lower_is_better else -1
    return tuple(sorted(cells, key=lambda r: (sign * (r.test.mean if r.test else 0.0), r.id)))


def _pivot(f: Findings, g: Group) -> Result:
    """Return what the others are held against: the declared reference, else the cell that trains most.

    Never the best on test.
    """
    declared = [r for r in g.cells if r.id == f.reference]
    return declared[0] if declared else max(g.cells, key=lambda r: (r.cell.trainable or 0, r.cell.r or 0, r.id))


def _verdict_sentence(f: Findings, e: Evidence, g: Group) -> str:
    """Return which sets differ from the one they are held against."""
    pivot = _pivot(f, g)
    labels: dict[str, list[str]] = {"above": [], "below": [], "not resolved from": []}
    for r in g.cells:
        if r is pivot:
            continue
        difference = e.difference(r, pivot)
        low, high = (0.0, 0.0) if isinstance(difference, Missing) else difference.interval()
        labels["above" if low > 0 else "below" if high < 0 else "not resolved from"].append(g.label(r))
    verdicts = "; ".join(f"{', '.join(names)} {way} {g.label(pivot)}" for way, names in labels.items() if names)
    return f"At {g.title.replace(':', ',', 1)}: {verdicts} (95 %, exploratory: not adjusted for their number)."


# -- the picture -----------------------------------------------------------------------------------------------------


def draw(f: Findings, compared: Sequence[Group], looks: Mapping[str, Look]) -> Drawing:
    """Draw a dot with its interval a cell, a panel a group."""
    rows = max(len(g.cells) for g in compared)
    with theme.canvas(5.2 if len(compared) == 1 else 9.0, 1.3 + 0.34 * rows) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(compared), sharex=True))
        for ax, g in zip(axes, compared, strict=True):
            _draw_panel(ax, f, g, looks, rows)
        scores = "; ".join(
            f"{g.title}: " + ", ".join(f"{g.label(r)} {plus_minus(f, r)}" for r in g.cells) for g in compared
        )
        title = f"{f.metric.title[:1].upper() + f.metric.title[1:]} by target modules"
        alt = f"Test {f.metric.axis} by target modules. {scores}."
        return theme.render_drawing("targets", title, _caption(compared), alt, figure)


def _caption(compared: Sequence[Group]) -> str:
    text = "Test metric at each cell's chosen rate, best first; bars are 95 % intervals over seeds and test examples."
    if not compared[-1].by_rank:
        text += f" Parameters count as equal within {100 * MAX_PARAMETER_GAP:.0f} %."
    if len(compared) > 1:
        text += " Both panels have one horizontal axis."
    return text


def _draw_panel(ax: Axes, f: Findings, g: Group, looks: Mapping[str, Look], rows: int) -> None:
    """Draw one group. rows: of the longest, so that rows are equally far apart in all panels."""
    for y, r in enumerate(g.cells):
        interval = score_interval(f, r)
        assert interval is not None
        low, mean, high = interval
        ax.hlines(y, low, high, color=looks[r.id].colour, linewidth=2.8, alpha=0.55)
        theme.draw_point(ax, mean, y, looks[r.id], zorder=2, marker="o")
    ax.set_yticks(range(len(g.cells)), [g.label(r) for r in g.cells])
    ax.set_ylim(rows - 0.4, -0.6)
    theme.label_axes(ax, x=f"test {f.metric.axis}", y="", grid="x")
    theme.format_metric_ticks(ax, f.metric, "x")
    ax.tick_params(axis="y", length=0)
    ax.set_title(g.title)


# -- the table -------------------------------------------------------------------------------------------------------

NOTE = (
    "Δ: to the row marked “held against” in its group, the declared reference where it is there, "
    "else the set that trains most parameters."
)


def _table(f: Findings, e: Evidence, compared: Sequence[Group]) -> Table:
    columns = (
        Column("group", "compared at"),
        Column("targets", "targets"),
        Column("r", "r", "right"),
        Column("trainable", "trainable", "right"),
        Column("lr", "best lr", "right"),
        Column("test", metric_title(f, "test"), "right"),
        Column("difference", "Δ (95 %, exploratory)", "right"),
    )
    rows = tuple(_row(f, e, g, r) for g in compared for r in g.cells)
    return Table("targets", "Targets at one rank and at one number of parameters", columns, rows, (NOTE,))


def _row(f: Findings, e: Evidence, g: Group, r: Result) -> Row:
    pivot = _pivot(f, g)
    texts = (
        g.title,
        r.cell.targets,
        str(r.cell.r),
        formatting.count(r.cell.trainable),
        formatting.rate(r.lr),
        plus_minus(f, r),
        "held against" if r is pivot else _difference(f, e, r, pivot),
    )
    return Row(texts, run_ids(r))


def _difference(f: Findings, e: Evidence, a: Result, b: Result) -> str:
    difference = e.difference(a, b)
    if isinstance(difference, Missing):
        return formatting.DASH
    return f"{f.metric.difference(difference.mean)} ({f.metric.bounds(*difference.interval())})"
