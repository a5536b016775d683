"""Power of the report's tests, against the noncentral t, numerical integration by scipy, and simulation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, stats

from lorabench.stats import estimates, power
from lorabench.stats.power import Design

ALONE = [Design(1.0, 3), Design(2.0, 4, comparisons=3), Design(1.4, 10, comparisons=7), Design(0.3, 35)]


@pytest.mark.parametrize(
    ("sd", "seeds", "detectable", "within"),
    [
        (1.0, 3, "8.7", {1: "0.13", 2: "0.56"}),
        (1.0, 10, "1.41", {1: "0.80", 2: "1.00"}),
        (1.4, 10, "1.97", {1: "0.36", 2: "0.99"}),
    ],
)
def test_the_numbers_that_budgets_are_chosen_by(sd: float, seeds: int, detectable: str, within: dict[int, str]) -> None:
    """Seven comparisons, each by its own seeds, SD in points: smallest detectable at power .8, power within a margin."""
    d = Design(sd, seeds, comparisons=7)
    digits = len(detectable.split(".")[1])
    assert f"{power.smallest_detectable(d):.{digits}f}" == detectable
    for margin, wanted in within.items():
        assert power.equivalence(d, margin) == pytest.approx(float(wanted), abs=0.01)


def test_an_sd_of_two_points_takes_36_seeds_for_a_margin_of_one() -> None:
    d = Design(2.0, 36, comparisons=7)
    assert power.equivalence(d, 1.0) == pytest.approx(0.8, abs=0.02)
    needed = power.seeds_needed(d, lambda x: power.equivalence(x, 1.0), 0.8)
    assert needed is not None and abs(needed - 36) <= 1


@pytest.mark.parametrize("d", ALONE, ids=str)
def test_detection_is_the_noncentral_t(d: Design) -> None:
    se, df = d.sd / math.sqrt(d.seeds), d.seeds - 1
    limit = stats.t.isf(0.025 / d.comparisons, df)
    for difference in (0.3 * se, 2 * se, 5 * se):
        missed = np.diff(stats.nct.cdf([-limit, limit], df, difference / se))[0]
        assert power.detection(d, difference) == pytest.approx(1 - missed, abs=1e-7)
        assert power.detection(d, -difference) == pytest.approx(1 - missed, abs=1e-7)
    assert power.detection(d, 0.0) == pytest.approx(0.05 / d.comparisons, abs=1e-9)


@pytest.mark.parametrize("d", ALONE, ids=str)
def test_non_inferiority_is_the_noncentral_t(d: Design) -> None:
    se, df = d.sd / math.sqrt(d.seeds), d.seeds - 1
    for margin, difference in ((1.0, 0.0), (2.0, -0.5), (2.0, 1.0)):
        wanted = stats.nct.sf(stats.t.isf(0.05, df), df, (margin + difference) / se)
        assert power.non_inferiority(d, margin, difference=difference) == pytest.approx(wanted, abs=1e-7)
    assert power.non_inferiority(d, 1.0, difference=-1.0) == pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize("d", ALONE, ids=str)
@pytest.mark.parametrize(("margin", "difference"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.7)])
def test_equivalence_is_an_integral_over_the_variance(d: Design, margin: float, difference: float) -> None:
    """By scipy's adaptive quadrature over chi-squared, up to where the interval alone is wider than the margin."""
    se, df = d.sd / math.sqrt(d.seeds), d.seeds - 1
    t = stats.t.isf(0.05, df)

    def given(q: float) -> float:
        room = margin - t * se * math.sqrt(q / df)
        return stats.chi2.pdf(q, df) * np.diff(stats.norm.cdf([-room, room], difference, se))[0]

    end = df * (margin / (t * se)) ** 2
    cuts = sorted({0.0, *(min(end, x) for x in stats.chi2.isf([1 - 1e-6, 0.9, 0.5, 0.1, 1e-3, 1e-12], df))})
    wanted = sum(integrate.quad(given, a, b, epsabs=1e-11)[0] for a, b in pairwise(cuts))
    assert power.equivalence(d, margin, difference=difference) == pytest.approx(wanted, abs=1e-7)


def test_at_the_margin_equivalence_is_claimed_in_at_most_one_of_twenty() -> None:
    for seeds in (3, 8, 30):
        assert power.equivalence(Design(1.0, seeds), 1.0, difference=1.0) <= 0.05 + 1e-9


@pytest.mark.parametrize("d", [Design(1.0, 3, comparisons=7), Design(1.0, 8, example_sd=40.0, examples=4000)], ids=str)
def test_smallest_detectable_is_detected_with_the_wanted_power(d: Design) -> None:
    for wanted in (0.5, 0.8, 0.95):
        found = power.smallest_detectable(d, power=wanted)
        assert power.detection(d, found) == pytest.approx(wanted, abs=1e-8)


def test_examples_add_what_seeds_cannot_reduce() -> None:
    d = Design(1.0, 400, example_sd=13.0, examples=4000)
    left = stats.norm.ppf(0.975) * 13 / math.sqrt(4000)
    assert power.example_half_width(d) == pytest.approx(left)
    assert left == pytest.approx(0.4, abs=0.01)  # 4,000 items, 13 points an item: a modest share
    # Very many seeds: a normal mean with V_example alone, however many more there are.
    spread, limit = 13 / math.sqrt(4000), stats.norm.ppf(0.95)
    wanted = 2 * stats.norm.cdf(0.5 / spread - limit) - 1
    assert power.equivalence(d.at(100_000), 0.5) == pytest.approx(wanted, abs=0.002)
    assert power.equivalence(d, 0.3) == 0.0  # the interval is wider than the margin with any number of seeds
    assert power.seeds_needed(d, lambda x: power.equivalence(x, 0.3), 0.5) is None


def test_seeds_needed_is_the_fewest() -> None:
    d = Design(1.4, 3, comparisons=3)
    for of in (lambda x: power.equivalence(x, 2.0), lambda x: power.non_inferiority(x, 2.0)):
        needed = power.seeds_needed(d, of, 0.9)
        assert needed is not None and needed > 3
        assert of(d.at(needed)) >= 0.9 > of(d.at(needed - 1))


def test_the_interval_of_an_sd() -> None:
    low, high = power.sd_interval(2.0, 3)
    assert (low, high) == pytest.approx([2 * math.sqrt(3 / stats.chi2.ppf(q, 3)) for q in (0.975, 0.025)])
    assert low == pytest.approx(1.13, abs=0.01) and high == pytest.approx(7.46, abs=0.01)  # four seeds know little


def test_the_reports_own_tests_have_this_power() -> None:
    """Tables of seeds x examples for four cells, judged as the report judges them, a thousand times over.

    The seed SD, the example's share and a seed's luck with examples are of one order, so that both parts matter.
    """
    rng, C, S, N, times = np.random.default_rng(3), 4, 5, 60, 1000
    seed, example, rest, shift, margin = 1.0, 4.0, 3.0, 2.5, 3.0
    d = Design(
        math.sqrt(2 * (seed**2 + rest**2 / N)),
        S,
        comparisons=C - 1,
        example_sd=math.sqrt(2) * example,
        interaction_sd=math.sqrt(2) * rest,
        examples=N,
    )
    found = np.zeros(4)
    for _ in range(times):
        x = rng.normal(0, seed, (C, S, 1)) + rng.normal(0, example, (C, 1, N)) + rng.normal(0, rest, (C, S, N))
        same, apart = estimates.crossed_mean(x[1] - x[0]), estimates.crossed_mean(x[2] - x[0] + shift)
        found += (
            apart.p_value() * (C - 1) < 0.05,
            estimates.size(same, margin) == "within",
            estimates.non_inferior(same, margin, lower_is_better=False),
            estimates.size(apart, margin) == "within",
        )
    wanted = [
        power.detection(d, shift), power.equivalence(d, margin), power.non_inferiority(d, margin),
        power.equivalence(d, margin, difference=shift),
    ]  # fmt: skip
    for seen, p in zip(found / times, wanted, strict=True):
        assert seen == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / times) + 0.005)
