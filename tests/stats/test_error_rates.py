"""Do the report's intervals hold what they promise? Simulated sweeps with pooled seed variance.

Shape letters: C cells, S seeds, N examples.

Every cell is compared with the first one. What all cells share (a seed's luck, a hard example) cancels; what is each
cell's own is drawn with the SDs below. Coverage of a nominal 95 % interval has to lie in 93 to 99 %, and the family-wise
error of Holm's adjusted p at 5 % must not exceed 6 %. That holds in every setting: over 5,000 sweeps in the slow tests,
over fewer in the default suite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from lorabench.results.cells import MIN_BARTLETT_P
from lorabench.stats import estimates
from lorabench.stats.estimates import Estimate

CELLS = 4
COVERAGE, ERROR = (0.93, 0.99), 0.06
REST = 0.4  # SD of one seed's luck with one example


@dataclass(frozen=True)
class Setting:
    seeds: int
    examples: int
    seed_sd: float
    example_sd: float  # of a cell's own examples; with `binary` not used
    binary: bool = False

    def __str__(self) -> str:
        kind = "binary" if self.binary else f"example{self.example_sd:g}"
        return f"S{self.seeds}-n{self.examples}-seed{self.seed_sd:g}-{kind}"


NOISE = ((0.0, 0.3), (0.01, 0.3), (0.03, 0.1), (0.1, 0.3))  # seed_sd, example_sd


def draw(s: Setting, rng: np.random.Generator) -> np.ndarray:
    """[C, S, N]: one sweep whose cells do not differ."""
    size = (CELLS, s.seeds, s.examples)
    seeds = rng.normal(0, s.seed_sd, (CELLS, s.seeds, 1)) + rng.normal(0, 0.02, (1, s.seeds, 1))
    if s.binary:
        # right where the example's difficulty (in 15 % of cases this run's luck instead) stays below the run's skill
        hard, luck = rng.random((1, 1, s.examples)), rng.random(size)
        return (np.where(rng.random(size) < 0.85, hard, luck) < 0.75 + seeds).astype(np.float64)
    hard = rng.normal(0, 0.5, (1, 1, s.examples)) + rng.normal(0, s.example_sd, (CELLS, 1, s.examples))
    return seeds + hard + REST * rng.standard_normal(size, dtype=np.float32)


def differences(x: np.ndarray, pool_from: float) -> list[Estimate]:
    """Each cell minus the first, with pooled seed variance where Bartlett's p is at least `pool_from`, else its own."""
    pooled = estimates.pool(x.mean(2))
    shared = (pooled.difference, pooled.df) if pooled.p >= pool_from else None
    return [estimates.crossed_mean(x[c] - x[0], pooled=shared) for c in range(1, CELLS)]


def simulate(s: Setting, times: int, pool_from: float) -> tuple[float, float, float]:
    """Return the coverage, and the family-wise error where no cell differs and where all but one differ by far.

    In the last case Holm has one test left.
    """
    rng = np.random.default_rng([20261124, s.seeds, s.examples, int(1000 * s.seed_sd), int(1000 * s.example_sd)])
    covered = wrong = wrong_left = 0
    for _ in range(times):
        x = draw(s, rng)
        found = differences(x, pool_from)
        covered += sum(low <= 0 <= high for low, high in (e.interval() for e in found))
        p = [e.p_value() for e in found]
        wrong += min(estimates.holm(p)) < 0.05
        wrong_left += estimates.holm([p[0], 0.0, 0.0])[0] < 0.05
    return covered / (times * len(found)), wrong / times, wrong_left / times


def check(s: Setting, times: int, pool_from: float = 0.0) -> None:
    coverage, error, left = simulate(s, times, pool_from)
    assert COVERAGE[0] <= coverage <= COVERAGE[1]
    assert error <= ERROR
    assert left <= ERROR


SHORT = [
    *(Setting(S, 200, *NOISE[i]) for S in (3, 5, 8) for i in (1, 3)),
    *(Setting(S, 1000, 0.03, 0.1) for S in (3, 8)),
    Setting(3, 1000, 0.01, 0.0, binary=True),
]
FULL = [
    *(Setting(S, n, *noise) for S in (3, 5, 8) for n in (200, 1000, 6000) for noise in NOISE),
    *(Setting(S, n, 0.01, 0.0, binary=True) for S in (3, 5, 8) for n in (200, 1000, 6000)),
]


@pytest.mark.parametrize("setting", SHORT, ids=str)
def test_coverage_and_family_wise_error(setting: Setting) -> None:
    check(setting, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("setting", FULL, ids=str)
def test_coverage_and_family_wise_error_in_full(setting: Setting) -> None:
    check(setting, 5000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        Setting(8, 200, 0.1, 0.3),
        Setting(5, 200, 0.1, 0.3),
        Setting(3, 1000, 0.01, 0.3),
        Setting(3, 200, 0.1, 0.3),  # at a gate of .10 these three were above 6 %
        Setting(3, 1000, 0.1, 0.3),
        Setting(5, 1000, 0.1, 0.3),
    ],
    ids=str,
)
def test_with_variance_pooled_only_where_bartletts_test_does_not_object(setting: Setting) -> None:
    """What the report does: `results.HOMOGENEOUS`."""
    check(setting, 5000, MIN_BARTLETT_P)


def test_intervals_without_the_examples_share_would_be_caught() -> None:
    """The check has teeth: seeds alone, as many papers do it, cover far less where examples matter."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        x = draw(Setting(5, 200, 0.01, 0.3), rng)
        low, high = estimates.mean_over_seeds((x[1] - x[0]).mean(1)).interval()
        covered += low <= 0 <= high
    assert covered / 400 < COVERAGE[0] - 0.05
