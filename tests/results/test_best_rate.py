"""Best rates between grid points, against scipy's least squares, numpy's polynomials, Welch's test and simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import optimize, stats

from lorabench.results import best_rate
from lorabench.results.best_rate import Missing, Optimum
from lorabench.results.selection import Choice, Rate

GRID = tuple(1e-3 * 2.0**k for k in range(5))  # 1e-3 to 1.6e-2


def choice(losses: Mapping[float, Sequence[float]], *, failed: Sequence[float] = ()) -> Choice:
    found = tuple(Rate(lr, tuple(losses[lr]), failures=lr in failed) for lr in sorted(losses))
    best = min((r for r in found if r.eligible), key=lambda r: r.mean)
    return Choice(best.lr, found, None)


def parabola(best: float, *, curve: float = 0.02, grid: Sequence[float] = GRID) -> dict[float, float]:
    return {lr: 0.6 + curve * math.log2(lr / best) ** 2 for lr in grid}


def located(made: Optimum | Missing) -> Optimum:
    assert isinstance(made, Optimum), made
    return made


def test_a_parabola_is_found_exactly() -> None:
    """Seeds that lie higher or lower at every rate change nothing and add no variance."""
    losses = parabola(3.3e-3)
    made = located(best_rate.optimum(choice({lr: [x + up for up in (0.0, 0.1, -0.05)] for lr, x in losses.items()})))
    assert made.lr == pytest.approx(3.3e-3)
    assert made.loss == pytest.approx(0.6 + 0.05 / 3)
    assert made.curvature == pytest.approx(0.02)
    assert made.variance == pytest.approx(0, abs=1e-20)
    assert made.seeds == 3


def test_one_seed_has_a_minimum_and_no_interval() -> None:
    """How far its losses lie from a parabola does not say how far a seed moves the minimum."""
    rng = np.random.default_rng(3)
    losses = {lr: [x + rng.normal(0, 0.003)] for lr, x in parabola(4.4e-3).items()}
    made = located(best_rate.optimum(choice(losses)))
    x, y = np.log2(list(losses)), np.array([v[0] for v in losses.values()])
    (lowest, _, _), _ = optimize.curve_fit(lambda x, m, a, c: a + c * (x - m) ** 2, x, y, p0=(-8, 0.6, 0.02))
    assert made.log2_rate == pytest.approx(lowest, abs=1e-5)
    assert made.variance is None and made.interval() == (0, math.inf)


def test_several_seeds_are_fitted_alone() -> None:
    """Against numpy's polynomial of each seed and a numerical gradient of -b / 2c."""
    rng = np.random.default_rng(5)
    y = np.array(list(parabola(3.6e-3).values()))[:, None] + rng.normal(0, 0.004, (5, 4))
    made = located(best_rate.optimum(choice(dict(zip(GRID, y.tolist(), strict=True)))))
    x = np.log2(GRID)
    each = np.array([np.polyfit(x, column, 2) for column in y.T])  # c, b, a
    mean = each.mean(0)

    def lowest(p: np.ndarray) -> float:
        return float(-p[1] / (2 * p[0]))

    steps = np.eye(3) * 1e-7
    gradient = np.array([(lowest(mean + s) - lowest(mean - s)) / 2e-7 for s in steps])
    assert made.log2_rate == pytest.approx(lowest(mean))
    assert made.variance == pytest.approx(gradient @ np.cov(each.T) @ gradient / 4, rel=1e-4)
    low, high = made.interval(0.9)
    half = stats.t.ppf(0.95, 3) * math.sqrt(made.variance or 0)
    assert (math.log2(low), math.log2(high)) == pytest.approx((made.log2_rate - half, made.log2_rate + half))


def test_coverage_of_the_interval() -> None:
    rng = np.random.default_rng(17)
    truth, hits, made = 3.4e-3, 0, 0
    clean = parabola(truth)
    for _ in range(400):
        found = best_rate.optimum(choice({lr: (x + rng.normal(0, 0.006, 4)).tolist() for lr, x in clean.items()}))
        if isinstance(found, Optimum):
            low, high = found.interval()
            made, hits = made + 1, hits + (low < truth < high)
    assert made > 390
    assert 0.92 < hits / made < 0.98


def test_rates_far_from_the_best_do_not_bend_the_fit() -> None:
    grid = [1e-3 * 2.0**k for k in range(-3, 7)]
    losses = parabola(3.3e-3, grid=grid)
    far = {lr: x + (1.0 if abs(math.log2(lr / 4e-3)) > 2.5 else 0.0) for lr, x in losses.items()}
    made = located(best_rate.optimum(choice({lr: [x, x] for lr, x in far.items()})))
    assert made.lr == pytest.approx(3.3e-3)


def test_unequal_numbers_of_seeds_share_one_fit() -> None:
    losses = {lr: [x, x + 0.002] if lr > 2e-3 else [x + 0.001] for lr, x in parabola(4e-3).items()}
    made = located(best_rate.optimum(choice(losses)))
    assert made.variance is None, "seeds that are not the same at every rate cannot be fitted one by one"
    x = np.repeat(np.log2(GRID), [len(v) for v in losses.values()])
    c, b, _ = np.polyfit(x, np.concatenate(list(losses.values())), 2)
    assert made.log2_rate == pytest.approx(-b / (2 * c))


def test_three_rates_and_one_seed_have_no_interval() -> None:
    made = located(best_rate.optimum(choice({lr: [x] for lr, x in parabola(2.1e-3, grid=GRID[:3]).items()})))
    assert made.lr == pytest.approx(2.1e-3)
    assert made.variance is None
    assert made.interval() == (0, math.inf)
    assert best_rate.contrast([made, made], [1, -1]) is None


@pytest.mark.parametrize(
    ("made", "reason", "settle"),
    [
        (choice({1e-3: [0.5], 2e-3: [0.4]}), "2 eligible rates", "five rates"),
        (choice({lr: [x] for lr, x in parabola(5e-2).items()}), "1.6e-2, is the largest", "rates above 1.6e-2"),
        (choice({lr: [x] for lr, x in parabola(1e-4).items()}), "1e-3, is the smallest", "rates below 1e-3"),
        (choice({lr: [x] for lr, x in parabola(2e-2).items()}, failed=[1.6e-2]), "8e-3, is the largest", "between 8e-3 and 1.6e-2"),
        (
            Choice(2e-3, (Rate(1e-3, (), missing=1, pruned=(50,)), *(Rate(lr, (x,)) for lr, x in ((2e-3, 0.4), (4e-3, 0.5), (8e-3, 0.6)))), "low"),
            "2e-3, is the smallest eligible", "that were pruned, 1e-3, trained to their end: the same command with sweep.prune=false",
        ),
        (choice(dict(zip(GRID, [[0.5], [0.9], [0.49], [0.9], [0.5]], strict=True))), "do not curve upwards", "more seeds"),
        (Choice(None, (Rate(1e-3, (), failures=1),)), "no learning rate is eligible", "to its end"),
        (Choice(None), "no learning rate is eligible", "to its end"),
    ],
    ids=["few", "high end", "low end", "diverged above", "pruned below", "curves down", "all diverged", "no rates"],
)  # fmt: skip
def test_what_has_no_minimum_says_why(made: Choice, reason: str, settle: str) -> None:
    found = best_rate.optimum(made)
    assert isinstance(found, Missing)
    assert reason in found.reason
    assert settle in found.settle


def of_sample(values: Sequence[float] | np.ndarray) -> Optimum:
    return Optimum(
        float(np.mean(values)), float(np.var(values, ddof=1)) / len(values), len(values), 0.5, 0.02
    )  # fmt: skip


def test_a_contrast_has_each_cells_own_degrees_of_freedom() -> None:
    """Never narrower than Welch's interval, which takes one quantile for the sum."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(-8, 0.3, 5), rng.normal(-11, 0.1, 3)
    made = best_rate.contrast([of_sample(a), of_sample(b)], [1, -1])
    assert made is not None and made.mean == pytest.approx(a.mean() - b.mean())
    parts = [stats.t.ppf(0.975, len(x) - 1) ** 2 * x.var(ddof=1) / len(x) for x in (a, b)]
    assert made.half_width() == pytest.approx(math.sqrt(sum(parts)))
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert made.interval()[0] < low and high < made.interval()[1]
    assert best_rate.contrast([of_sample(a), of_sample(b)], [1, 0]) == best_rate.contrast([of_sample(a)], [1])


def test_slope_weights_are_least_squares() -> None:
    x, y = [2.0, 3.0, 4.0, 6.0], [-8.0, -8.4, -9.1, -9.9]
    assert np.dot(best_rate.slope_weights(x), y) == pytest.approx(np.polyfit(x, y, 1)[0])
