"""LoRA-FA (Zhang et al., arXiv 2308.03303): A stays as it was drawn, B trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lorabench.config.contracts.method import AdapterSpec
from lorabench.config.contracts.model import LayerInfo
from lorabench.config.fields import knob
from lorabench.methods.low_rank import LowRank, drawn_only


@dataclass(frozen=True)
class Config(LowRank):
    """LoRA's settings."""

    name: str = knob("lorafa", help="method")

    pack_group: ClassVar[str | None] = "lora"

    def _spec(self, layer: LayerInfo) -> AdapterSpec:
        drawn_only(self, layer)
        return replace(super()._spec(layer), rate_A=0.0)
