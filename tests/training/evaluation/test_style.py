"""Logistic regression against scikit-learn, and the style measure on texts whose style is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lorabench.stats import logistic
from lorabench.training.evaluation.style import fit_classifier, groups_of, realness, split_in_halves, style_shift


@pytest.mark.parametrize(("classes", "c"), [(3, 0.5), (2, 1.0)], ids=["several", "two"])
def test_the_regression_is_scikit_learns(classes, c):
    """With two classes scikit-learn's one vector is the difference of ours: its C is twice as large."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 6))
    y = (x @ rng.normal(size=(6, classes)) + rng.normal(size=(200, classes))).argmax(1)
    ours = logistic.fit(x, y, classes, l2=2.0)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(logistic.probabilities(ours, x), theirs.predict_proba(x), atol=2e-4)
    said = logistic.held_out_accuracy(x[:150], y[:150], x[150:], y[150:])
    scaled = (x - x[:150].mean(0)) / x[:150].std(0)
    reference = LogisticRegression(C=1.0 if classes > 2 else 2.0, max_iter=5000).fit(scaled[:150], y[:150])
    assert said == reference.score(scaled[150:], y[150:])


def test_a_feature_that_never_varies_is_no_fault():
    x = np.column_stack([np.ones(40), np.tile([0.0, 1.0], 20)])
    y = np.tile([0, 1], 20)
    assert logistic.held_out_accuracy(x[:20], y[:20], x[20:], y[20:]) == 1.0


NOUNS = "cat dog tree house river stone bird lamp road sea".split()


def texts(style: str, seed: int, n: int) -> list[str]:
    rng = np.random.default_rng(seed)
    words = [[NOUNS[i] for i in rng.integers(0, len(NOUNS), 5)] for _ in range(n)]
    made = [" ".join(w) for w in words]
    return [f"lol {t} haha" for t in made] if style == "casual" else [f"Certainly! I am a {t}." for t in made]


def test_base_replies_have_moved_nowhere_and_real_ones_all_the_way():
    real, base = texts("casual", 1, 60), texts("formal", 2, 60)
    groups = [str(i // 2) for i in range(60)]
    learn, score = split_in_halves(groups)
    classifier = fit_classifier([real[i] for i in learn], [base[i] for i in learn])
    of_real, of_base = (realness(classifier, [own[i] for i in score]) for own in (real, base))
    own = [groups[i] for i in score]
    assert of_real.mean() > 0.8 and of_base.mean() < 0.2
    assert style_shift(of_real, of_base, of_base, own) == (0.0, 0.0, 0.0)
    assert style_shift(of_real, of_base, of_real, own) == (1.0, 1.0, 1.0)
    others = realness(classifier, texts("casual", 3, len(score)))
    fraction, low, high = style_shift(of_real, of_base, others, own)
    assert fraction == pytest.approx(1, abs=0.05) and low <= fraction <= high
    half = np.where(np.arange(len(score)) % 2, others, of_base)
    fraction, low, high = style_shift(of_real, of_base, half, own)
    assert fraction == pytest.approx(0.5, abs=0.1) and low < fraction < high


def test_the_interval_is_that_of_a_ratio_of_cluster_sums():
    """Against the delta method, on groups large enough for it to hold."""
    rng = np.random.default_rng(4)
    real, base = rng.normal(0.9, 0.05, 2000), rng.normal(0.1, 0.05, 2000)
    adapted = base + 0.4 + np.repeat(rng.normal(0, 0.1, 400), 5)
    fraction, low, high = style_shift(real, base, adapted, [str(i // 5) for i in range(2000)])
    sums = np.column_stack([adapted - base, real - base]).reshape(400, 5, 2).sum(1)
    ratio = sums[:, 0].sum() / sums[:, 1].sum()
    half = 1.96 * (sums[:, 0] - ratio * sums[:, 1]).std(ddof=1) * np.sqrt(400) / sums[:, 1].sum()
    assert fraction == pytest.approx(ratio)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_where_styles_cannot_be_told_apart_nothing_has_moved():
    real, base = texts("casual", 1, 60), texts("casual", 2, 60)
    classifier = fit_classifier(real[:30], base[:30])
    a, b = realness(classifier, real[30:]), realness(classifier, base[30:])
    assert style_shift(a, b, b, [str(i) for i in range(30)]) is None


def test_dialogues_stay_whole():
    groups = ["a"] * 7 + ["b"] * 3 + ["c"] * 2 + ["d", "e"]
    first, second = split_in_halves(groups)
    assert sorted(first + second) == list(range(14)) and len(first) == len(second) == 7
    assert not {groups[i] for i in first} & {groups[i] for i in second}


def test_answers_to_one_prompt_stay_together():
    """In both halves the base's reply to it, the same, would be learned and scored."""
    rows = {i: {"group": "talk" if i == 3 else ""} for i in range(4)}
    examples = [{"example": i, "group": group} for i, group in enumerate((7, 8, 7, 9))]
    assert groups_of(examples, rows) == ["7", "8", "7", "talk"]
