"""How far replies moved from a base's style towards the data's own. Pure functions of texts. Letters: N texts, D features.

A classifier learns real replies from the base's on one half of the prompts; on the other half it says how real the
replies of base and trained run look to it. 0: like the base; 1: like the data.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorabench.stats import logistic as regression
from lorabench.training.evaluation import replies
from lorabench.training.evaluation import style as tone
from lorabench.training.session import Session


def groups_of(examples: Sequence[Mapping[str, Any]], rows: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Of each encoded example what it must not be parted from: its dialogue, else the other answers to its prompt."""
    return [rows[e["example"]].get("group") or str(e.get("group", e["example"])) for e in examples]


class Style:
    """Held-out pairs, the base's replies to their prompts, and the classifier made of one half of them.

    prompts: those of the other half, on which `metrics` scores replies.
    """

    def __init__(self, s: Session, size: int) -> None:
        examples = s.prepared.encoded.splits["test"][:size]
        rows = {r["example"]: r for r in s.prepared.data.splits["test"]}
        groups = groups_of(examples, rows)
        prompts, real = [replies.prompt_of(e) for e in examples], [replies.real_reply(s, e) for e in examples]
        base = replies.of_base(s, prompts)
        learn, score = tone.halves(groups)
        self.classifier = tone.learned([real[i] for i in learn], [base[i] for i in learn])
        self.prompts, self.groups = [prompts[i] for i in score], [groups[i] for i in score]
        self.real, self.base = (tone.realness(self.classifier, [own[i] for i in score]) for own in (real, base))

    def metrics(self, adapted: list[str]) -> dict[str, float]:
        """Of the replies of one slice to `prompts`."""
        scores = {"real": self.real, "base": self.base, "adapted": tone.realness(self.classifier, adapted)}
        found = {f"style/{name}": float(np.mean(values)) for name, values in scores.items()}
        found["style/examples"] = len(adapted)
        moved = tone.moved(**scores, groups=self.groups)
        return found | (dict(zip(("style/moved", "style/moved_low", "style/moved_high"), moved)) if moved else {})


FEATURES = 4096


CHARACTERS, WORDS = (1, 2, 3), (1, 2)  # lengths of the n-grams


L2 = 0.1


DRAWS = 2000


def features(texts: Sequence[str]) -> np.ndarray:
    """[N, D]: counts of n-grams of characters (case kept) and of words, hashed, log(1 + count), rows of length 1."""
    out = np.zeros((len(texts), FEATURES))
    for row, text in zip(out, texts, strict=True):
        padded, words = f" {text} ", re.findall(r"\w+|[^\w\s]", text.casefold())
        grams = [f"c{padded[i : i + n]}" for n in CHARACTERS for i in range(len(padded) - n + 1)]
        grams += [f"w{' '.join(words[i : i + n])}" for n in WORDS for i in range(len(words) - n + 1)]
        for gram, count in Counter(grams).items():  # crc32: Python's own hash differs between processes
            row[zlib.crc32(gram.encode("utf-8", "surrogatepass")) % FEATURES] += count
    made = np.log1p(out)
    return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)


def learned(real: Sequence[str], base: Sequence[str]) -> np.ndarray:
    """The classifier: weights [D + 1, 2], class 1 for real replies."""
    y = np.repeat([1, 0], [len(real), len(base)])
    return regression.fit(features([*real, *base]), y, 2, l2=L2)


def realness(classifier: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Probability [N] that each reply is a real one."""
    return regression.probabilities(classifier, features(texts))[:, 1]


def halves(groups: Sequence[str]) -> tuple[list[int], list[int]]:
    """Positions to learn on and to score, about as many of each; a group (a dialogue) lies in one half only."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    first: list[int] = []
    second: list[int] = []
    for own in sorted(members.values(), key=lambda own: -len(own)):  # the largest first, each to the smaller half
        (first if len(first) <= len(second) else second).extend(own)
    return sorted(first), sorted(second)


def moved(
    real: np.ndarray, base: np.ndarray, adapted: np.ndarray, groups: Sequence[str]
) -> tuple[float, float, float] | None:
    """(adapted − base) / (real − base) of the means of [N] probabilities, with a 95 % interval from drawing groups anew.

    None where the classifier tells real replies from the base's no better than chance may: its gap's interval holds 0.
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
