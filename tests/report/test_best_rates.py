"""Slopes of the best rate: planted ones come back inside their intervals, and the claims are judged on the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fixtures.planted_sweeps import BEST, opened, rule_sweep
from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.claims import rates as claims_rates
from lorabench.report import theme
from lorabench.report.section import Section
from lorabench.report.sections import best_rates
from lorabench.results import rate_slopes
from lorabench.results.evidence import Evidence

PLANTED = (0.1, -0.45, -0.2)  # not theory's: what comes back is what was planted


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return opened(rule_sweep(tmp_path_factory.mktemp("rules") / "s", PLANTED))[1]


def part(e: Evidence) -> Section:
    made = best_rates.section(e, theme.looks(e.sweep.cells))
    assert made is not None
    return made


def test_planted_slopes_come_back_within_their_intervals(rules: Evidence) -> None:
    found = rate_slopes.slopes(rules)
    assert [s.rule for s in found] == list(rate_slopes.RULES)
    for s, planted in zip(found, PLANTED, strict=True):
        assert s.estimate is not None and s.slope is not None
        low, high = s.estimate.interval()
        assert low <= planted <= high
        assert high - low < 0.25
        assert s.slope == pytest.approx(planted, abs=0.05)


def test_a_slope_is_that_of_a_least_squares_line(rules: Evidence) -> None:
    s = rate_slopes.slopes(rules)[1]
    x, y = np.log2(s.line.ranks), [o.log2_rate for o in rules.located(s.line.cells)]
    assert s.slope == pytest.approx(np.polyfit(x, y, 1)[0])


def test_the_rules_meet_at_the_anchor(rules: Evidence) -> None:
    found = rate_slopes.slopes(rules)
    assert rate_slopes.anchors(found) == [(8, 2.0)]
    assert [s.constant for s in found] == ["s = 16/r", "s = 2", "s = 5.657/√r"]
    assert "r = 8, s = 2" in part(rules).drawings[0].caption


def test_claims_are_judged_on_the_numbers_shown(rules: Evidence) -> None:
    judged = (claims_rates.slope_with_alpha_fixed, claims_rates.slope_with_scale_fixed, claims_rates.slope_with_rslora)
    for s, claim in zip(rate_slopes.slopes(rules), judged, strict=True):
        verdict = claim(rules)
        assert s.estimate is not None
        assert verdict.interval == s.estimate.interval()
        assert best_rates.bounds(s).startswith(verdict.number.removeprefix("slope "))


def test_tables_and_picture(rules: Evidence) -> None:
    made = part(rules)
    fitted, located = made.tables
    assert [r.texts[0] for r in fitted.rows] == [r.name for r in rate_slopes.RULES]
    assert [r.texts[4] for r in fitted.rows] == ["0.00", "−0.50", "−0.25"]
    assert len(located.rows) == 7 and all(
        len(r.runs) == 10 for r in located.rows
    )  # five rates, two seeds; the anchor once
    assert "theory −0.25" in made.drawings[0].alt
    for ax, planted, theory in zip(made.drawings[0].figure.axes, PLANTED, (0.0, -0.5, -0.25), strict=True):
        drawn = [
            np.log2(np.array(line.get_data()))
            for line in ax.lines
            if len(line.get_xdata()) == 2 and line.get_xdata()[0] != line.get_xdata()[1] and line.get_xdata()[0] > 0
        ]
        found = sorted(float((y[1] - y[0]) / (x[1] - x[0])) for x, y in drawn)
        assert any(s == pytest.approx(theory, abs=1e-9) for s in found)
        assert any(s == pytest.approx(planted, abs=0.05) for s in found)
    assert part(rules).drawings == made.drawings


def test_a_best_rate_at_the_edge_leaves_no_slope_and_says_why(tmp_path: Path) -> None:
    rates = [BEST * 2.0**k for k in range(-2, 3)]
    cells = [
        Planted("lora", rates, best, 0.76, r=r, seed_sd=0.0004)
        for r, best in ((1, BEST), (8, BEST), (64, rates[-1] * 4))
    ]
    e = opened(build(tmp_path / "s", cells, tune=(0, 1), confirm=()))[1]
    made = part(e)
    text = made.tables[0].rows[0].texts
    assert text[3] == "–" and "r = 64: the best rate, 1.6e-2, is the largest eligible one" in text[5]
    assert "Hollow triangles" in made.drawings[0].caption
    assert "64: none inside the grid" in made.drawings[0].alt


def test_ranks_near_the_width_are_left_out(rules: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_slopes, "width", lambda *_: 384)
    s = rate_slopes.slopes(rules)[0]
    assert s.narrow.ranks == [1, 8] and s.slope is None and s.missing is not None
    monkeypatch.setattr(rate_slopes, "width", lambda *_: 512)
    assert rate_slopes.slopes(rules)[0].narrow.ranks == [1, 8, 64]


def test_two_ranks_have_no_slope(tmp_path: Path) -> None:
    e = opened(build(tmp_path / "s", RANK_SWEEP[1:3], confirm=()))[1]
    assert best_rates.section(e, theme.looks(e.sweep.cells)) is None
