"""LoRA-FA (Zhang et al., arXiv 2308.03303): A stays as it was drawn, B trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lorabench.base import LayerInfo
from lorabench.methods.low_rank import LowRank
from lorabench.schema import ConfigError, knob
from lorabench.slice_plan import AdapterSpec


@dataclass(frozen=True)
class Config(LowRank):
    """LoRA's settings."""

    name: str = knob("lorafa", help="method")

    pack_group: ClassVar[str | None] = "lora"

    def _spec(self, layer: LayerInfo) -> AdapterSpec:
        if layer.kind == "Embedding":
            raise ConfigError("method.target_modules", self.target_modules,
                              f"layers that are no embeddings, whose A starts at zero; {layer.name} is one")  # fmt: skip
        return replace(super()._spec(layer), rate_A=0.0)

    def label(self) -> dict[str, Any]:
        return super().label() | {"method": "LoRA-FA"}
