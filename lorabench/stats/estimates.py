"""Statistics of a comparison: pure functions of arrays. Shape letters: S seeds, N examples, R bootstrap draws, C cells.

Seeds and test examples are crossed: every seed's model meets the same examples. With m_i the mean of seed i and m_j the
mean of example j, the grand mean varies through both,

    V_seed = var(m_i) / S,   V_example = var(m_j) / N

and its interval is mean +- h with h^2 = t^2(df_seed) V_seed + t^2(df_example) V_example, the quantiles of Student's t
that belong to each part. That is the form of Cochran (Biometrics 20, 1964), on the safe side. One quantile for the sum
at Satterthwaite's degrees of freedom is not: with three seeds V_seed comes out near zero now and then, the degrees of
freedom then go up to those of the examples, and the interval is too narrow just where it is wrong
(tests/stats/test_error_rates.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtrc, chdtri, stdtrit

Direction = Literal["better", "worse", "not resolved"]
Size = Literal["within", "beyond", "not resolved"]
Statistic = Callable[[np.ndarray], np.ndarray]  # counts [R, N] -> [R, S]

MAX_NOISE = 1.2  # times the typical seed variance, up to which that counts as one seed more: by simulation
MIN_EVENTS = 5  # examples that are right, or wrong, below which a t interval of a share is too narrow
MIN_GROUP_DF = 1.0  # where one group outweighs all others
SMALLEST_P = 1e-60  # smaller p values are not told apart


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of two, with the parts of its variance. `examples` is None where only seeds vary."""

    mean: float
    seed_parts: tuple[tuple[float, float], ...]  # V_seed as independent (variance, df): two where runs are not paired
    example: float  # V_example
    interaction: float  # the part of V_example that is each seed's own luck with the examples, and falls with seeds
    example_df: float
    seeds: int
    examples: int | None

    @property
    def seed(self) -> float:
        """V_seed: variance of the mean through seeds (0 with one seed, where it cannot be known)."""
        return sum(variance for variance, _ in self.seed_parts)

    @property
    def variance(self) -> float:
        """V_seed + V_example."""
        return self.seed + self.example

    def half_width(self, level: float = 0.95) -> float:
        """Half the width of the interval at a level."""
        return math.sqrt(self._squared_half_width((1 - level) / 2))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Interval of the mean: (low, high)."""
        half = self.half_width(level)
        return self.mean - half, self.mean + half

    def p_value(self) -> float:
        """Two-sided p value of the hypothesis that the mean is zero: 1 - the level of the interval that ends there."""
        if self.variance == 0:
            return 1.0 if self.mean == 0 else 0.0
        if self.mean**2 >= self._squared_half_width(SMALLEST_P / 2):
            return SMALLEST_P

        def excess(log_p: float) -> float:
            return self._squared_half_width(math.exp(log_p) / 2) - self.mean**2

        return math.exp(brentq(excess, math.log(SMALLEST_P), 0.0, xtol=1e-12))

    def _squared_half_width(self, tail: float) -> float:
        """h^2 = sum of t^2 V over the parts. tail: probability beyond either end."""
        parts = (*self.seed_parts, (self.example, self.example_df))
        return sum(quantile(tail, df) ** 2 * variance for variance, df in parts if variance > 0 and df > 0)

    @property
    def allows_verdict(self) -> bool:
        """Whether there are seeds enough for a verdict: two give an interval only."""
        return self.seeds >= 3


@dataclass(frozen=True)
class Pooled:
    """Seed variance that several cells share. Budgets are planned by it; no test rests on it."""

    within: float  # variance of one seed's score
    difference: float  # variance of one seed's difference of two cells
    df: float  # (C - 1)(S - 1): cells share their seeds, so no more is claimed for either variance
    cells: int
    p: float  # p value of equal variances (Bartlett)


@dataclass(frozen=True)
class Typical:
    """Seed variance that is typical of C cells: medians, which a few noisy cells do not move."""

    within: float  # variance of one seed's score
    difference: float  # variance of one seed's difference of two cells


def quantile(p: float, df: float) -> float:
    """Quantile of Student's t distribution; of the normal distribution where df is infinite."""
    return float(stdtrit(min(df, 1e9), p))


def share_interval(e: Estimate, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of a share: inside 0 to 1, and not too narrow at either end.

    Where fewer than `MIN_EVENTS` examples are right, or wrong, it is at least Wilson's interval of that many of all
    examples (J. Am. Stat. Assoc. 22, 1927): none wrong of 47 does not show that none ever is.
    """
    low, high = e.interval(level)
    p, n = min(max(e.mean, 0.0), 1.0), e.examples or 0
    if n and n * min(p, 1 - p) < MIN_EVENTS:
        z2 = quantile((1 + level) / 2, math.inf) ** 2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
        low, high = min(low, middle - half), max(high, middle + half)
    return max(0.0, low), min(1.0, high)


def linearize(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return a table [S, N] whose plain row means are the weighted row means of `values` [S, N].

    weights: [N]; None leaves the values as they are. The weighted mean sum(w x) / sum(w) is a ratio. The terms
    w (x - mean) / mean(w) + mean have the same mean and, to first order, the same variance over examples
    (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    x = np.asarray(values, dtype=np.float64)
    if weights is None:
        return x
    w = np.asarray(weights, dtype=np.float64)
    mean = (x * w).sum(1, keepdims=True) / w.sum()
    return w * (x - mean) / w.mean() + mean


def cluster(x: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Turn a table [S, N] of examples into a table [S, G] of groups that are drawn whole (dialogues, near-duplicates).

    groups: [N]; None leaves the table as it is. A group's entry is its sum of distances to the mean, scaled so that the
    mean over groups is the mean over examples. Its variance is, to first order, that of a mean over groups drawn whole
    (Cochran, section 9A.2).
    """
    if groups is None:
        return np.asarray(x, dtype=np.float64)
    codes = np.unique(groups, return_inverse=True)[1]
    mean = x.mean(1, keepdims=True)
    sums = np.stack([np.bincount(codes, row) for row in x - mean])
    return mean + sums * (sums.shape[1] / x.shape[1])


def group_shares(examples: int, groups: np.ndarray | None) -> np.ndarray:
    """Return the share [G] of the examples that each unit has which is drawn whole. groups: [N]; None: each alone."""
    if groups is None:
        return np.full(examples, 1 / examples)
    return np.unique(groups, return_counts=True)[1] / len(groups)


def variance_over_groups(squares: float, shares: np.ndarray) -> tuple[float, float]:
    """Return V_example and its degrees of freedom from the sum of squared weighted distances of groups to their mean.

    squares: sum over groups of (w (m_g - mean))^2, with w the shares [G]. Its expectation falls short of V_example by
    the factor below: groups pull the mean towards themselves, large ones the most. Large groups leave fewer degrees of
    freedom than there are groups: (sum w^2)^2 / sum w^4 (Satterthwaite; Kish's effective number for variances), less one
    for the mean. Equal groups give the usual 1 / (G - 1) and G - 1.
    """
    w2 = shares**2
    expected = float((w2 * (1 - 2 * shares + w2.sum())).sum() / w2.sum())
    df = float(w2.sum() ** 2 / (w2**2).sum()) - 1
    return (squares / expected, max(df, MIN_GROUP_DF)) if expected > 0 and len(shares) > 1 else (0.0, 0.0)


def crossed_mean(x: np.ndarray, *, groups: np.ndarray | None = None, typical: float | None = None) -> Estimate:
    """Estimate the mean of a table [S, N] of seeds x examples.

    groups: [N], examples that are drawn together. typical: the variance of one seed's mean that is typical of such
    tables (`seed_variance`). The difference of two cells that share seeds and examples is `crossed_mean(a - b)`.
    """
    N = np.shape(x)[1]
    shares = group_shares(N, groups)
    x = cluster(x, groups)
    S, G = x.shape
    rows, columns = x.mean(1), x.mean(0)
    residual = x - rows[:, None] - columns + x.mean()
    interaction = float((residual**2).sum() / (S - 1)) / (S * G) / max(G - 1, 1) if S > 1 else 0.0
    example, df = variance_over_groups(float(((columns - columns.mean()) ** 2).sum()) / G**2, shares)
    return _estimate(rows, example, interaction, df, N, typical)


def crossed_bootstrap(
    values: np.ndarray,
    draws: np.ndarray,
    *,
    examples: int,
    groups: np.ndarray | None = None,
    typical: float | None = None,
) -> Estimate:
    """Estimate the mean over seeds of a statistic that is no mean over examples, such as macro-F1.

    values: [S], the statistic of each seed. draws: [R, S], the statistic of R resamples of the N = `examples` examples,
    by `groups` [N] where there are some; a resample is the same for all seeds. One seed's variance over resamples is
    (E + I) / N, that of their mean E / N + I / (S N); the parts follow. The draws give the variance only; the t quantile
    comes from the degrees of freedom.
    """
    values, draws = np.asarray(values, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    S = len(values)
    over_draws = float(draws.mean(1).var(ddof=1))
    one_seed = float(draws.var(axis=0, ddof=1).mean())
    interaction = max(0.0, (one_seed - over_draws) / (S - 1)) if S > 1 else 0.0
    example, df = variance_over_groups(over_draws, group_shares(examples, groups))
    return _estimate(values, example, interaction, df, examples, typical)


def mean_over_seeds(values: Sequence[float] | np.ndarray, *, typical: float | None = None) -> Estimate:
    """Estimate the mean of values [S] over seeds, where nothing is known of single examples.

    The interval leaves out the variance through examples, so it is too narrow.
    """
    return _estimate(np.asarray(values, dtype=np.float64), 0.0, 0.0, 0.0, None, typical)


def combine(mean: float, parts: Sequence[tuple[float, float]], seeds: int) -> Estimate:
    """Return an estimate whose variance is a sum of independent ones. parts: (variance, degrees of freedom) each."""
    return Estimate(mean, tuple(parts), 0.0, 0.0, 0.0, seeds, None)


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate | None:
    """Estimate mean(a) - mean(b) of independent runs, each with its own variance.

    None where either has fewer than three runs.
    """
    if min(len(a), len(b)) < 3:
        return None
    parts = [(float(np.var(x, ddof=1)) / len(x), len(x) - 1) for x in (a, b)]
    return combine(float(np.mean(a) - np.mean(b)), parts, min(len(a), len(b)))


def _estimate(
    seeds: np.ndarray,
    example: float,
    interaction: float,
    example_df: float,
    examples: int | None,
    typical: float | None,
) -> Estimate:
    variance, df = seed_variance(seeds, typical)
    parts = ((variance / len(seeds), df),)
    return Estimate(float(seeds.mean()), parts, example, interaction, example_df, len(seeds), examples)


def seed_variance(values: np.ndarray, typical: float | None = None) -> tuple[float, float]:
    """Return the variance of one of S values [S] over seeds, and its degrees of freedom.

    It is the values' own, with S - 1 degrees of freedom. Where that is not above `MAX_NOISE` times what is typical of
    cells like it, the typical variance counts as one seed more: their mean weighted by S - 1 and 1, with S degrees of
    freedom. A cell that is noisier than others is never averaged away, as pooling all cells would do.
    """
    S = len(values)
    own = float(np.var(values, ddof=1)) if S > 1 else 0.0
    if typical is None or S < 2 or own > MAX_NOISE * typical:
        return own, float(S - 1)
    return (typical + (S - 1) * own) / S, float(S)


def resample(
    statistic: Statistic, examples: int, draws: int, rng: np.random.Generator, groups: np.ndarray | None = None
) -> np.ndarray:
    """Return the statistic [R, S] of R = `draws` resamples of N = `examples` examples.

    The statistic is given counts [r, N]: how often each example occurs in each resample. groups: [N]; examples of one
    group are drawn together.
    """
    codes = None if groups is None else np.unique(groups, return_inverse=True)[1]
    units = examples if codes is None else int(codes.max()) + 1
    share = np.full(units, 1 / units)
    rows = max(1, 2**24 // examples)  # at most 128 MiB of counts at once
    parts = (rng.multinomial(units, share, size=min(rows, draws - i)) for i in range(0, draws, rows))
    return np.concatenate([statistic(counts if codes is None else counts[:, codes]) for counts in parts])


def pool(values: np.ndarray) -> Pooled:
    """Pool the seed variance of scores [C, S], with the same seeds in every cell.

    `difference` is twice the residual mean square of the cells x seeds table, where a seed's effect on all cells
    cancels.
    """
    x = np.asarray(values, dtype=np.float64)
    C, S = x.shape
    residual = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    df = float((C - 1) * (S - 1))
    return Pooled(float(x.var(axis=1, ddof=1).mean()), 2 * float((residual**2).sum()) / df, df, C, bartlett(x))


def typical_variances(values: np.ndarray) -> Typical:
    """Return the seed variances that are typical of scores [C, S] with the same seeds in every cell.

    For each cell its own variance, and the median variance of its differences to the others; then the median over the
    cells, each divided by what the median of a variance with S - 1 degrees of freedom is of its mean.
    """
    x = np.asarray(values, dtype=np.float64)
    C, S = x.shape
    covariance = np.atleast_2d(np.cov(x))
    own = np.diag(covariance)
    apart = own[:, None] + own - 2 * covariance
    others = [float(np.median(np.delete(apart[c], c))) for c in range(C)]
    median = float(chdtri(S - 1, 0.5)) / (S - 1)
    return Typical(float(np.median(own)) / median, max(0.0, float(np.median(others))) / median)


def bartlett(x: np.ndarray) -> float:
    """p value of equal variances in the rows of x [C, S] (Bartlett 1937); 0 where some rows vary and others do not."""
    C, S = x.shape
    variances = x.var(axis=1, ddof=1)
    if not variances.all():
        return float(not variances.any())
    df = S - 1
    statistic = df * (C * math.log(variances.mean()) - float(np.log(variances).sum()))
    return float(chdtrc(C - 1, statistic / (1 + (C + 1) / (3 * C * df))))


def holm(p: Sequence[float]) -> list[float]:
    """Adjust the p values of one family (Holm 1979); the order is kept."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def holm_levels(p: Sequence[float], alpha: float = 0.05) -> list[float]:
    """Levels of intervals that leave out zero where, and only where, Holm's procedure rejects.

    The level is 1 - alpha / (tests left) at each p value's step. Once the sequence stops, later ones get that level.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    levels, left, stopped = [0.0] * len(p), len(p), False
    for i in order:
        levels[i] = 1 - alpha / left
        stopped = stopped or p[i] * left >= alpha
        left -= not stopped
    return levels


def direction(e: Estimate, *, p: float, lower_is_better: bool, alpha: float = 0.05) -> Direction:
    """Say which way a difference points. p: its p value, adjusted within its family."""
    if not e.allows_verdict or p >= alpha:
        return "not resolved"
    return "better" if (e.mean < 0) == lower_is_better else "worse"


def size(e: Estimate, margin: float, level: float = 0.95) -> Size:
    """Compare a difference with a margin.

    Within: two one-sided tests at 5 %, i.e. the 90 % interval (Schuirmann 1987). Beyond: the interval at `level` lies
    outside, the one that also says the direction, so that what is beyond is never called not told apart.
    """
    low, high = e.interval(0.90)
    if not e.allows_verdict:
        return "not resolved"
    if -margin < low and high < margin:
        return "within"
    low, high = e.interval(level)
    return "beyond" if low > margin or high < -margin else "not resolved"


def non_inferior(e: Estimate, margin: float, *, lower_is_better: bool) -> bool:
    """Whether a difference is shown to fall short of zero by less than the margin: a one-sided test at 5 %."""
    low, high = e.interval(0.90)
    return e.allows_verdict and (high < margin if lower_is_better else low > -margin)
