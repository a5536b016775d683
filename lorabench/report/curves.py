"""Curves: validation loss over the learning rates tried, and how the chosen runs trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from lorabench.config import alpha_rules
from lorabench.report import theme
from lorabench.report.theme import Drawing, Look
from lorabench.results import formatting, units
from lorabench.results.cells import Result
from lorabench.results.findings import Findings
from lorabench.results.selection import Rate
from lorabench.results.sweep import shorten
from lorabench.store.records import Record

MAX_TRAINING_CURVES = 8  # cells in one picture of training curves
MAX_CURVE_POINTS = 160  # of one training curve
MAX_MARKED_STEPS = 12  # up to which every step of a curve has a marker

# -- learning rates --------------------------------------------------------------------------------------------------


NO_ADAPTERS = "without adapters"  # the panel of all other methods


def draw_learning_rates(f: Findings, looks: Mapping[str, Look]) -> Drawing | None:
    """Draw the mean validation loss over the tuning seeds against the rate.

    A panel a family of adapters, one for all other methods.
    """
    tuned = [r for r in f.results.values() if len(_finished_rates(r)) > 1]
    if not tuned:
        return None
    panels: dict[str, list[Result]] = {}
    for r in tuned:
        panels.setdefault(family(r), []).append(r)
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    width = theme.panel_width(r.name for r in tuned) if columns == 1 else 9.0
    with theme.canvas(width, 0.4 + 3.2 * rows, between=0.1) as figure:
        axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(panels))]
        adapter_ranges = [_loss_range(cells) for name, cells in panels.items() if name != NO_ADAPTERS]
        loss = units.loss_axis(f.sweep, "validation")
        for ax, (name, cells) in zip(axes, panels.items(), strict=True):
            ranges = [_loss_range(cells)] if name == NO_ADAPTERS else adapter_ranges
            low, high = min(a for a, _ in ranges), max(b for _, b in ranges)
            _draw_rate_panel(ax, cells, looks, low, high, name if len(panels) > 1 else "", loss=loss)
        caption = _rates_caption(tuned, len(panels), len(adapter_ranges))
        title = "Validation loss against the learning rate"
        return theme.render_drawing("learning_rates", title, caption, _rates_alt(tuned), figure)


def _rates_caption(tuned: Sequence[Result], panels: int, adapter_panels: int) -> str:
    dots = any(len(rate.losses) > 1 for r in tuned for rate in _finished_rates(r))
    seeds = "Mean over the tuning seeds; small dots are single seeds, a" if dots else "One tuning seed; the"
    caption = f"{seeds} filled point is the chosen rate."
    if any(r.choice.ineligible for r in tuned):
        caption += " A cross at the top: a seed diverged or failed there, so the rate is out."
    if any(x.pruned for r in tuned for x in r.choice.rates):
        caption += " A bar at the top: pruned there before its end, so it has no loss to show."
    if panels > 1 and adapter_panels > 1:
        caption += " Panels of adapters share their vertical axis."
    elif panels > 1:
        caption += " Each panel has axes of its own."
    return caption


def _finished_rates(r: Result) -> list[Rate]:
    """Return the rates that have a loss to show: that of a pruned one is of an earlier step."""
    return [x for x in r.choice.rates if x.losses and not x.pruned]


def family(r: Result) -> str:
    """Return the panel of a cell: its method, its rule for alpha, and what else is varied."""
    if not r.cell.adapter:
        return NO_ADAPTERS
    rule = alpha_rules.without_scaling(alpha_rules.round_alpha(r.cell.alpha_rule))  # the method's name says that part
    alpha = [f"α = {rule}"] if rule else []  # VeRA has none
    return ", ".join([r.cell.method, *alpha, *(f"{k.split('.')[-1]} {v}" for k, v in r.cell.extra)])


def _loss_range(cells: Sequence[Result]) -> tuple[float, float]:
    losses = [x for r in cells for rate in _finished_rates(r) for x in rate.losses]
    return min(losses), max(losses)


def _draw_rate_panel(
    ax: Axes, cells: Sequence[Result], looks: Mapping[str, Look], low: float, high: float, title: str, *, loss: str
) -> None:
    """Draw the rates of some cells between two losses. loss: the axis's title."""
    room = 0.08 * (high - low or 1.0)
    theme.set_rate_axis(ax, [x.lr for r in cells for x in r.choice.rates])
    for i, r in enumerate(cells):
        _draw_rate_curve(ax, r, looks[r.id], high + room)
        for x in r.choice.rates:
            if x.pruned and not x.failures:
                beside = 1.05 ** (i - (len(cells) - 1) / 2)  # cells are often pruned at the same rate
                _draw_mark(ax, x.lr * beside, high + room, "|", looks[r.id])
    ax.set_ylim(low - room, high + 1.6 * room)
    theme.label_axes(ax, x="learning rate (log scale)", y=loss)
    ax.set_title(shorten(title, theme.MAX_NAME_LENGTH))
    # Under a panel's title a rank alone names a cell, unless two cells have it.
    by_rank = bool(title) and all(r.cell.adapter for r in cells) and len({r.cell.r for r in cells}) == len(cells)
    ends = [(r, _finished_rates(r)[-1]) for r in cells]
    labels = [(x.lr, x.mean, f"r = {r.cell.r}" if by_rank else r.name, looks[r.id].colour) for r, x in ends]
    theme.draw_end_labels(ax, labels)


def _draw_rate_curve(ax: Axes, r: Result, look: Look, top: float) -> None:
    """Draw means, single seeds and the chosen rate. top: where rates that are out are marked."""
    finished = _finished_rates(r)
    means = [x.mean for x in finished]
    ax.plot([x.lr for x in finished], means, color=look.colour, linestyle=look.dashes, zorder=3)
    for x in finished:
        if len(x.losses) > 1:
            ax.plot([x.lr] * len(x.losses), x.losses, ".", color=look.colour, markersize=3.5, alpha=0.6, zorder=3)
        _draw_rate_point(ax, x, look, chosen=x.lr == r.choice.lr)
    for x in r.choice.rates:
        if x.failures:
            _draw_mark(ax, x.lr, top, "x", look)


def _draw_rate_point(ax: Axes, rate: Rate, look: Look, *, chosen: bool) -> None:
    ax.plot(
        rate.lr,
        rate.mean,
        marker=look.marker,
        markersize=8.5 if chosen else 5,
        color=look.colour,
        markerfacecolor=look.colour if chosen else "white",
        markeredgewidth=1.3,
        zorder=5 if chosen else 4,
    )


def _draw_mark(ax: Axes, x: float, y: float, marker: str, look: Look) -> None:
    ax.plot(x, y, marker=marker, markersize=7, markeredgewidth=2, color=look.colour, zorder=5, clip_on=False)


def _rates_alt(tuned: Sequence[Result]) -> str:
    cells = []
    for r in tuned:
        choice = r.choice
        text = f"{r.name} over {formatting.rate(choice.rates[0].lr)} to {formatting.rate(choice.rates[-1].lr)}, "
        if choice.lr:
            text += f"lowest at {formatting.rate(choice.lr)} ({formatting.number(choice.loss, 3)})"
        else:
            text += "no rate eligible"
        if choice.ineligible:
            text += f", out: {', '.join(formatting.rate(lr) for lr in choice.ineligible)}"
        if pruned := [formatting.rate(x.lr) for x in choice.rates if x.pruned and not x.failures]:
            text += f", pruned: {', '.join(pruned)}"
        cells.append(text)
    return "Validation loss against the learning rate: " + "; ".join(cells) + "."


# -- training curves -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One value over steps, among the runs of a cell. Shapes: [n] each."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def draw_training(f: Findings, looks: Mapping[str, Look]) -> Drawing | None:
    """Draw training loss (smoothed) and the validation metric over steps, for the runs behind each cell's numbers."""
    shown = _shown_cells(f)
    score = f"val/{f.sweep.metric}"
    losses = {r.id: c for r in shown if (c := _curve(f, r.runs, "train/loss", smooth=True))}
    scores = {r.id: c for r in shown if (c := _curve(f, r.runs, score))}
    if not losses and not scores:
        return None
    with theme.canvas(8.6, 3.5) as figure:
        left, right = figure.subplots(1, 2)
        for r in shown:
            if r.id in losses:
                _draw_curve(left, losses[r.id], looks[r.id], marked=False)
            if r.id in scores:
                _draw_curve(right, scores[r.id], looks[r.id], marked=True)
        theme.label_axes(left, x="optimizer step", y=units.loss_axis(f.sweep, "training"))
        theme.label_axes(right, x="optimizer step", y=f"validation {f.metric.axis}")
        theme.format_metric_ticks(right, f.metric)
        ends = scores or losses
        labels = [_end_label(ends[r.id], r, looks[r.id]) for r in shown if r.id in ends]
        theme.draw_end_labels(right if scores else left, labels, size=9)
        caption, alt = _training_caption(f, len(shown)), _training_alt(f, shown, scores)
        return theme.render_drawing("training", "How the chosen runs trained", caption, alt, figure)


def _training_caption(f: Findings, shown: int) -> str:
    caption = (
        f"{'Confirmation' if f.confirmed else 'Tuning'} runs at the chosen rate, mean over seeds; bands span the seeds. "
        "The training loss is smoothed (exponential, over a twentieth of the steps)."
    )
    if shown < len([r for r in f.results.values() if r.runs]):
        caption += f" {shown} of {len(f.results)} cells."
    return caption


def _training_alt(f: Findings, shown: Sequence[Result], scores: Mapping[str, Curve]) -> str:
    ends = "; ".join(
        f"{r.name} ends at {f.metric.value(float(scores[r.id].mean[-1]))}" for r in shown if r.id in scores
    )
    alt = f"Training loss and validation {f.metric.axis} against the optimizer step"
    return f"{alt}: {ends}." if ends else f"{alt}."


def _end_label(curve: Curve, r: Result, look: Look) -> theme.Label:
    return float(curve.steps[-1]), float(curve.mean[-1]), r.name, look.colour


def _shown_cells(f: Findings) -> list[Result]:
    """Return all cells while they are few; else those the answer names, the controls, and some along the ladder."""
    with_runs = [r for r in f.results.values() if r.runs]
    if len(with_runs) <= MAX_TRAINING_CURVES:
        return with_runs
    recommended = f.recommendation.cell if f.recommendation else None
    names = {f.best, f.reference, recommended, *(c.other for c in f.controls.values())}
    named = [r for r in with_runs if r.id in names]
    adapters = [r for r in with_runs if r.cell.adapter and r.id not in names]
    places = MAX_TRAINING_CURVES - len(named)
    step = (len(adapters) - 1) / max(1, places - 1)
    along = [adapters[round(i * step)] for i in range(places)] if adapters else []
    return [r for r in with_runs if r in named or r in along]


def _curve(f: Findings, runs: Sequence[Record], name: str, *, smooth: bool = False) -> Curve | None:
    """Return a logged value over the steps that every run has; None where they have none in common."""
    series = []
    for r in runs:
        rows = {row["step"]: row[name] for row in f.sweep.store.history(r.run_id) if row.get(name) is not None}
        if rows:
            series.append(rows)
    steps = sorted(set.intersection(*(set(s) for s in series))) if series else []
    if not steps:
        return None
    y = np.array([[s[t] for t in steps] for s in series], dtype=np.float64)  # [runs, steps]
    if smooth:
        y = _smooth(y, span=max(1, len(steps) // 20))
    keep = np.unique(np.linspace(0, len(steps) - 1, min(MAX_CURVE_POINTS, len(steps))).round().astype(int))
    y = y[:, keep]
    return Curve(np.array(steps)[keep], y.mean(0), y.min(0), y.max(0))


def _smooth(y: np.ndarray, *, span: int) -> np.ndarray:
    """Return the exponential moving average of [runs, steps] along steps.

    Its start is corrected (Kingma & Ba 2015, section 3).
    """
    decay = 1 - 2 / (span + 1)
    out, total, weight = np.empty_like(y), np.zeros(len(y)), 0.0
    for t in range(y.shape[1]):
        total, weight = decay * total + y[:, t], decay * weight + 1
        out[:, t] = total / weight
    return out


def _draw_curve(ax: Axes, curve: Curve, look: Look, *, marked: bool) -> None:
    if len(curve.steps) == 1:
        ax.plot(curve.steps, curve.mean, marker=look.marker, color=look.colour)
        return
    theme.draw_band(ax, curve.steps, curve.low, curve.high, look)
    ax.plot(
        curve.steps,
        curve.mean,
        color=look.colour,
        linestyle=look.dashes,
        linewidth=1.6,
        marker=look.marker if marked and len(curve.steps) <= MAX_MARKED_STEPS else None,
        markersize=4,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )
