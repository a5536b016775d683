"""Where the adapters are: sets of target modules at one rank, and at one number of trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from lorabench.report import theme
from lorabench.report.figures import score_interval
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, plus_minus
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
        return shorten(r.cell.targets, 24) + ("" if self.by_rank else f", r = {r.cell.r}")


def section(f: Findings, e: Evidence, looks: Mapping[str, Look]) -> Section | None:
    """Where two sets of targets are confirmed at one rank, or at one number of parameters."""
    found = groups(f)
    if not found:
        return None
    texts = tuple(_resolved(f, e, g) for g in found)
    return Section("targets", "Where the adapters go", texts, (draw(f, found, looks),), (_table(f, e, found),))


def groups(f: Findings) -> list[Group]:
    """The largest group at equal rank and alpha, the largest of equal parameters."""
    tested = [r for r in f.results.values() if r.cell.adapter and r.test is not None]
    ranked: dict[tuple[object, ...], list[Result]] = {}
    for r in tested:
        ranked.setdefault((r.cell.method, r.cell.r, r.cell.alpha, r.cell.extra), []).append(r)
    matched = [[o for o in tested if _equal(r, o)] for r in tested if r.cell.trainable]
    made = []
    if mine := _widest(list(ranked.values())):
        c = mine[0].cell
        alpha = "" if c.alpha is None else f", α = {c.alpha:.4g}"
        made.append(Group(f"equal rank: r = {c.r}{alpha}", _sorted(f, mine), True))
    if mine := _widest(matched):
        count = formatting.compact(mine[0].cell.trainable)
        made.append(Group(f"equal parameters: about {count}", _sorted(f, mine), False))
    return made


def _equal(least: Result, other: Result) -> bool:
    """No smaller than the first, and within what counts as equal."""
    same = (least.cell.method, least.cell.extra) == (other.cell.method, other.cell.extra)
    return (
        same
        and (other.cell.trainable or 0) >= (least.cell.trainable or 0)
        and parameter_gap(least, other) <= MAX_PARAMETER_GAP
    )


def _widest(found: Sequence[Sequence[Result]]) -> list[Result]:
    """The group of most sets of targets, each once: of two cells with one set that of the lower validation loss."""
    once = []
    for group in found:
        best: dict[str, Result] = {}
        for r in sorted(group, key=lambda r: (r.val_loss is None, r.val_loss or 0.0, r.id)):
            best.setdefault(r.cell.targets, r)
        once.append(list(best.values()))
    widest = max(once, key=len, default=[])
    return widest if len(widest) > 1 else []


def _sorted(f: Findings, cells: Sequence[Result]) -> tuple[Result, ...]:
    sign = 1 if f.metric.lower_is_better else -1
    return tuple(sorted(cells, key=lambda r: (sign * (r.test.mean if r.test else 0.0), r.id)))


def _pivot(f: Findings, g: Group) -> Result:
    """What the others are held against: the declared reference, else the cell that trains most. Never the best on test."""
    declared = [r for r in g.cells if r.id == f.reference]
    return declared[0] if declared else max(g.cells, key=lambda r: (r.cell.trainable or 0, r.cell.r or 0, r.id))


def _resolved(f: Findings, e: Evidence, g: Group) -> str:
    """Which sets differ from the one they are held against."""
    pivot = _pivot(f, g)
    said: dict[str, list[str]] = {"above": [], "below": [], "open": []}
    for r in g.cells:
        made = e.difference(r, pivot)
        if r is pivot:
            continue
        low, high = (0.0, 0.0) if isinstance(made, Missing) else made.interval()
        said["above" if low > 0 else "below" if high < 0 else "open"].append(g.label(r))
    words = {"above": "above", "below": "below", "open": "not resolved from"}
    listed = "; ".join(f"{', '.join(names)} {words[way]} {g.label(pivot)}" for way, names in said.items() if names)
    return f"At {g.title.replace(':', ',', 1)}: {listed} (95 %, exploratory: not adjusted for their number)."


def draw(f: Findings, found: Sequence[Group], looks: Mapping[str, Look]) -> Drawing:
    tall = max(len(g.cells) for g in found)
    with theme.canvas(5.2 if len(found) == 1 else 9.0, 1.3 + 0.34 * tall) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(found), sharex=True))
        for ax, g in zip(axes, found, strict=True):
            _panel(ax, f, g, looks, tall)
        caption = ("Test metric at each cell's chosen rate, best first; bars are 95 % intervals over seeds and test examples."
                   + (f" Parameters count as equal within {MAX_PARAMETER_GAP:.0%}." if not found[-1].by_rank else "")
                   + (" Both panels have one horizontal axis." if len(found) > 1 else "")).replace("%.", " %.")  # fmt: skip
        said = "; ".join(f"{g.title}: " + ", ".join(f"{g.label(r)} {plus_minus(f, r)}" for r in g.cells) for g in found)
        title = f"{f.metric.title[:1].upper() + f.metric.title[1:]} by target modules"
        return theme.render_drawing(
            "targets", title, caption, f"Test {f.metric.axis} by target modules. {said}.", figure
        )


def _panel(ax: Axes, f: Findings, g: Group, looks: Mapping[str, Look], tall: int) -> None:
    for y, r in enumerate(g.cells):
        s = score_interval(f, r)
        assert s is not None
        ax.hlines(y, s[0], s[2], color=looks[r.id].colour, linewidth=2.8, alpha=0.55)
        ax.plot(
            s[1], y, marker="o", color=looks[r.id].colour, markersize=7, markeredgecolor="white", markeredgewidth=0.8
        )
    ax.set_yticks(range(len(g.cells)), [g.label(r) for r in g.cells])
    ax.set_ylim(tall - 0.4, -0.6)
    theme.label_axes(ax, x=f"test {f.metric.axis}", y="", grid="x")
    theme.format_metric_ticks(ax, f.metric, "x")
    ax.tick_params(axis="y", length=0)
    ax.set_title(g.title)


def _table(f: Findings, e: Evidence, found: Sequence[Group]) -> Table:
    unit = f" ({f.metric.measured_in})" if f.metric.measured_in else ""
    columns = (
        Column("group", "compared at"), Column("targets", "targets"), Column("r", "r", "right"), Column("trainable", "trainable", "right"),
        Column("lr", "best lr", "right"), Column("test", f"test {f.metric.title}{unit}", "right"), Column("difference", "Δ (95 %, exploratory)", "right"),
    )  # fmt: skip
    rows = []
    for g in found:
        pivot = _pivot(f, g)
        for r in g.cells:
            texts = (
                g.title, r.cell.targets, str(r.cell.r), formatting.count(r.cell.trainable), formatting.rate(r.lr),
                plus_minus(f, r), "held against" if r is pivot else _difference(f, e, r, pivot),
            )  # fmt: skip
            rows.append(Row(texts, tuple(x.run_id for x in r.runs)))
    note = "Δ: to the row marked “held against” in its group, the declared reference where it is there, else the set that trains most parameters."
    return Table("targets", "Targets at one rank and at one number of parameters", columns, tuple(rows), (note,))


def _difference(f: Findings, e: Evidence, a: Result, b: Result) -> str:
    made = e.difference(a, b)
    return (
        formatting.DASH
        if isinstance(made, Missing)
        else f"{f.metric.difference(made.mean)} ({f.metric.bounds(*made.interval())})"
    )
