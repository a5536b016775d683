"""How far replies moved from a base's style towards that of the data.

A classifier learns to tell real replies from the base's on one half of the prompts. On the other half it scores how
real the replies of base and trained run are: 0 is like the base, 1 like the data. Shape letters: N texts, D features.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorabench.stats import logistic
from lorabench.training.evaluation import replies
from lorabench.training.session import Session

FEATURES = 4096
CHARACTER_NGRAMS, WORD_NGRAMS = (1, 2, 3), (1, 2)  # lengths
L2 = 0.1
DRAWS = 2000


class ReplyStyle:
    """The classifier of styles, learned on one half of the held-out pairs, and what scores replies on the other half.

    prompts: token ids [T] of each prompt to reply to, for `metrics`.
    """

    def __init__(self, session: Session, size: int) -> None:
        examples = session.prepared.encoded.splits["test"][:size]
        rows = {r["example"]: r for r in session.prepared.data.splits["test"]}
        groups = groups_of(examples, rows)
        prompts = [replies.prompt_tokens(e) for e in examples]
        real = [replies.reference_reply(session, e) for e in examples]
        base = replies.base_replies(session, prompts)
        to_learn, to_score = split_in_halves(groups)
        self.classifier = fit_classifier([real[i] for i in to_learn], [base[i] for i in to_learn])
        self.prompts, self.groups = [prompts[i] for i in to_score], [groups[i] for i in to_score]
        self.real = realness(self.classifier, [real[i] for i in to_score])
        self.base = realness(self.classifier, [base[i] for i in to_score])

    def metrics(self, adapted: list[str]) -> dict[str, float]:
        """Return the record's metrics of one slice from its replies to `prompts`."""
        scores = {"real": self.real, "base": self.base, "adapted": realness(self.classifier, adapted)}
        metrics = {f"style/{name}": float(np.mean(values)) for name, values in scores.items()}
        metrics["style/examples"] = len(adapted)
        shift = style_shift(**scores, groups=self.groups)
        if shift is not None:
            metrics |= dict(zip(("style/moved", "style/moved_low", "style/moved_high"), shift))
        return metrics


def groups_of(examples: Sequence[Mapping[str, Any]], rows: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return the group of each encoded example: its dialogue, else all replies to its prompt.

    rows: raw rows by example id. Examples of one group must lie in one half.
    """
    return [rows[e["example"]].get("group") or str(e.get("group", e["example"])) for e in examples]


def features(texts: Sequence[str]) -> np.ndarray:
    """Return features [N, D]: hashed n-grams of characters (case kept) and words, log(1 + count), rows of length 1."""
    out = np.zeros((len(texts), FEATURES))
    for row, text in zip(out, texts, strict=True):
        padded, words = f" {text} ", re.findall(r"\w+|[^\w\s]", text.casefold())
        grams = [f"c{padded[i : i + n]}" for n in CHARACTER_NGRAMS for i in range(len(padded) - n + 1)]
        grams += [f"w{' '.join(words[i : i + n])}" for n in WORD_NGRAMS for i in range(len(words) - n + 1)]
        for gram, count in Counter(grams).items():  # crc32: Python's own hash differs between processes
            row[zlib.crc32(gram.encode("utf-8", "surrogatepass")) % FEATURES] += count
    out = np.log1p(out)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def fit_classifier(real: Sequence[str], base: Sequence[str]) -> np.ndarray:
    """Fit a logistic regression of styles. Returns weights [D + 1, 2]; class 1 is a real reply."""
    y = np.repeat([1, 0], [len(real), len(base)])
    return logistic.fit(features([*real, *base]), y, 2, l2=L2)


def realness(classifier: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return the probability [N] that each reply is a real one."""
    return logistic.probabilities(classifier, features(texts))[:, 1]


def split_in_halves(groups: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return positions to learn on and positions to score, about as many of each. A group lies in one half only."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    first: list[int] = []
    second: list[int] = []
    for positions in sorted(members.values(), key=len, reverse=True):  # each to the half that is smaller so far
        (first if len(first) <= len(second) else second).extend(positions)
    return sorted(first), sorted(second)


def style_shift(
    real: np.ndarray, base: np.ndarray, adapted: np.ndarray, groups: Sequence[str]
) -> tuple[float, float, float] | None:
    """Return (adapted − base) / (real − base) of mean probabilities, and its 95 % bootstrap interval over groups.

    real, base, adapted: probabilities [N]. Returns (shift, low, high), or None where the interval of real − base holds
    0: there the classifier does no better than chance.
    """
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.zeros((codes.max() + 1, 2))
    np.add.at(sums, codes, np.column_stack([adapted - base, real - base]))
    rng = np.random.default_rng(20260101)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=DRAWS) @ sums  # [DRAWS, 2]
    if np.quantile(drawn[:, 1], 0.025) <= 0:
        return None
    total = sums.sum(0)
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return float(total[0] / total[1]), float(low), float(high)
