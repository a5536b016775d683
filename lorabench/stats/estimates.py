"""Statistics of a comparison: pure functions of arrays. Shape letters: S seeds, N examples, R bootstrap draws, C cells.

Seeds and test examples are crossed: every seed's model meets the same examples. With m_i the mean of seed i, m_j the
mean of example j and MS the residual mean square of the two-way table without replication, the variance of the grand
mean is V = V_seed + V_example - V_interaction, where

    V_seed = var(m_i) / S,   V_example = var(m_j) / N,   V_interaction = MS / (S N)

(Searle, Casella & McCulloch, Variance Components, 1992, section 4.5), and t quantiles are taken at Satterthwaite's
degrees of freedom (Biometrics Bulletin 2, 1946).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import chdtrc, stdtr, stdtrit

Direction = Literal["better", "worse", "not resolved"]
Size = Literal["within", "beyond", "not resolved"]
Statistic = Callable[[np.ndarray], np.ndarray]  # counts [R, N] -> [R, S]


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of two, with the parts of its variance. `examples` is None where only seeds vary."""

    mean: float
    seed: float  # V_seed: variance of the mean through seeds (0 with one seed, where it cannot be known)
    example: float  # V_example
    interaction: float  # V_interaction, contained in both of the above
    seed_df: float
    example_df: float
    interaction_df: float
    seeds: int
    examples: int | None

    @property
    def variance(self) -> float:
        """V, never below V_seed or V_example: each alone is the whole variance when the other source is silent."""
        return max(self.seed + self.example - self.interaction, self.seed, self.example)

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom: V^2 / sum(V_k^2 / df_k)."""
        parts = ((self.seed, self.seed_df), (self.example, self.example_df), (self.interaction, self.interaction_df))
        denominator = sum(v * v / df for v, df in parts if v > 0 and df > 0)
        return self.variance**2 / denominator if denominator > 0 and self.variance > 0 else math.inf

    def half_width(self, level: float = 0.95) -> float:
        """Half the width of the interval at a level."""
        return quantile((1 + level) / 2, self.df) * math.sqrt(self.variance)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval of the mean: (low, high)."""
        half = self.half_width(level)
        return self.mean - half, self.mean + half

    def p_value(self) -> float:
        """Two-sided p value of the hypothesis that the mean is zero."""
        if self.variance == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * cdf(-abs(self.mean) / math.sqrt(self.variance), self.df))

    @property
    def allows_verdict(self) -> bool:
        """Whether there are seeds enough for a verdict: two give an interval only."""
        return self.seeds >= 3


@dataclass(frozen=True)
class Pooled:
    """Seed variance that several cells share."""

    within: float  # variance of one seed's score
    difference: float  # variance of one seed's difference of two cells
    df: float  # (C - 1)(S - 1): cells share their seeds, so no more is claimed for either variance
    cells: int
    p: float  # p value of equal variances (Bartlett)


def quantile(p: float, df: float) -> float:
    """Quantile of Student's t distribution; of the normal distribution where df is infinite."""
    return float(stdtrit(min(df, 1e9), p))


def cdf(t: float, df: float) -> float:
    """Probability that Student's t with df degrees of freedom is at most t."""
    return float(stdtr(min(df, 1e9), t))


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


def crossed_mean(x: np.ndarray, *, pooled: tuple[float, float] | None = None) -> Estimate:
    """Estimate the mean of a table [S, N] of seeds x examples.

    pooled: (variance of one seed's mean, its df), used in place of this table's. The difference of two cells that share
    seeds and examples is `crossed_mean(a - b)`.
    """
    x = np.asarray(x, dtype=np.float64)
    S, N = x.shape
    rows, columns = x.mean(1), x.mean(0)
    residual = x - rows[:, None] - columns + x.mean()
    df = (S - 1) * (N - 1)
    interaction = float((residual**2).sum() / df) / (S * N) if df else 0.0
    example = float(columns.var(ddof=1)) / N if N > 1 else 0.0
    return _estimate(rows, example, interaction, N, pooled)


def crossed_bootstrap(
    values: np.ndarray, draws: np.ndarray, *, examples: int, pooled: tuple[float, float] | None = None
) -> Estimate:
    """Estimate the mean over seeds of a statistic that is no mean over examples, such as macro-F1.

    values: [S], the statistic of each seed. draws: [R, S], the statistic of R resamples of the examples; a resample is
    the same for all seeds. One seed's variance over resamples is (E + I) / N, that of their mean E / N + I / (S N); the
    three parts follow. The draws give the variance only; the t quantile comes from the degrees of freedom.
    """
    values, draws = np.asarray(values, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    S = len(values)
    example = float(draws.mean(1).var(ddof=1))
    one_seed = float(draws.var(axis=0, ddof=1).mean())
    interaction = max(0.0, (one_seed - example) / (S - 1)) if S > 1 else 0.0
    return _estimate(values, example, interaction, examples, pooled)


def mean_over_seeds(values: Sequence[float] | np.ndarray, *, pooled: tuple[float, float] | None = None) -> Estimate:
    """Estimate the mean of values [S] over seeds, where nothing is known of single examples.

    The interval leaves out the variance through examples, so it is too narrow.
    """
    return _estimate(np.asarray(values, dtype=np.float64), 0.0, 0.0, None, pooled)


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate | None:
    """Estimate mean(a) - mean(b) of independent runs, with Welch's degrees of freedom.

    None where either has fewer than three runs.
    """
    if min(len(a), len(b)) < 3:
        return None
    parts = [(float(np.var(x, ddof=1)) / len(x), len(x) - 1) for x in (a, b)]
    variance, denominator = sum(v for v, _ in parts), sum(v * v / df for v, df in parts)
    df = variance**2 / denominator if denominator > 0 else math.inf
    return Estimate(float(np.mean(a) - np.mean(b)), variance, 0.0, 0.0, df, 0.0, 0.0, min(len(a), len(b)), None)


def _estimate(
    seeds: np.ndarray, example: float, interaction: float, examples: int | None, pooled: tuple[float, float] | None
) -> Estimate:
    S = len(seeds)
    variance, df = pooled or (float(seeds.var(ddof=1)) if S > 1 else 0.0, float(S - 1))
    rest = float((examples or 1) - 1)
    return Estimate(float(seeds.mean()), variance / S, example, interaction, df, rest, rest * (S - 1), S, examples)


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


def size(e: Estimate, margin: float) -> Size:
    """Compare a difference with a margin: two one-sided tests at 5 %, i.e. the 90 % interval (Schuirmann 1987)."""
    low, high = e.interval(0.90)
    if not e.allows_verdict:
        return "not resolved"
    if -margin < low and high < margin:
        return "within"
    return "beyond" if low > margin or high < -margin else "not resolved"


def non_inferior(e: Estimate, margin: float, *, lower_is_better: bool) -> bool:
    """Whether a difference is shown to fall short of zero by less than the margin: a one-sided test at 5 %."""
    low, high = e.interval(0.90)
    return e.allows_verdict and (high < margin if lower_is_better else low > -margin)


def seeds_needed(e: Estimate, gap: float, *, level: float = 0.90, limit: int = 200) -> int | None:
    """Number of seeds at which the interval's half-width falls to `gap`, with the same examples; None beyond `limit`.

    Seeds cannot reduce V_example - V_interaction; the rest shrinks as 1/S, and its df grows with S.
    """
    fixed = _seedless_variance(e)
    for S in range(e.seeds, limit + 1):
        seed = e.seed * e.seeds / S
        df = e.seed_df * (S - 1) / max(e.seeds - 1, 1)
        if df > 0 and quantile((1 + level) / 2, df) * math.sqrt(seed + fixed) <= gap:
            return S
    return None


def least_half_width(e: Estimate, *, level: float = 0.90) -> float:
    """Half-width of the interval that is left with any number of seeds."""
    return quantile((1 + level) / 2, math.inf) * math.sqrt(_seedless_variance(e))


def _seedless_variance(e: Estimate) -> float:
    """V_example - V_interaction: the part of the variance that more seeds cannot reduce."""
    return max(e.example - e.interaction, 0.0)
