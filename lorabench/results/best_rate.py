"""A cell's best learning rate between the rates of its grid. Pure: choices in, estimates out.

Around the best rate the mean validation loss L is taken as a parabola in x = log2(rate), L = a + b x + c x^2, whose
minimum lies at -b / 2c. Its variance is by the delta method, with the gradient (0, -1 / 2c, b / 2c^2) of the minimum in
(a, b, c), and with the covariance of (a, b, c)

    over the tuning seeds, each fitted alone, where there are two or more (S - 1 degrees of freedom): a seed that lies
    higher at every rate moves a and not the minimum;
    of least squares, from what the parabola leaves over, where there is one seed (rates - 3 degrees of freedom).

Neither knows how far the true curve is from a parabola, so the fit stays within two rates of the best one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorabench.results import formatting
from lorabench.results.selection import Choice, Rate
from lorabench.stats.estimates import Estimate

RATES_EACH_SIDE = 2  # rates on either side of the best one
MIN_RATES = 3  # rates: a parabola has three coefficients
MIN_CURVATURE = 1e-12  # of loss per octave squared; below it there is no minimum


@dataclass(frozen=True)
class Optimum:
    """Where the parabola has its minimum. Unit of `log2_rate`: octaves of the learning rate."""

    log2_rate: float
    variance: float | None  # of log2_rate; None where the fit passes through three losses and leaves nothing over
    df: float
    seeds: int
    loss: float  # the parabola's, at its minimum
    curvature: float  # c, loss per octave squared
    how: Literal["seeds", "fit"]  # what the variance is over

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
    if isinstance(found, Missing):
        return found
    return Optimum(
        found.log2_rate + math.log2(choice.lr),
        found.variance,
        found.df,
        found.seeds,
        found.loss,
        found.curvature,
        found.how,
    )


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
    covariance, df = _covariance(X, y, each)
    gradient = np.array([0.0, -1 / (2 * c), b / (2 * c**2)])
    variance = None if covariance is None else float(gradient @ covariance @ gradient)
    return Optimum(
        float(lowest),
        variance,
        df,
        min(seeds),
        float(a - b**2 / (4 * c)),
        float(c),
        "seeds" if y.shape[1] > 1 else "fit",
    )


def _covariance(X: np.ndarray, y: np.ndarray, each: np.ndarray) -> tuple[np.ndarray | None, float]:
    """[3, 3] of the mean coefficients, and its degrees of freedom. X: [n, 3], y: [n, S], each: [3, S]."""
    n, S = y.shape
    if S > 1:
        return np.cov(each) / S, float(S - 1)
    df = n - MIN_RATES
    if df == 0:
        return None, 0.0
    left = float(((y - X @ each) ** 2).sum()) / df
    return left * np.linalg.inv(X.T @ X), float(df)


def contrast(optima: Sequence[Optimum], weights: Sequence[float]) -> Estimate | None:
    """sum(w * log2 rate) in octaves, cells taken as independent; None where a rate's variance is not known.

    Degrees of freedom are Satterthwaite's. Cells share their tuning seeds, which narrows differences: these are on the
    safe side.
    """
    parts = [(w * w * o.variance, o.df) for o, w in zip(optima, weights, strict=True) if o.variance is not None and w]
    if len(parts) < sum(bool(w) for w in weights):
        return None
    total = sum(v for v, _ in parts)
    below = sum(v * v / df for v, df in parts if v > 0)
    df = total**2 / below if below > 0 else math.inf
    mean = contrast_mean(optima, weights)
    return Estimate(mean, total, 0.0, 0.0, df, 0.0, 0.0, min(o.seeds for o in optima), None)


def contrast_mean(optima: Sequence[Optimum], weights: Sequence[float]) -> float:
    return float(sum(w * o.log2_rate for o, w in zip(optima, weights, strict=True)))


def slope_weights(x: Sequence[float]) -> list[float]:
    """Weights [n] that turn values at x into the slope of their least-squares line."""
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    return [float(w) for w in centred / (centred @ centred)]


def power_of_two(x: float) -> float:
    """2**x without overflow: an interval of one degree of freedom can span more octaves than floats have."""
    return 0.0 if x < -1000 else math.inf if x > 1000 else float(2.0**x)
