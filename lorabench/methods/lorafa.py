"""LoRA-FA (Zhang et al., arXiv 2308.03303): A stays as it was drawn, B trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorabench.config.contracts.method import AdapterSpec
from lorabench.config.contracts.model import LayerInfo
from lorabench.config.fields import knob
from lorabench.methods.low_rank import LowRank, check_is_no_embedding


@dataclass(frozen=True)
class Config(LowRank):
    """LoRA's settings."""

    name: str = knob("lorafa", help="method")

    def spec(self, layer: LayerInfo) -> AdapterSpec:
        check_is_no_embedding(self.name, self.target_modules, layer)
        return replace(super().spec(layer), rate_A=0.0)
