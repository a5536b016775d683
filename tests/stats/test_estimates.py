"""The report's statistics against scipy, scikit-learn, closed forms and simulation. S seeds, N examples, C cells."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats

from lorabench.results import scores
from lorabench.stats import estimates


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def test_components_are_those_of_the_two_way_table(rng: np.random.Generator) -> None:
    """Against sums written out: MS_seed, MS_example and MS_residual of a table without replication."""
    x = rng.normal(size=(4, 30)) + rng.normal(size=(4, 1)) + rng.normal(size=(1, 30))
    S, N = x.shape
    grand = x.mean()
    ms_seed = N * sum((row.mean() - grand) ** 2 for row in x) / (S - 1)
    ms_example = S * sum((column.mean() - grand) ** 2 for column in x.T) / (N - 1)
    ms_residual = sum((x[i, j] - x[i].mean() - x[:, j].mean() + grand) ** 2 for i in range(S) for j in range(N))
    ms_residual /= (S - 1) * (N - 1)
    e = estimates.crossed_mean(x)
    assert e.mean == pytest.approx(grand)
    assert (e.seed, e.example) == pytest.approx((ms_seed / (S * N), ms_example / (S * N)))
    assert e.interaction == pytest.approx(ms_residual / (S * N))
    t = stats.t.ppf(0.975, [S - 1, N - 1])
    assert e.half_width() == pytest.approx(math.sqrt(t[0] ** 2 * e.seed + t[1] ** 2 * e.example))


def test_a_p_value_is_that_of_the_interval_which_ends_at_zero(rng: np.random.Generator) -> None:
    for shift in (0.0, 0.3, 1.0, 5.0):
        e = estimates.crossed_mean(rng.normal(size=(4, 30)) + rng.normal(0, 0.3, (4, 1)) + shift)
        low, high = e.interval(1 - e.p_value())
        assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-6)
    sure = estimates.combine(1e9, [(1.0, 1.0), (1e-3, 50.0)], 2)
    assert 0 < sure.p_value() < 1e-8
    assert estimates.combine(1e99, [(1.0, 300.0)], 2).p_value() == estimates.SMALLEST_P


def test_examples_alone_are_a_t_interval(rng: np.random.Generator) -> None:
    x = rng.normal(size=(1, 50))
    e = estimates.crossed_mean(x)
    assert e.interval() == pytest.approx(stats.t.interval(0.95, 49, x.mean(), stats.sem(x[0])))
    assert not e.allows_verdict


def test_seeds_alone_are_a_t_test(rng: np.random.Generator) -> None:
    scores = rng.normal(0.4, 1, 6)
    for e in (estimates.mean_over_seeds(scores), estimates.crossed_mean(np.repeat(scores[:, None], 40, axis=1))):
        test = stats.ttest_1samp(scores, 0)
        assert e.p_value() == pytest.approx(test.pvalue)
        assert e.interval(0.9) == pytest.approx(tuple(test.confidence_interval(0.9)))


def test_seeds_that_agree_by_chance_leave_the_examples_share() -> None:
    """Each seed has its own luck with the examples: that their means are equal does not make the mean certain."""
    x = np.array([[1.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0]])
    e = estimates.crossed_mean(x)
    assert e.seed == pytest.approx(0) and e.example > 0 and e.half_width() > 0.1
    assert estimates.crossed_mean(np.zeros((3, 5))).p_value() == 1.0
    assert estimates.crossed_mean(np.ones((3, 5))).p_value() == 0.0


def test_weights_give_the_weighted_mean(rng: np.random.Generator) -> None:
    x, w = rng.normal(size=(3, 200)), rng.integers(1, 9, 200)
    rows = estimates.linearize(x, w)
    assert rows.mean(1) == pytest.approx([np.average(row, weights=w) for row in x])
    # Over examples: the delta-method variance of a ratio, sum(w^2 (x - m)^2) / sum(w)^2.
    m = np.average(x[0], weights=w)
    delta = (w**2 * (x[0] - m) ** 2).sum() / w.sum() ** 2
    assert estimates.crossed_mean(rows[:1]).variance == pytest.approx(delta * 200 / 199)


def test_two_one_sided_tests(rng: np.random.Generator) -> None:
    for shift in (0.0, 0.5, 0.9, 1.3):
        scores = rng.normal(shift, 0.6, 9)
        above = stats.ttest_1samp(scores, -1, alternative="greater").pvalue
        below = stats.ttest_1samp(scores, 1, alternative="less").pvalue
        e = estimates.mean_over_seeds(scores)
        assert (estimates.size(e, 1.0) == "within") == (max(above, below) < 0.05)
        assert estimates.non_inferior(e, 1.0, lower_is_better=False) == (above < 0.05)
        assert estimates.non_inferior(e, 1.0, lower_is_better=True) == (below < 0.05)


def test_direction_follows_the_metric() -> None:
    e = estimates.mean_over_seeds([-1.0, -1.1, -0.9])
    assert estimates.direction(e, p=0.01, lower_is_better=True) == "better"
    assert estimates.direction(e, p=0.01, lower_is_better=False) == "worse"
    assert estimates.direction(e, p=0.05, lower_is_better=False) == "not resolved"
    assert estimates.size(e, 0.5) == "beyond"


def test_two_seeds_give_an_interval_and_no_verdict() -> None:
    e = estimates.mean_over_seeds([5.0, 5.1])
    assert math.isfinite(e.half_width())
    assert estimates.direction(e, p=0.0, lower_is_better=False) == "not resolved"
    assert estimates.size(e, 100.0) == "not resolved"
    assert not estimates.non_inferior(e, 100.0, lower_is_better=False)


def test_holm() -> None:
    assert estimates.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert estimates.holm([]) == []
    assert estimates.holm([0.9, 0.8]) == [1.0, 1.0]


def test_intervals_at_holms_levels_agree_with_its_verdicts(rng: np.random.Generator) -> None:
    for _ in range(200):
        found = [estimates.mean_over_seeds(rng.normal(rng.choice([0, 1.0]), 0.5, 5)) for _ in range(4)]
        p = [e.p_value() for e in found]
        for e, adjusted, level in zip(found, estimates.holm(p), estimates.holm_levels(p), strict=True):
            low, high = e.interval(level)
            assert (low > 0 or high < 0) == (adjusted < 0.05)


def test_pooled_variance(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 4)) * 0.3 + rng.normal(size=(1, 4)) + np.arange(5)[:, None]
    pooled = estimates.pool(x)
    assert pooled.within == pytest.approx(np.mean([row.var(ddof=1) for row in x]))
    assert pooled.df == 12
    assert pooled.p == pytest.approx(stats.bartlett(*x).pvalue)
    two = estimates.pool(x[:2])  # two cells: the variance of their seed-paired differences
    assert two.difference == pytest.approx((x[0] - x[1]).var(ddof=1))
    anova = np.array([[x[c, s] - x[c].mean() - x[:, s].mean() + x.mean() for s in range(4)] for c in range(5)])
    assert pooled.difference == pytest.approx(2 * (anova**2).sum() / 12)


def test_bartlett_at_its_limits() -> None:
    assert estimates.bartlett(np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])) == 0.0
    assert estimates.bartlett(np.zeros((3, 3))) == 1.0


def test_a_typical_variance_counts_as_one_seed_more() -> None:
    values = np.array([0.0, 1.0, 2.0])  # variance 1
    assert estimates.seed_variance(values) == (1.0, 2.0)
    assert estimates.seed_variance(values, 4.0) == ((4 + 2 * 1) / 3, 3.0)
    assert estimates.seed_variance(values, 1 / 1.2) == (pytest.approx((1 / 1.2 + 2) / 3), 3.0)
    assert estimates.seed_variance(values, 0.8) == (1.0, 2.0), "a cell noisier than others stands alone"
    assert estimates.seed_variance(values[:1], 4.0) == (0.0, 0.0)
    e = estimates.mean_over_seeds(values, typical=4.0)
    assert e.half_width() == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(2 / 3))


def test_what_is_typical_is_unbiased_and_not_moved_by_a_noisy_cell(rng: np.random.Generator) -> None:
    one, other = [], []
    for _ in range(2000):
        x = rng.normal(size=(9, 5))
        one.append(estimates.typical_variances(x))
        x[3] *= 30
        other.append(estimates.typical_variances(x))
    for found, most in ((one, 1.1), (other, 1.45)):
        assert 0.9 < np.median([t.within for t in found]) < most
        assert 1.8 < np.median([t.difference for t in found]) < 2 * most


def test_bootstrap_agrees_with_components_on_a_mean(rng: np.random.Generator) -> None:
    x = (rng.random((4, 300)) < 0.7).astype(float) + rng.normal(size=(4, 1)) * 0.01
    draws = estimates.resample(lambda counts: counts @ x.T / 300, 300, 4000, rng)
    boot, exact = estimates.crossed_bootstrap(x.mean(1), draws, examples=300), estimates.crossed_mean(x)
    assert boot.seed == exact.seed
    assert boot.example == pytest.approx(exact.example, rel=0.1)
    assert boot.interaction == pytest.approx(exact.interaction, rel=0.15)
    assert boot.half_width() == pytest.approx(exact.half_width(), rel=0.1)


def test_resamples_are_drawn_once_for_all_seeds() -> None:
    """Equal seeds stay equal in every draw, and the same stream gives the same draws."""
    x = np.arange(20.0)
    draws = estimates.resample(
        lambda counts: np.stack([counts @ x, counts @ x], axis=1), 20, 50, np.random.default_rng(0)
    )
    assert draws.shape == (50, 2)
    assert (draws[:, 0] == draws[:, 1]).all()
    again = estimates.resample(lambda counts: (counts @ x)[:, None], 20, 50, np.random.default_rng(0))
    assert (again[:, 0] == draws[:, 0]).all()


def test_a_group_of_equal_examples_is_one_draw(rng: np.random.Generator) -> None:
    """Each example three times over, its copies in a group: the interval is that of the examples themselves."""
    x = rng.normal(size=(4, 90)) + rng.normal(size=90)
    order = rng.permutation(270)
    groups = np.repeat(np.arange(90), 3)[order] + 7
    three = np.repeat(x, 3, axis=1)[:, order]
    once, grouped, alone = (
        estimates.crossed_mean(x),
        estimates.crossed_mean(three, groups=groups),
        estimates.crossed_mean(three),
    )
    assert (grouped.mean, grouped.variance, grouped.example_df) == pytest.approx((once.mean, once.variance, 89))
    assert alone.variance < once.variance / 2

    def draw_means(table: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
        def means(counts: np.ndarray) -> np.ndarray:
            return np.asarray(counts @ table.T / counts.sum(1, keepdims=True))

        return estimates.resample(means, table.shape[1], 50, np.random.default_rng(0), groups)

    np.testing.assert_allclose(draw_means(x, None), draw_means(three, groups))


def test_groups_of_unequal_size_have_their_coverage(rng: np.random.Generator) -> None:
    """Dialogues of 1 to 9 replies that share their luck: 95 % intervals hold the mean of all dialogues' replies."""
    caught, times = {True: 0, False: 0}, 400
    for _ in range(times):
        groups = np.repeat(np.arange(60), rng.integers(1, 10, 60))
        shared = rng.normal(size=60)[groups]
        x = rng.normal(0, 0.2, (5, 1)) + shared + 0.3 * rng.normal(size=(5, len(groups)))
        for known in caught:
            low, high = estimates.crossed_mean(x, groups=groups if known else None).interval()
            caught[known] += low <= 0 <= high
    assert 0.92 <= caught[True] / times <= 0.98
    assert caught[False] / times < 0.85


def test_one_group_of_a_third_leaves_few_degrees_of_freedom() -> None:
    groups = np.concatenate([np.zeros(50, int), 1 + np.arange(100)])
    w = estimates.group_shares(150, groups)
    variance, df = estimates.variance_over_groups(1.0, w)
    assert df == 1.0 and variance == pytest.approx((w**2).sum() / (w**2 * (1 - 2 * w + (w**2).sum())).sum())
    equal = estimates.group_shares(150, np.repeat(np.arange(50), 3))
    assert estimates.variance_over_groups(1.0, equal) == pytest.approx((50 / 49, 49))
    assert estimates.variance_over_groups(1.0, np.ones(1)) == (0.0, 0.0)


@pytest.mark.parametrize(("seeds", "seed_sd", "example_sd"), [(3, 0.02, 1.0), (3, 0.1, 1.0), (8, 0.1, 0.5)])
def test_coverage(seeds: int, seed_sd: float, example_sd: float) -> None:
    """Nominal 95 % over 400 simulated tables with seeds and examples both random; the band is four standard errors."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(400):
        x = rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, example_sd, (1, 200)) + rng.normal(0, 0.5, (seeds, 200))
        low, high = estimates.crossed_mean(x).interval()
        hits += low <= 0 <= high
    assert 0.90 <= hits / 400 <= 0.99


def test_equivalence_is_claimed_falsely_in_at_most_one_of_twenty() -> None:
    """The difference lies exactly on the margin."""
    rng, claims = np.random.default_rng(6), 0
    for _ in range(400):
        x = 0.3 + rng.normal(0, 0.15, (5, 1)) + rng.normal(0, 0.5, (1, 100)) + rng.normal(0, 0.5, (5, 100))
        claims += estimates.size(estimates.crossed_mean(x), 0.3) == "within"
    assert claims / 400 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)


def test_bootstrap_coverage_of_macro_f1() -> None:
    """Truth: the macro-F1 of very many seeds and examples. Seeds differ in how often they are right."""
    rng = np.random.default_rng(8)

    def predict(seeds: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        label, hard = rng.integers(0, 3, n), rng.random(n)
        right = np.where(rng.random((seeds, n)) < 0.6, hard, rng.random((seeds, n))) < rng.normal(
            0.75, 0.02, (seeds, 1)
        )
        return label, np.where(right, label, (label + 1) % 3)

    def f1_scores(label: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
        tables = [np.bincount(label * 3 + p, counts, 9).reshape(3, 3) for p in predicted]
        return np.array([scores.macro_f1(t) for t in tables])

    def f1_of_draws(label: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.stack([f1_scores(label, predicted, row) for row in counts])

    label, predicted = predict(400, 3000)
    truth, hits = float(f1_scores(label, predicted, np.ones(3000)).mean()), 0
    for _ in range(100):
        y, p = predict(4, 150)
        statistic = partial(f1_of_draws, y, p)
        draws = estimates.resample(statistic, 150, 60, rng)
        low, high = estimates.crossed_bootstrap(f1_scores(y, p, np.ones(150)), draws, examples=150).interval()
        hits += low <= truth <= high
    assert 0.87 <= hits / 100 <= 1.0


def test_metrics_of_a_confusion_table(rng: np.random.Generator) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    y, p = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    table = sk.confusion_matrix(y, p).astype(float)
    assert scores.macro_f1(table) == pytest.approx(sk.f1_score(y, p, average="macro"))
    assert scores.mcc(table) == pytest.approx(sk.matthews_corrcoef(y, p))
    assert scores.mcc(np.array([[3.0, 0.0], [2.0, 0.0]])) == 0.0
