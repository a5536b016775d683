"""PiSSA (Meng et al., arXiv 2404.02948): LoRA whose A and B start as the weight's largest singular components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.base import LayerInfo
from lorabench.methods.low_rank import LowRank
from lorabench.schema import ConfigError, knob
from lorabench.slice_plan import AdapterSpec


@dataclass(frozen=True)
class Config(LowRank):
    """LoRA's settings, on linear layers, without dropout. Saved as a LoRA of rank 2r on the unchanged base."""

    name: str = knob("pissa", help="method")
    init: str = knob("pissa", help="how A and B start", choices=("pissa",), varies=True)

    pack_group: ClassVar[str | None] = "lora"

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.dropout:
            raise ConfigError(f"{key}.dropout", self.dropout, "0 for PiSSA: it would drop parts of the weight itself")

    def _spec(self, layer: LayerInfo) -> AdapterSpec:
        self._linear_only(layer)
        return super()._spec(layer)

    def label(self) -> dict[str, Any]:
        return super().label() | {"method": "PiSSA"}
