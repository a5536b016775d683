"""Intervals of shares: inside 0 to 100 %, and wide enough where nearly all test examples are right or wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fixtures.sweeps import RANK_SWEEP, build
from lorabench.report.cautions import warnings
from lorabench.results import formatting, scores
from lorabench.results.findings import find
from lorabench.results.sweep import load
from lorabench.stats import estimates

ACCURACY = formatting.metric("accuracy", lower_is_better=False)


@pytest.mark.parametrize(("right", "of"), [(47, 47), (46, 47), (0, 47), (300, 300)])
def test_all_right_is_not_certainty(right: int, of: int) -> None:
    table = np.tile((np.arange(of) < right).astype(float), (3, 1))
    e = estimates.crossed_mean(table)
    low, high = estimates.share_interval(e)
    wilson = stats.binomtest(right, of).proportion_ci(method="wilson")
    assert low <= wilson.low + 1e-9 and high >= wilson.high - 1e-9
    assert 0 <= low <= e.mean <= high <= 1
    assert scores.with_interval(ACCURACY, e) == f"{100 * right / of:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def test_an_interval_of_a_share_ends_at_its_bounds() -> None:
    e = estimates.combine(0.26, [(0.5, 1.0)], 2)
    assert scores.with_interval(ACCURACY, e) == "26.0 (0.0 to 100.0)"
    loss = formatting.metric("loss", lower_is_better=True)
    assert scores.with_interval(loss, e).startswith("0.260 ± "), "a loss has no upper bound"
    assert scores.with_interval(ACCURACY, estimates.combine(0.7, [(1e-4, 9.0)], 10)) == "70.0 ± 2.3"
    assert scores.with_interval(ACCURACY, estimates.mean_over_seeds([0.5])) == "50.0"


def test_a_small_test_is_said(tmp_path: Path) -> None:
    f = find(load(build(tmp_path / "s", RANK_SWEEP[1:4], examples=47).root))
    assert any(line.startswith("47 test examples: few.") for line in warnings(f))
    f = find(load(build(tmp_path / "t", RANK_SWEEP[1:4], examples=400).root))
    assert not any("few." in line for line in warnings(f))
