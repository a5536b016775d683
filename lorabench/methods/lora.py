"""LoRA (Hu et al., arXiv 2106.09685), W' = W + alpha / r * B @ A; rsLoRA (arXiv 2312.03732) divides by sqrt(r)."""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.methods.low_rank import LowRank


@dataclass(frozen=True)
class Config(LowRank):
    """The settings of `LowRank`, as they are."""
