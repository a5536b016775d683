"""What a comparison can show, before anything runs: the power of the tests that `estimates` makes.

A difference of two cells is the mean of S seed-paired differences over N test examples, with the variance

    V = sd^2 / S + example_sd^2 / N

more seeds reduce the first term alone, more examples the second. The tests know an estimate s^2 of sd^2, and
s^2 (S - 1) / sd^2 is chi-squared with S - 1 degrees of freedom. Half of an interval is h, with

    h^2 = t^2(1 - tail; S - 1) s^2 / S + z^2(1 - tail) (example_sd^2 / N + interaction_sd^2 / (S N))

and a true difference is

    detected         where |mean| > h, tail = alpha / 2m  (m comparisons in the family: Holm's first, hardest step)
    within a margin  where |mean| < margin - h, tail = alpha  (two one-sided tests: Schuirmann 1987)
    not inferior     where mean > h - margin, tail = alpha

Given s^2 these are probabilities of a normal mean. They are integrated over the density of s^2: exact where seeds are
normal and the examples' SD is known; no simulation. Without examples the first and third are tails of the noncentral t
(Owen, Biometrika 52, 1965), the second is the power of Phillips (J. Pharmacokin. Biopharm. 18, 1990). Where three
adapters or more are compared under one condition, a report's test counts their typical variance as one seed more: its
power is then a little higher than the one here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, gammaln, ndtr, ndtri, stdtrit

from lorabench.stats.estimates import Estimate

MIN_SEEDS = 3  # two seeds give an interval, no verdict
QUADRATURE_NODES = 256  # of the integral over s^2, which is smooth: far fewer would do


@dataclass(frozen=True)
class Design:
    """A comparison of two cells. All lengths (sd, margins, differences) are in one unit, such as points of accuracy."""

    sd: float  # of one seed's difference of two cells
    seeds: int  # S of each cell, the same in all
    comparisons: int = 1  # m of the family
    example_sd: float = 0.0  # of one test example's difference, its mean over very many seeds
    interaction_sd: float = 0.0  # of one seed's luck with one example, which the seeds' scatter holds too
    examples: int | None = None  # N; None: the test set's share is left out

    def __post_init__(self) -> None:
        assert self.sd > 0 and self.seeds >= 2 and self.comparisons >= 1
        assert self.example_sd >= 0 and self.interaction_sd >= 0
        assert self.examples is None or self.examples >= 2

    @property
    def df(self) -> int:
        """Degrees of freedom of the seed variance: S - 1."""
        return self.seeds - 1

    @property
    def seed(self) -> float:
        """V_seed = sd^2 / S."""
        return self.sd**2 / self.seeds

    @property
    def example(self) -> float:
        """Variance through examples, example_sd^2 / N: no number of seeds reduces it."""
        return self.example_sd**2 / self.examples if self.examples else 0.0

    @property
    def estimated_example(self) -> float:
        """V_example as the tests see it: with the seeds' luck in it, example_sd^2 / N + interaction_sd^2 / (S N)."""
        return self.example + (self.interaction_sd**2 / (self.seeds * self.examples) if self.examples else 0.0)

    @property
    def variance(self) -> float:
        """V, the variance of the estimated difference."""
        return self.seed + self.example

    def at(self, seeds: int) -> Design:
        """Return the design with another number of seeds."""
        return replace(self, seeds=seeds)


def detection(d: Design, difference: float, *, alpha: float = 0.05) -> float:
    """Power to tell a true difference from zero, either way, at level alpha / m."""
    half, weight = _half_widths(d, alpha / (2 * d.comparisons))
    spread = math.sqrt(d.variance)
    return float(weight @ (ndtr((difference - half) / spread) + ndtr((-difference - half) / spread)))


def smallest_detectable(d: Design, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference that is detected with the wanted power."""
    assert alpha < power < 1
    high = math.sqrt(d.variance)
    while detection(d, high, alpha=alpha) < power:
        high *= 2
    return float(brentq(lambda x: detection(d, x, alpha=alpha) - power, 0.0, high))


def equivalence(d: Design, margin: float, *, difference: float = 0.0, alpha: float = 0.05) -> float:
    """Power to show that a difference lies within +-margin: both one-sided tests at alpha."""
    return inside(d, -margin, margin, difference, alpha=alpha)


def non_inferiority(d: Design, margin: float, *, difference: float = 0.0, alpha: float = 0.05) -> float:
    """Power to show that a cell falls short by less than the margin. difference: the true one, positive is better."""
    return inside(d, -margin, math.inf, difference, alpha=alpha)


def inside(d: Design, low: float, high: float, difference: float, *, alpha: float = 0.05) -> float:
    """Power to show that a difference lies between low and high, either of which may be infinite."""
    half, weight = _half_widths(d, alpha, widest=(high - low) / 2)
    spread = math.sqrt(d.variance)
    return float(weight @ (ndtr((high - half - difference) / spread) - ndtr((low + half - difference) / spread)))


def outside(d: Design, low: float, high: float, difference: float, *, alpha: float = 0.05) -> float:
    """Power to show that a difference lies below low or above high: the interval at level 1 - alpha does."""
    half, weight = _half_widths(d, alpha / 2)
    spread = math.sqrt(d.variance)
    return float(weight @ (ndtr((low - half - difference) / spread) + ndtr((difference - high - half) / spread)))


def design_of(e: Estimate) -> Design | None:
    """Return the design whose estimate this is; None where its seeds do not differ, or are one."""
    if e.seeds < 2 or not e.seed:
        return None
    n = e.examples or 0
    example, interaction = max(e.example - e.interaction, 0.0) * n, e.interaction * n * e.seeds
    return Design(
        math.sqrt(e.seed * e.seeds),
        e.seeds,
        example_sd=math.sqrt(example),
        interaction_sd=math.sqrt(interaction),
        examples=n if n > 1 else None,
    )


def seeds_to_settle(e: Estimate, low: float, high: float, *, power: float = 0.8, limit: int = 200) -> int | None:
    """Fewest seeds that place a difference against a range, on the side on which its mean lies, with the wanted power.

    The true difference and variances are taken to be those estimated, the examples to stay the same. None beyond
    `limit`, and where nothing is known of the seeds' scatter.
    """
    d = design_of(e)
    if d is None:
        return None
    place = inside if low < e.mean < high else outside
    return seeds_needed(d, lambda x: place(x, low, high, e.mean), power, limit=limit)


def seeds_needed(d: Design, power_of: Callable[[Design], float], power: float, *, limit: int = 500) -> int | None:
    """Fewest seeds, from three on, at which `power_of` reaches the wanted power; None beyond `limit`."""
    return next((S for S in range(MIN_SEEDS, limit + 1) if power_of(d.at(S)) >= power), None)


def seeds_can_settle(e: Estimate, low: float, high: float, *, power: float = 0.8) -> bool:
    """Whether any number of seeds would place a difference against a range with the wanted power, with these examples.

    With very many seeds the mean is known but for V_example - V_interaction.
    """
    left = math.sqrt(max(e.example - e.interaction, 0.0))
    return min(abs(e.mean - low), abs(e.mean - high)) > (float(ndtri(power)) + float(ndtri(0.95))) * left


def example_half_width(d: Design, *, level: float = 0.95) -> float:
    """Half-width of the interval that is left with any number of seeds: z sqrt(V_example)."""
    return float(ndtri((1 + level) / 2)) * math.sqrt(d.example)


def sd_interval(sd: float, df: float, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of an SD that was estimated with df degrees of freedom: sd sqrt(df / chi^2), as (low, high)."""
    upper, lower = (float(chdtri(df, tail)) for tail in ((1 - level) / 2, (1 + level) / 2))
    return sd * math.sqrt(df / upper), sd * math.sqrt(df / lower)


def _half_width(d: Design, tail: float, chi: np.ndarray) -> np.ndarray:
    """Half-widths h at s = sd chi / sqrt(df)."""
    seed = d.seed * chi**2 / d.df
    return np.sqrt(stdtrit(float(d.df), tail) ** 2 * seed + ndtri(tail) ** 2 * d.estimated_example)


def _half_widths(d: Design, tail: float, widest: float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    """Half-widths h [K] at the nodes of the integral over s, and the probability [K] that each stands for.

    The variable is chi = s sqrt(df) / sd, whose density is smooth and about 0.7 wide around sqrt(df). widest: the
    integral ends where h reaches it, because two one-sided tests can show nothing beyond. Both arrays may be empty.
    """
    low, high = max(1e-6, math.sqrt(d.df) - 8), math.sqrt(d.df) + 8

    def excess(chi: float) -> float:
        return float(_half_width(d, tail, np.array([chi]))[0]) - widest

    if excess(low) >= 0:
        return np.empty(0), np.empty(0)
    if excess(high) > 0:
        high = float(brentq(excess, low, high))
    node, weight = _legendre()
    chi = low + (high - low) * (node + 1) / 2
    density = (1 - d.df / 2) * math.log(2) - gammaln(d.df / 2) + (d.df - 1) * np.log(chi) - chi**2 / 2
    return _half_width(d, tail, chi), weight * np.exp(density) * (high - low) / 2


@cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss-Legendre quadrature on [-1, 1]."""
    return np.polynomial.legendre.leggauss(QUADRATURE_NODES)
