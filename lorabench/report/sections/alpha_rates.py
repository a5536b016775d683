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


@dataclass(frozen=True)
class Band:
    """One row of a panel: the cell, and what its row is called."""

    label: str
    result: Result


@dataclass(frozen=True)
class Panel:
    title: str
    bands: tuple[Band, ...]  # from the smallest scale (or rank) up


def section(e: Evidence) -> Section | None:
    """Where some rank was tuned at two scales or more, or ranks under two rules of alpha or more."""
    found = panels(e)
    if not found:
        return None
    drawn = draw(found[:MAX_PANELS], len(found), units.loss_axis(e.sweep, "validation"))
    return Section("alpha_rates", "Alpha and the learning rate", (), (drawn,))


def panels(e: Evidence) -> list[Panel]:
    """A panel a rank with the scales as rows; where no rank has two, a panel a rule with the ranks as rows."""
    tuned = [r for r in e.cells if scale(r.cell) is not None and len(r.choice.rates) > 1]
    groups: dict[tuple[object, ...], list[Result]] = {}
    for r in tuned:
        groups.setdefault((r.cell.targets, r.cell.extra), []).append(r)
    made = []
    for mine in groups.values():
        said = _where(mine[0].cell) if len(groups) > 1 else ""
        ranks = {n: _scales([r for r in mine if r.cell.r == n]) for n in sorted({r.cell.r or 0 for r in mine})}
        if any(len(bands) > 1 for bands in ranks.values()):
            made += [Panel(f"r = {n}{said}", tuple(bands)) for n, bands in ranks.items()]
        else:
            made += _rules(mine, said)
    return made


def _where(cell: Cell) -> str:
    return "".join(f", {shorten(x, 24)}" for x in (cell.targets, *(f"{k.split('.')[-1]} {v}" for k, v in cell.extra)))


def _scales(cells: Sequence[Result]) -> list[Band]:
    """Cells of one rank by scale. Rules that meet there list the same runs: one row, under both names."""
    rows: dict[tuple[float, tuple[str, ...]], list[Result]] = {}
    for r in cells:
        s = scale(r.cell)
        assert s is not None
        rows.setdefault((round(math.log2(s), 3), tuple(sorted(r.cell.tune))), []).append(r)
    out = []
    for key in sorted(rows):
        s = scale(rows[key][0].cell)
        rules = ", ".join(dict.fromkeys(_rule(r.cell) for r in rows[key]))
        out.append(Band(f"s = {s:.3g}\n{shorten(rules, 22)}", rows[key][0]))
    return out


def _rule(cell: Cell) -> str:
    rule = str(cell.alpha_rule or "")
    if not alpha_rules.is_multiple_of_rank(rule) and cell.alpha is not None:
        rule = f"{cell.alpha:.4g}"
    return f"{RSLORA} α = {rule}" if cell.method == RSLORA else f"α = {rule}"


def _rules(cells: Sequence[Result], said: str) -> list[Panel]:
    rules: dict[str, list[Result]] = {}
    for r in cells:
        rules.setdefault(_rule(r.cell), []).append(r)
    if len(rules) < 2 or all(len(mine) < 2 for mine in rules.values()):
        return []
    return [
        Panel(f"{rule}{said}", tuple(Band(f"r = {r.cell.r}\ns = {scale(r.cell):.3g}", r) for r in sorted(mine, key=lambda r: r.cell.r or 0)))
        for rule, mine in rules.items()
    ]  # fmt: skip


# -- the picture ---------------------------------------------------------------------------------------------------------


def draw(found: Sequence[Panel], of: int, loss: str) -> Drawing:
    """of: panels there are in all. loss: what the colours stand for."""
    rates = sorted({x.lr for p in found for b in p.bands for x in b.result.choice.rates})
    losses = [x.mean for p in found for b in p.bands for x in b.result.choice.rates if _shown(x)]
    norm = PowerNorm(0.5, vmin=min(losses, default=0.0), vmax=max(losses, default=1.0))
    wide = min(len(found), 2)
    rows = [found[i : i + wide] for i in range(0, len(found), wide)]
    heights = [max(len(p.bands) for p in row) + 1.5 for row in rows]
    with theme.canvas(5.6 if wide == 1 else 9.6, 0.4 + 0.44 * sum(heights)) as figure:
        grid = figure.add_gridspec(len(rows), wide, height_ratios=heights)
        axes = [figure.add_subplot(grid[i // wide, i % wide]) for i in range(len(found))]
        for ax, p in zip(axes, found, strict=True):
            _panel(ax, p, rates, norm, tall=max(len(q.bands) for row in rows if p in row for q in row))
        bar = figure.colorbar(ScalarMappable(norm, COLOUR_MAP), ax=axes, shrink=0.9, aspect=24, pad=0.02)
        ticks = [float(norm.inverse(share)) for share in (0, 0.25, 0.5, 0.75, 1)]
        bar.set_ticks(ticks, labels=[formatting.number(t, 3) for t in ticks])
        bar.set_label(loss)
        bar.outline.set_visible(False)
        title = "Validation loss over scale and learning rate"
        return theme.render_drawing("alpha_rates", title, _caption(found, of, len(rates)), _alt(found), figure)


def _shown(x: Rate) -> bool:
    return bool(x.losses) and not x.failures and not x.pruned


def _panel(ax: Axes, p: Panel, rates: Sequence[float], norm: PowerNorm, *, tall: int) -> None:
    """Fields of one size in all panels of a row; a panel of fewer bands hangs from the top."""
    ax.grid(False)
    low = tall - len(p.bands)
    for y, band in enumerate(p.bands, low):
        for x in band.result.choice.rates:
            _field(ax, rates.index(x.lr), y, x, norm, columns=len(rates))
        if band.result.choice.lr is not None:
            _frame(ax, rates.index(band.result.choice.lr), y)
    ax.set_xlim(-0.04, len(rates) + 0.04)
    ax.set_ylim(-0.06, tall + 0.06)
    names = [formatting.rate(lr) for lr in rates]
    fit = len(names) <= 7 and max(map(len, names), default=0) <= 6  # characters that a field is wide
    ax.set_xticks([i + 0.5 for i in range(len(names))], names, rotation=0 if fit else 45)
    ax.set_yticks([low + i + 0.5 for i in range(len(p.bands))], [b.label for b in p.bands])
    ax.tick_params(length=0)
    ax.set_xlabel("learning rate")
    ax.set_title(shorten(p.title, theme.MAX_NAME_LENGTH))
    sns.despine(ax=ax, left=True, bottom=True)


def _field(ax: Axes, i: int, y: int, x: Rate, norm: PowerNorm, *, columns: int) -> None:
    """A loss as colour and number; a cross where a seed diverged or failed, a bar where it was pruned or has not ended."""
    if not _shown(x):
        ax.add_patch(Rectangle((i, y), 1, 1, facecolor="#F2F2F2", edgecolor="#BBBBBB", hatch="////", linewidth=0))
        ax.plot(i + 0.5, y + 0.5, "x" if x.failures else "|", color=theme.INK, markersize=9, markeredgewidth=2)
        return
    colour = colormaps[COLOUR_MAP](float(norm(x.mean)))
    ax.add_patch(Rectangle((i, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2))
    if columns <= MAX_NUMBERED_COLUMNS:
        wide = columns <= 7
        light = float(np.dot(colour[:3], [0.299, 0.587, 0.114])) > 0.5
        text = formatting.number(x.mean, 3).removeprefix("0") or formatting.DASH
        ax.text(
            i + 0.5,
            y + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=8.5 if wide else 7.5,
            color=theme.INK if light else "white",
        )


def _frame(ax: Axes, i: int, y: int) -> None:
    """Around the chosen rate: white outside, dark inside, so that it shows on every colour."""
    for width, colour in ((4.6, "white"), (2.2, theme.INK)):
        ax.add_patch(
            Rectangle((i + 0.03, y + 0.05), 0.94, 0.9, fill=False, edgecolor=colour, linewidth=width, zorder=4)
        )


def _caption(found: Sequence[Panel], of: int, columns: int) -> str:
    every = [x for p in found for b in p.bands for x in b.result.choice.rates]
    text = "Mean over the tuning seeds, lighter is better; the colours spread out towards the lowest loss. Framed: the chosen rate."
    if columns <= MAX_NUMBERED_COLUMNS:
        text += " Numbers are the losses."
    if any(len(b.result.choice.rates) < columns for p in found for b in p.bands):
        text += " White: not tried."
    if any(x.failures for x in every):
        text += " A cross: a seed diverged or failed there, so the rate is out."
    if any(not _shown(x) and not x.failures for x in every):
        text += " A bar: pruned, or not ended."
    if len(found) > 1 and found[0].title.startswith("r = "):
        text += " Rows are scales s of W + s·BA: where s and the rate can be traded, the best field moves one column for a factor in s."
    return text + (f" {len(found)} of {of} panels." if of > len(found) else "")


def _alt(found: Sequence[Panel]) -> str:
    said = []
    for p in found:
        rows = []
        for b in p.bands:
            choice = b.result.choice
            best = (
                "no rate eligible"
                if choice.lr is None
                else f"chosen {formatting.rate(choice.lr)} with {formatting.number(choice.loss, 3)}"
            )
            out = [formatting.rate(lr) for lr in choice.ineligible]
            label = b.label.replace("\n", " (") + ")"
            rows.append(f"{label} {best}" + (f", out: {', '.join(out)}" if out else ""))
        said.append(f"{p.title}: {', '.join(rows)}")
    return "Mean validation loss over scale and learning rate. " + "; ".join(said) + "."
