"""A cell's best learning rate between the rates of its grid. Pure: choices in, estimates out.

Around the best rate the mean validation loss L is taken as a parabola in x = log2(rate), L = a + b x + c x^2, whose
minimum lies at -b / 2c. Its variance is by the delta method, with the gradient (0, -1 / 2c, b / 2c^2) of the minimum in
(a, b, c), and with the covariance of (a, b, c) over the tuning seeds, each fitted alone: a seed that lies higher at every
rate moves a and not the minimum. One seed has none: how far the losses lie from a parabola says nothing of how far a
seed moves its minimum (intervals from it held the truth in 17 to 31 % of simulations).

The fit does not know how far the true curve is from a parabola, so it stays within two rates of the best one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorabench.results import formatting
from lorabench.results.selection import Choice, Rate
from lorabench.stats.estimates import Estimate, combine

RATES_EACH_SIDE = 2  # rates on either side of the best one
MIN_RATES = 3  # rates: a parabola has three coefficients
MIN_CURVATURE = 1e-12  # of loss per octave squared; below it there is no minimum


@dataclass(frozen=True)
class Optimum:
    """Where the parabola has its minimum. Unit of `log2_rate`: octaves of the learning rate."""

    log2_rate: float
    variance: float | None  # of log2_rate, over the tuning seeds; None with one, or where rates have unlike numbers
    seeds: int
    loss: float  # the parabola's, at its minimum
    curvature: float  # c, loss per octave squared

    @property
    def lr(self) -> float:
        return float(2.0**self.log2_rate)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval of the rate itself; from 0 to infinity where its variance is not known."""
        made = contrast([self], [1.0])
        if made is None:
            return 0.0, math.inf
        low, high = made.interval(level)
        return power_of_two(low), power_of_two(high)


@dataclass(frozen=True)
class Missing:
    """Why a cell has no interpolated best rate, and which runs would give it one."""

    reason: str
    settle: str


def optimum(choice: Choice) -> Optimum | Missing:
    """The minimum of the parabola around a cell's best rate, or why there is none."""
    eligible = [r for r in choice.rates if r.eligible]
    if choice.lr is None or not eligible:
        return Missing("no learning rate is eligible", "rates at which every seed trains to its end")
    if len(eligible) < MIN_RATES:
        said = formatting.plural(len(eligible), "eligible rate")
        return Missing(f"{said}, and a parabola takes three", "five rates a factor of 2 apart")
    at = next(i for i, r in enumerate(eligible) if r.lr == choice.lr)
    if at in (0, len(eligible) - 1):
        return _at_the_edge(choice, eligible[at], high=at > 0)
    near = eligible[max(0, at - RATES_EACH_SIDE) : at + RATES_EACH_SIDE + 1]
    x = np.log2([r.lr for r in near]) - math.log2(choice.lr)
    found = _fit(x, [r.losses for r in near])
    return found if isinstance(found, Missing) else replace(found, log2_rate=found.log2_rate + math.log2(choice.lr))


def _at_the_edge(choice: Choice, best: Rate, *, high: bool) -> Missing:
    """Return what is missing around a best rate that is at an end of those that are eligible.

    That need not be the grid's end: the next rate may have diverged.
    """
    rest = [r.lr for r in choice.rates if (r.lr > best.lr if high else r.lr < best.lr)]
    way, end = ("above", "largest") if high else ("below", "smallest")
    reason = f"the best rate, {formatting.rate(best.lr)}, is the {end} eligible one"
    if not rest:
        return Missing(reason, f"rates {way} {formatting.rate(best.lr)}")
    if choice.beyond:
        return Missing(reason, unpruned_rerun(choice))
    beyond = min(rest) if high else max(rest)
    return Missing(
        reason, f"rates between {formatting.rate(best.lr)} and {formatting.rate(beyond)}, where every seed trains"
    )


def unpruned_rerun(choice: Choice) -> str:
    """What settles where the best lies when the rates beyond it were pruned."""
    tried = ", ".join(formatting.rate(r.lr) for r in choice.beyond)
    return f"the rates that were pruned, {tried}, trained to their end: the same command with sweep.prune=false"


def _fit(x: np.ndarray, losses: Sequence[Sequence[float]]) -> Optimum | Missing:
    """x: [n] octaves from the best rate; losses: of each rate those of its seeds, in seed order."""
    seeds = {len(row) for row in losses}
    paired = len(seeds) == 1
    y = np.array(losses, dtype=np.float64) if paired else np.concatenate([np.asarray(row) for row in losses])[:, None]
    at = x if paired else np.repeat(x, [len(row) for row in losses])
    X = np.vander(at, MIN_RATES, increasing=True)  # [n, 3]: 1, x, x^2
    each = np.linalg.pinv(X) @ y  # [3, S]
    a, b, c = each.mean(1)
    if c <= MIN_CURVATURE:
        return Missing("the losses do not curve upwards around the best rate", "wider-spaced rates, or more seeds")
    lowest = -b / (2 * c)
    if not at.min() <= lowest <= at.max():
        return Missing("the parabola's minimum lies outside the rates it is fitted to", "more rates, or more seeds")
    gradient = np.array([0.0, -1 / (2 * c), b / (2 * c**2)])
    variance = float(gradient @ np.cov(each) @ gradient) / each.shape[1] if each.shape[1] > 1 else None
    return Optimum(float(lowest), variance, min(seeds), float(a - b**2 / (4 * c)), float(c))


def contrast(optima: Sequence[Optimum], weights: Sequence[float]) -> Estimate | None:
    """sum(w * log2 rate) in octaves, cells taken as independent; None where a rate's variance is not known.

    Cells share their tuning seeds, which narrows differences: these are on the safe side.
    """
    used = [(o, w) for o, w in zip(optima, weights, strict=True) if w]
    parts = [(w * w * o.variance, float(o.seeds - 1)) for o, w in used if o.variance is not None]
    if len(parts) < len(used):
        return None
    return combine(contrast_mean(optima, weights), parts, min(o.seeds for o, _ in used))


def contrast_mean(optima: Sequence[Optimum], weights: Sequence[float]) -> float:
    return float(sum(w * o.log2_rate for o, w in zip(optima, weights, strict=True)))


def slope_weights(x: Sequence[float]) -> list[float]:
    """Weights [n] that turn values at x into the slope of their least-squares line."""
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    return [float(w) for w in centred / (centred @ centred)]


def power_of_two(x: float) -> float:
    """2**x without overflow: an interval of one degree of freedom can span more octaves than floats have."""
    return 0.0 if x < -1000 else math.inf if x > 1000 else float(2.0**x)
