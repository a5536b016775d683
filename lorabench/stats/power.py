"""What a comparison can show, before anything runs: the power of the tests that `estimates` makes.

A difference of two cells is the mean of S seed-paired differences over N test examples, with the variance

    V = sd^2 / S + example_sd^2 / N

(V_seed and V_example - V_interaction of `estimates`): more seeds reduce the first term alone, more examples the second.
The tests know an estimate s^2 of sd^2, and s^2 df / sd^2 is chi-squared with df = (C - 1)(S - 1), where C cells pool
their seed variance. With h = t(1 - tail; df) sqrt(V at s^2) a difference is

    detected         where |mean| > h, tail = alpha / 2m  (m comparisons in the family: Holm's first, hardest step)
    within a margin  where |mean| < margin - h, tail = alpha  (two one-sided tests: Schuirmann 1987)
    not inferior     where mean > h - margin, tail = alpha

Given s^2 these are probabilities of a normal mean. They are integrated over the density of s^2: exact where seeds are
normal and example_sd is known; no simulation. With V_example = 0 the first and third are tails of the noncentral t
(Owen, Biometrika 52, 1965), the second is the power of Phillips (J. Pharmacokin. Biopharm. 18, 1990). With a V_example,
t is taken at Satterthwaite's df, as the report takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, gammaln, ndtr, ndtri, stdtrit

MIN_SEEDS = 3  # two seeds give an interval, no verdict
QUADRATURE_NODES = 256  # of the integral over s^2, which is smooth: far fewer would do


@dataclass(frozen=True)
class Design:
    """A comparison of two cells. All lengths (sd, margins, differences) are in one unit, such as points of accuracy."""

    sd: float  # of one seed's difference of two cells
    seeds: int  # S of each cell, the same in all
    cells: int = 2  # C whose seed variance is pooled; 2: the pair's own
    comparisons: int = 1  # m of the family
    example_sd: float = 0.0  # of one test example's difference, its mean over seeds
    examples: int | None = None  # N; None: the test set's share is left out

    def __post_init__(self) -> None:
        assert self.sd > 0 and self.seeds >= 2 and self.cells >= 2 and self.comparisons >= 1 and self.example_sd >= 0
        assert self.examples is None or self.examples >= 2

    @property
    def df(self) -> int:
        """Degrees of freedom of the seed variance: (C - 1)(S - 1)."""
        return (self.cells - 1) * (self.seeds - 1)

    @property
    def seed(self) -> float:
        """V_seed = sd^2 / S."""
        return self.sd**2 / self.seeds

    @property
    def example(self) -> float:
        """Variance through examples, example_sd^2 / N: no number of seeds reduces it."""
        return self.example_sd**2 / self.examples if self.examples else 0.0

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
    half, weight = _half_widths(d, alpha, widest=margin)
    spread = math.sqrt(d.variance)
    room = margin - half  # |mean| has to stay below it
    return float(weight @ (ndtr((room - difference) / spread) - ndtr((-room - difference) / spread)))


def non_inferiority(d: Design, margin: float, *, difference: float = 0.0, alpha: float = 0.05) -> float:
    """Power to show that a cell falls short by less than the margin. difference: the true one, positive is better."""
    half, weight = _half_widths(d, alpha)
    return float(weight @ ndtr((margin + difference - half) / math.sqrt(d.variance)))


def seeds_needed(d: Design, power_of: Callable[[Design], float], power: float, *, limit: int = 500) -> int | None:
    """Fewest seeds, from three on, at which `power_of` reaches the wanted power; None beyond `limit`."""
    return next((S for S in range(MIN_SEEDS, limit + 1) if power_of(d.at(S)) >= power), None)


def example_half_width(d: Design, *, level: float = 0.95) -> float:
    """Half-width of the interval that is left with any number of seeds: z sqrt(V_example)."""
    return float(ndtri((1 + level) / 2)) * math.sqrt(d.example)


def sd_interval(sd: float, df: float, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of an SD that was estimated with df degrees of freedom: sd sqrt(df / chi^2), as (low, high)."""
    upper, lower = (float(chdtri(df, tail)) for tail in ((1 - level) / 2, (1 + level) / 2))
    return sd * math.sqrt(df / upper), sd * math.sqrt(df / lower)


def _half_width(d: Design, tail: float, chi: np.ndarray) -> np.ndarray:
    """Half-widths h at s = sd chi / sqrt(df), with Satterthwaite's df of V where examples have a share in it."""
    seed = d.seed * chi**2 / d.df
    if not d.examples or not d.example:
        return stdtrit(float(d.df), 1 - tail) * np.sqrt(seed)
    variance = seed + d.example
    df = variance**2 / (seed**2 / d.df + d.example**2 / (d.examples - 1))
    return stdtrit(np.minimum(df, 1e9), 1 - tail) * np.sqrt(variance)


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
