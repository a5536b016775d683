"""Alpha rules: what their texts mean, and how a rule that was asked for is written."""

from __future__ import annotations

import pytest

from lorabench.config import alpha_rules


@pytest.mark.parametrize(
    ("rule", "scaling"),
    [
        ("16", 2),
        ("r", 1),
        ("2r", 2),
        ("2 * r", 2),
        ("0.5r", 0.5),
        ("16/sqrt(r)", 16 / 8**0.5),
        ("2r/sqrt(r)", 2 * 8**0.5),
        ("5.656854249492381/sqrt(r)", 2),
        ("1e2", 12.5),
        ("x", None),
        (".", None),
        ("", None),
        ("-2r", None),
    ],
)
def test_scaling_of_a_rule_at_rank_8(rule: str, scaling: float | None) -> None:
    parsed = alpha_rules.parse(rule)
    assert (parsed and parsed.scaling(8)) == (None if scaling is None else pytest.approx(scaling))


@pytest.mark.parametrize("alpha", [16, 16.0, 5.5, "2r", "0.5r"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_written_rule_reads_back(alpha: float | str, use_rslora: bool) -> None:
    text = alpha_rules.rule_text(alpha, use_rslora=use_rslora)
    rule = alpha_rules.parse(text)
    assert rule is not None and rule.use_rslora is use_rslora
    assert rule.times_r is isinstance(alpha, str)
    assert alpha_rules.without_scaling(text) == alpha_rules.rule_text(alpha, use_rslora=False)
    assert alpha_rules.is_multiple_of_rank(text) is (isinstance(alpha, str) and not use_rslora)


def test_scaling_is_alpha_over_the_rank_or_its_root() -> None:
    assert alpha_rules.scaling(16, 4, use_rslora=False) == 4
    assert alpha_rules.scaling(16, 4, use_rslora=True) == 8


def test_rules_sort_by_their_number() -> None:
    rules = ["128", "16r", "16", "2r", "8", "0.5r", "64/sqrt(r)", "8/sqrt(r)"]
    ordered = ["8", "16", "128", "8/sqrt(r)", "64/sqrt(r)", "0.5r", "2r", "16r"]
    assert sorted(rules, key=alpha_rules.size_key) == ordered


def test_numbers_are_shown_to_four_digits() -> None:
    rules = ("5.656854249492381/sqrt(r)", "2r", "16", None)
    assert [alpha_rules.round_alpha(rule) for rule in rules] == ["5.657/sqrt(r)", "2r", "16", ""]
