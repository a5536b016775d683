"""Curves: validation loss over the learning rates tried, and how the chosen runs trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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

# -- learning rates ------------------------------------------------------------------------------------------------------


def draw_learning_rates(f: Findings, looks: Mapping[str, Look]) -> Drawing | None:
    """Mean validation loss over the tuning seeds against the rate: a panel a family of adapters, one for the others."""
    tuned = [r for r in f.results.values() if len(_finished(r)) > 1]
    if not tuned:
        return None
    panels: dict[str, list[Result]] = {}
    for r in tuned:
        panels.setdefault(_family(r), []).append(r)
    wide = min(len(panels), 2)
    tall = math.ceil(len(panels) / wide)
    alone = theme.panel_width(r.name for r in tuned)
    with theme.canvas(alone if wide == 1 else 9.0, 0.4 + 3.2 * tall, between=0.1) as figure:
        axes = [figure.add_subplot(tall, wide, i + 1) for i in range(len(panels))]
        ranges = [_ends(here) for name, here in panels.items() if name != NO_ADAPTERS]
        for ax, (name, here) in zip(axes, panels.items(), strict=True):
            low, high = _ends(here) if name == NO_ADAPTERS else (min(a for a, _ in ranges), max(b for _, b in ranges))
            title = name if len(panels) > 1 else ""
            _rate_panel(ax, here, looks, low, high, title, loss=units.loss_axis(f.sweep, "validation"))
        dots = any(len(rate.losses) > 1 for r in tuned for rate in _finished(r))
        seeds = "Mean over the tuning seeds; small dots are single seeds, a" if dots else "One tuning seed; the"
        caption = f"{seeds} filled point is the chosen rate."
        if any(r.choice.ineligible for r in tuned):
            caption += " A cross at the top: a seed diverged or failed there, so the rate is out."
        if any(x.pruned for r in tuned for x in r.choice.rates):
            caption += " A bar at the top: pruned there before its end, so it has no loss to show."
        if len(panels) > 1:
            caption += (
                " Panels of adapters share their vertical axis."
                if len(ranges) > 1
                else " Each panel has axes of its own."
            )
        return theme.render_drawing(
            "learning_rates", "Validation loss against the learning rate", caption, _rates_alt(tuned), figure
        )


NO_ADAPTERS = "without adapters"


def _finished(r: Result) -> list[Rate]:
    """The rates that have a loss to show: that of a pruned one is of an earlier step."""
    return [x for x in r.choice.rates if x.losses and not x.pruned]


def _family(r: Result) -> str:
    if not r.cell.adapter:
        return NO_ADAPTERS
    rule = alpha_rules.without_scaling(alpha_rules.rounded(r.cell.alpha_rule))  # the method's name says that part
    alpha = [f"α = {rule}"] if rule else []  # VeRA has none
    return ", ".join([r.cell.method, *alpha, *(f"{k.split('.')[-1]} {v}" for k, v in r.cell.extra)])


def _ends(here: Sequence[Result]) -> tuple[float, float]:
    losses = [x for r in here for rate in _finished(r) for x in rate.losses]
    return min(losses), max(losses)


def _rate_panel(
    ax: Axes, here: Sequence[Result], looks: Mapping[str, Look], low: float, high: float, title: str, *, loss: str
) -> None:
    room = 0.08 * (high - low or 1.0)
    theme.set_rate_axis(ax, [x.lr for r in here for x in r.choice.rates])
    for i, r in enumerate(here):
        _rate_curve(ax, r, looks[r.id], high + room)
        for x in r.choice.rates:
            if x.pruned and not x.failures:  # side by side: cells are often pruned at the same rate
                _mark(ax, x.lr * 1.05 ** (i - (len(here) - 1) / 2), high + room, "|", looks[r.id])
    ax.set_ylim(low - room, high + 1.6 * room)
    theme.label_axes(ax, x="learning rate (log scale)", y=loss)
    ax.set_title(shorten(title, theme.MAX_NAME_LENGTH))
    # Under a panel's title a rank alone names a cell, unless two cells have it.
    ranks_do = bool(title) and all(r.cell.adapter for r in here) and len({r.cell.r for r in here}) == len(here)
    ends = [(r, _finished(r)[-1]) for r in here]
    names = [(x.lr, x.mean, f"r = {r.cell.r}" if ranks_do else r.name, looks[r.id].colour) for r, x in ends]
    theme.draw_end_labels(ax, names)


def _rate_curve(ax: Axes, r: Result, look: Look, top: float) -> None:
    good = _finished(r)
    ax.plot([x.lr for x in good], [x.mean for x in good], color=look.colour, linestyle=look.dashes, zorder=3)
    for x in good:
        if len(x.losses) > 1:
            ax.plot([x.lr] * len(x.losses), x.losses, ".", color=look.colour, markersize=3.5, alpha=0.6, zorder=3)
        chosen = x.lr == r.choice.lr
        ax.plot(x.lr, x.mean, marker=look.marker, markersize=8.5 if chosen else 5, color=look.colour,
                markerfacecolor=look.colour if chosen else "white", markeredgewidth=1.3, zorder=5 if chosen else 4)  # fmt: skip
    for x in r.choice.rates:
        if x.failures:
            _mark(ax, x.lr, top, "x", look)


def _mark(ax: Axes, x: float, y: float, marker: str, look: Look) -> None:
    ax.plot(x, y, marker=marker, markersize=7, markeredgewidth=2, color=look.colour, zorder=5, clip_on=False)


def _rates_alt(tuned: Sequence[Result]) -> str:
    said = []
    for r in tuned:
        grid = f"{formatting.rate(r.choice.rates[0].lr)} to {formatting.rate(r.choice.rates[-1].lr)}"
        best = (
            f"lowest at {formatting.rate(r.choice.lr)} ({formatting.number(r.choice.loss, 3)})"
            if r.choice.lr
            else "no rate eligible"
        )
        out = f", out: {', '.join(formatting.rate(lr) for lr in r.choice.ineligible)}" if r.choice.ineligible else ""
        gone = [formatting.rate(x.lr) for x in r.choice.rates if x.pruned and not x.failures]
        out += f", pruned: {', '.join(gone)}" if gone else ""
        said.append(f"{r.name} over {grid}, {best}{out}")
    return "Validation loss against the learning rate: " + "; ".join(said) + "."


# -- training curves -----------------------------------------------------------------------------------------------------

Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # steps, mean, lowest and highest over runs


def draw_training(f: Findings, looks: Mapping[str, Look]) -> Drawing | None:
    """Training loss (smoothed) and the validation metric over steps, for the runs behind each cell's numbers."""
    shown = _telling(f)
    name = f"val/{f.sweep.metric}"
    losses = {r.id: c for r in shown if (c := _curve(f, r.runs, "train/loss", smooth=True))}
    scores = {r.id: c for r in shown if (c := _curve(f, r.runs, name))}
    if not losses and not scores:
        return None
    with theme.canvas(8.6, 3.5) as figure:
        left, right = figure.subplots(1, 2)
        for r in shown:
            for ax, made in ((left, losses.get(r.id)), (right, scores.get(r.id))):
                if made:
                    _training_curve(ax, made, looks[r.id], marked=ax is right)
        theme.label_axes(left, x="optimizer step", y=units.loss_axis(f.sweep, "training"))
        theme.label_axes(right, x="optimizer step", y=f"validation {f.metric.axis}")
        theme.format_metric_ticks(right, f.metric)
        ends = scores or losses
        theme.draw_end_labels(
            right if scores else left, [_end(ends[r.id], r, looks[r.id]) for r in shown if r.id in ends], size=9
        )
        roles = "confirmation" if f.confirmed else "tuning"
        caption = (f"{roles.capitalize()} runs at the chosen rate, mean over seeds; bands span the seeds. "
                   "The training loss is smoothed (exponential, over a twentieth of the steps).")  # fmt: skip
        if len(shown) < len([r for r in f.results.values() if r.runs]):
            caption += f" {len(shown)} of {len(f.results)} cells."
        said = "; ".join(
            f"{r.name} ends at {f.metric.value(float(scores[r.id][1][-1]))}" for r in shown if r.id in scores
        )
        alt = f"Training loss and validation {f.metric.axis} against the optimizer step" + (
            f": {said}." if said else "."
        )
        return theme.render_drawing("training", "How the chosen runs trained", caption, alt, figure)


def _end(made: Curve, r: Result, look: Look) -> theme.Label:
    return float(made[0][-1]), float(made[1][-1]), r.name, look.colour


def _telling(f: Findings) -> list[Result]:
    """All cells while they are few; else those the answer names, the controls, and the ends of the ladder."""
    have = [r for r in f.results.values() if r.runs]
    if len(have) <= MAX_TRAINING_CURVES:
        return have
    named = [
        f.best,
        f.reference,
        f.recommendation.cell if f.recommendation else None,
        *(c.other for c in f.controls.values()),
    ]
    first = [r for r in have if r.id in named]
    adapters = [r for r in have if r.cell.adapter and r.id not in named]
    spread = (
        [
            adapters[round(i * (len(adapters) - 1) / max(1, MAX_TRAINING_CURVES - len(first) - 1))]
            for i in range(MAX_TRAINING_CURVES - len(first))
        ]
        if adapters
        else []
    )
    return [r for r in have if r in first or r in spread]


def _curve(f: Findings, runs: Sequence[Record], name: str, *, smooth: bool = False) -> Curve | None:
    """Over the steps that every run has. Shapes: runs [n, steps] -> [steps] each."""
    series = []
    for r in runs:
        rows = {row["step"]: row[name] for row in f.sweep.store.history(r.run_id) if row.get(name) is not None}
        if rows:
            series.append(rows)
    steps = sorted(set.intersection(*(set(s) for s in series))) if series else []
    if not steps:
        return None
    y = np.array([[s[t] for t in steps] for s in series], dtype=np.float64)
    if smooth:
        y = _smooth(y, span=max(1, len(steps) // 20))
    keep = np.unique(np.linspace(0, len(steps) - 1, min(MAX_CURVE_POINTS, len(steps))).round().astype(int))
    y = y[:, keep]
    return np.array(steps)[keep], y.mean(0), y.min(0), y.max(0)


def _smooth(y: np.ndarray, *, span: int) -> np.ndarray:
    """Exponential moving average of [n, steps] along steps with its start corrected (Kingma & Ba 2015, section 3)."""
    decay = 1 - 2 / (span + 1)
    out, total, weight = np.empty_like(y), np.zeros(len(y)), 0.0
    for t in range(y.shape[1]):
        total, weight = decay * total + y[:, t], decay * weight + 1
        out[:, t] = total / weight
    return out


def _training_curve(ax: Axes, made: Curve, look: Look, *, marked: bool) -> None:
    steps, mean, low, high = made
    if len(steps) == 1:
        ax.plot(steps, mean, marker=look.marker, color=look.colour)
        return
    ax.fill_between(steps, low, high, color=look.colour, alpha=0.13, linewidth=0)
    ax.plot(steps, mean, color=look.colour, linestyle=look.dashes, linewidth=1.6, marker=look.marker if marked and len(steps) <= 12 else None,
            markersize=4, markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
