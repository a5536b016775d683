"""LoRA+ (Hayou et al., arXiv 2402.12354): B learns at a multiple of A's rate.

So do the vectors of a new head, as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorabench.config.contracts.method import AdapterSpec, SlicePlan
from lorabench.config.contracts.model import BaseInfo, LayerInfo
from lorabench.config.fields import knob
from lorabench.methods.low_rank import LowRank, check_is_no_embedding


@dataclass(frozen=True)
class Config(LowRank):
    """LoRA's settings; `optimizer.lr` is A's rate."""

    name: str = knob("loraplus", help="method")
    lr_ratio: float = knob(16.0, help="B's learning rate over A's, which is optimizer.lr", low=1, varies=True)

    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        return replace(super().plan(base, seed=seed), vector_rate=self.lr_ratio)

    def spec(self, layer: LayerInfo) -> AdapterSpec:
        check_is_no_embedding(self.name, self.target_modules, layer)
        return replace(super().spec(layer), rate_B=self.lr_ratio)
