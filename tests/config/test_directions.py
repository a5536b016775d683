"""A metric's direction by its name: errors and losses are better when less, and what is unknown is not guessed."""

from __future__ import annotations

import pytest

from lorabench.config.directions import LESS, MORE, is_lower_better
from lorabench.results.selection import lower_is_better


def test_no_word_says_both() -> None:
    assert not LESS & MORE


@pytest.mark.parametrize(
    "name", "loss perplexity wer eval_cer WER error_rate MAE mse rmse FID test/nll edit_distance".split()
)
def test_errors_are_better_when_less(name: str) -> None:
    assert is_lower_better(name) is True and lower_is_better({}, name)
    assert lower_is_better({"lower_is_better": ["loss"]}, name), "an attached metric that the task does not know"


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "token_accuracy", "mcc", "rougeLsum", "exact_match", "bleu"])
def test_scores_are_better_when_more(name: str) -> None:
    assert is_lower_better(name) is False and not lower_is_better({}, name)


@pytest.mark.parametrize("name", ["quality", "score", "neg_mse", "f1_loss", "numbers", "my_metric"])
def test_what_a_name_does_not_say_is_not_guessed(name: str) -> None:
    assert is_lower_better(name) is None
