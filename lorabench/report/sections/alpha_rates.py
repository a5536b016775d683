"""Heat map of the plane of scale and learning rate: mean validation loss, a panel a rank.

Rules that set alpha are lines on that plane; whether s and the rate can be traded shows as a valley along a diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import seaborn as sns
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle

from lorabench.config import alpha_rules
from lorabench.config.method_names import RSLORA
from lorabench.report import theme
from lorabench.report.section import Section
from lorabench.report.theme import Drawing
from lorabench.results import formatting, units
from lorabench.results.cells import Result
from lorabench.results.evidence import Evidence, scale
from lorabench.results.selection import Rate
from lorabench.results.sweep import Cell, shorten

MAX_PANELS = 9  # panels in one picture
COLOUR_MAP = (
    "cividis_r"  # lightness falls evenly with the loss: the same order for colour-blind readers and in grey print
)
MAX_NUMBERED_COLUMNS = 10  # columns up to which a field holds its number
MAX_WIDE_COLUMNS = 7  # up to which numbers and rates have their full size
MAX_LEVEL_RATE = 6  # characters of a rate that a field is wide


@dataclass(frozen=True)
class Band:
    """One row of a panel: the cell, and what its row is called."""

    label: str
    result: Result


@dataclass(frozen=True)
class Panel:
    """One picture of rates (columns) and scales or ranks (rows)."""

    title: str
    bands: tuple[Band, ...]  # from the smallest scale (or rank) up


def section(e: Evidence) -> Section | None:
    """Return the section where some rank was tuned at two scales or more, or ranks under two alpha rules or more."""
    all_panels = panels(e)
    if not all_panels:
        return None
    drawing = draw(all_panels[:MAX_PANELS], len(all_panels), units.loss_axis(e.sweep, "validation"))
    return Section("alpha_rates", "Alpha and the learning rate", (), (drawing,))


def panels(e: Evidence) -> list[Panel]:
    """Return a panel a rank with the scales as rows; where no rank has two, a panel a rule with the ranks as rows."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for r in e.cells:
        if scale(r.cell) is not None and len(r.choice.rates) > 1:
            groups.setdefault((r.cell.targets, r.cell.extra), []).append(r)
    out = []
    for cells in groups.values():
        suffix = _group_suffix(cells[0].cell) if len(groups) > 1 else ""
        ranks = sorted({r.cell.r or 0 for r in cells})
        by_rank = {n: _scale_bands([r for r in cells if r.cell.r == n]) for n in ranks}
        if any(len(bands) > 1 for bands in by_rank.values()):
            out += [Panel(f"r = {n}{suffix}", tuple(bands)) for n, bands in by_rank.items()]
        else:
            out += _rule_panels(cells, suffix)
    return out


def _group_suffix(cell: Cell) -> str:
    settings = (cell.targets, *(f"{k.split('.')[-1]} {v}" for k, v in cell.extra))
    return "".join(f", {shorten(x, 24)}" for x in settings)


def _scale_bands(cells: Sequence[Result]) -> list[Band]:
    """Return cells of one rank by scale. Rules that meet there list the same runs: one row, under both names."""
    rows: dict[tuple[float, tuple[str, ...]], list[Result]] = {}
    for r in cells:
        s = scale(r.cell)
        assert s is not None
        rows.setdefault((round(math.log2(s), 3), tuple(sorted(r.cell.tune))), []).append(r)
    bands = []
    for _, same_runs in sorted(rows.items(), key=lambda item: item[0]):
        rules = ", ".join(dict.fromkeys(_rule(r.cell) for r in same_runs))
        bands.append(Band(f"s = {scale(same_runs[0].cell):.3g}\n{shorten(rules, 22)}", same_runs[0]))
    return bands


def _rule(cell: Cell) -> str:
    rule = str(cell.alpha_rule or "")
    if not alpha_rules.is_multiple_of_rank(rule) and cell.alpha is not None:
        rule = f"{cell.alpha:.4g}"
    return f"{RSLORA} α = {rule}" if cell.method == RSLORA else f"α = {rule}"


def _rule_panels(cells: Sequence[Result], suffix: str) -> list[Panel]:
    by_rule: dict[str, list[Result]] = {}
    for r in cells:
        by_rule.setdefault(_rule(r.cell), []).append(r)
    if len(by_rule) < 2 or all(len(same_rule) < 2 for same_rule in by_rule.values()):
        return []
    out = []
    for rule, same_rule in by_rule.items():
        ordered = sorted(same_rule, key=lambda r: r.cell.r or 0)
        bands = tuple(Band(f"r = {r.cell.r}\ns = {scale(r.cell):.3g}", r) for r in ordered)
        out.append(Panel(f"{rule}{suffix}", bands))
    return out


# -- the picture -----------------------------------------------------------------------------------------------------


def draw(shown: Sequence[Panel], total: int, loss: str) -> Drawing:
    """Draw the panels. total: how many there are in all. loss: what the colours stand for."""
    choices = [b.result.choice for p in shown for b in p.bands]
    rates = sorted({x.lr for choice in choices for x in choice.rates})
    losses = [x.mean for choice in choices for x in choice.rates if _has_loss(x)]
    norm = PowerNorm(0.5, vmin=min(losses, default=0.0), vmax=max(losses, default=1.0))
    columns = min(len(shown), 2)
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    heights = [max(len(p.bands) for p in row) + 1.5 for row in rows]
    with theme.canvas(5.6 if columns == 1 else 9.6, 0.4 + 0.44 * sum(heights)) as figure:
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(len(shown))]
        for i, (ax, p) in enumerate(zip(axes, shown, strict=True)):
            _draw_panel(ax, p, rates, norm, row_height=max(len(q.bands) for q in rows[i // columns]))
        bar = figure.colorbar(ScalarMappable(norm, COLOUR_MAP), ax=axes, shrink=0.9, aspect=24, pad=0.02)
        ticks = [float(norm.inverse(share)) for share in (0, 0.25, 0.5, 0.75, 1)]
        bar.set_ticks(ticks, labels=[formatting.number(t, 3) for t in ticks])
        bar.set_label(loss)
        bar.outline.set_visible(False)
        title = "Validation loss over scale and learning rate"
        return theme.render_drawing("alpha_rates", title, _caption(shown, total, len(rates)), _alt(shown), figure)


def _has_loss(x: Rate) -> bool:
    return bool(x.losses) and not x.failures and not x.pruned


def _draw_panel(ax: Axes, p: Panel, rates: Sequence[float], norm: PowerNorm, *, row_height: int) -> None:
    """Draw fields of one size in all panels of a row; a panel of fewer bands hangs from the top."""
    ax.grid(False)
    bottom = row_height - len(p.bands)
    for y, band in enumerate(p.bands, bottom):
        for x in band.result.choice.rates:
            _draw_field(ax, rates.index(x.lr), y, x, norm, columns=len(rates))
        if band.result.choice.lr is not None:
            _draw_frame(ax, rates.index(band.result.choice.lr), y)
    ax.set_xlim(-0.04, len(rates) + 0.04)
    ax.set_ylim(-0.06, row_height + 0.06)
    names = [formatting.rate(lr) for lr in rates]
    fit = len(names) <= MAX_WIDE_COLUMNS and max(map(len, names), default=0) <= MAX_LEVEL_RATE
    ax.set_xticks([i + 0.5 for i in range(len(names))], names, rotation=0 if fit else 45)
    ax.set_yticks([bottom + i + 0.5 for i in range(len(p.bands))], [b.label for b in p.bands])
    ax.tick_params(length=0)
    ax.set_xlabel("learning rate")
    ax.set_title(shorten(p.title, theme.MAX_NAME_LENGTH))
    sns.despine(ax=ax, left=True, bottom=True)


def _draw_field(ax: Axes, column: int, y: int, x: Rate, norm: PowerNorm, *, columns: int) -> None:
    """Draw a loss as colour and number.

    A cross where a seed diverged or failed, a bar where the rate was pruned or has not ended.
    """
    corner, centre = (column, y), (column + 0.5, y + 0.5)
    if not _has_loss(x):
        ax.add_patch(Rectangle(corner, 1, 1, facecolor="#F2F2F2", edgecolor="#BBBBBB", hatch="////", linewidth=0))
        ax.plot(*centre, "x" if x.failures else "|", color=theme.INK, markersize=9, markeredgewidth=2)
        return
    colour = colormaps[COLOUR_MAP](float(norm(x.mean)))
    ax.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2))
    if columns <= MAX_NUMBERED_COLUMNS:
        is_light = float(np.dot(colour[:3], [0.299, 0.587, 0.114])) > 0.5
        text = formatting.number(x.mean, 3).removeprefix("0") or formatting.DASH
        size = 8.5 if columns <= MAX_WIDE_COLUMNS else 7.5
        ax.text(*centre, text, ha="center", va="center", fontsize=size, color=theme.INK if is_light else "white")


def _draw_frame(ax: Axes, column: int, y: int) -> None:
    """Draw a frame around the chosen rate: white outside, dark inside, so that it shows on every colour."""
    for width, colour in ((4.6, "white"), (2.2, theme.INK)):
        frame = Rectangle((column + 0.03, y + 0.05), 0.94, 0.9, fill=False, edgecolor=colour, linewidth=width, zorder=4)
        ax.add_patch(frame)


def _caption(shown: Sequence[Panel], total: int, columns: int) -> str:
    choices = [b.result.choice for p in shown for b in p.bands]
    rates = [x for choice in choices for x in choice.rates]
    text = (
        "Mean over the tuning seeds, lighter is better; the colours spread out towards the lowest loss. "
        "Framed: the chosen rate."
    )
    if columns <= MAX_NUMBERED_COLUMNS:
        text += " Numbers are the losses."
    if any(len(choice.rates) < columns for choice in choices):
        text += " White: not tried."
    if any(x.failures for x in rates):
        text += " A cross: a seed diverged or failed there, so the rate is out."
    if any(not _has_loss(x) and not x.failures for x in rates):
        text += " A bar: pruned, or not ended."
    if len(shown) > 1 and shown[0].title.startswith("r = "):
        text += (
            " Rows are scales s of W + s·BA: where s and the rate can be traded, "
            "the best field moves one column for a factor in s."
        )
    return text + (f" {len(shown)} of {total} panels." if total > len(shown) else "")


def _alt(shown: Sequence[Panel]) -> str:
    by_panel = "; ".join(f"{p.title}: {', '.join(map(_band_alt, p.bands))}" for p in shown)
    return f"Mean validation loss over scale and learning rate. {by_panel}."


def _band_alt(band: Band) -> str:
    choice = band.result.choice
    best = "no rate eligible"
    if choice.lr is not None:
        best = f"chosen {formatting.rate(choice.lr)} with {formatting.number(choice.loss, 3)}"
    out = ", ".join(formatting.rate(lr) for lr in choice.ineligible)
    label = band.label.replace("\n", " (") + ")"
    return f"{label} {best}" + (f", out: {out}" if out else "")
