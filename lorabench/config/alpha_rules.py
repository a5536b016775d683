"""Alpha rules: how alpha follows from the rank. `16`, `2r`, or either with `/sqrt(r)` under rsLoRA's scaling.

LoRA scales by alpha / r (arXiv 2106.09685, section 4.1), rsLoRA by alpha / sqrt(r) (arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

RSLORA_SUFFIX = "/sqrt(r)"
_RULE = re.compile(r"(?P<factor>\d*\.?\d*(?:e[+-]?\d+)?)\s*\*?\s*(?P<times_r>r?)(?P<rslora>/sqrt\(r\))?")


@dataclass(frozen=True)
class AlphaRule:
    """alpha = factor, or factor * r; the adapter's output is scaled by alpha / r, or by alpha / sqrt(r)."""

    factor: float
    times_r: bool
    use_rslora: bool

    def alpha(self, r: int) -> float:
        """Return alpha at rank r."""
        return self.factor * r if self.times_r else self.factor

    def scaling(self, r: int) -> float:
        """Return s of W' = W + s B A at rank r."""
        return scaling(self.alpha(r), r, use_rslora=self.use_rslora)


def parse(rule: str) -> AlphaRule | None:
    """Return what a rule's text means; None for what is no rule."""
    match = _RULE.fullmatch(rule.strip())
    if match is None or not (match["factor"] or match["times_r"]):
        return None
    try:
        factor = float(match["factor"] or 1)
    except ValueError:  # a lone point or exponent
        return None
    return AlphaRule(factor, bool(match["times_r"]), bool(match["rslora"]))


def scaling(alpha: float, r: int, *, use_rslora: bool) -> float:
    """Return s of W' = W + s B A."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


def rule_text(alpha: float | str, *, use_rslora: bool) -> str:
    """Return the rule by which alpha was asked for. alpha: a number, or a text such as `2r`."""
    text = alpha if isinstance(alpha, str) else f"{alpha:g}"
    return text + RSLORA_SUFFIX if use_rslora else text


def without_scaling(rule: str | None) -> str:
    """Return a rule without rsLoRA's suffix, for where the method's name says that part."""
    return (rule or "").removesuffix(RSLORA_SUFFIX)


def is_multiple_of_rank(rule: str | None) -> bool:
    """Whether a rule is a multiple of the rank under LoRA's own scaling, such as `2r`."""
    return (rule or "").endswith("r")


def round_alpha(rule: str | None) -> str:
    """Return a rule with its numbers to four digits: `5.657/sqrt(r)`."""
    return re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.4g}", rule or "")


def size_key(rule: str) -> tuple[str, float, str]:
    """Return a key to sort rules by: those of one form by their number, 2r before 16r and 8 before 16."""
    known = parse(rule)
    if known is None:
        return rule, math.inf, rule
    return f"{RSLORA_SUFFIX if known.use_rslora else ''}{'r' if known.times_r else ''}", known.factor, rule
