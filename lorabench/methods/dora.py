"""DoRA (Liu et al., arXiv 2402.09353): LoRA turns the weight's rows, a vector of magnitudes sets their lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lorabench.config.contracts.method import AdapterSpec
from lorabench.config.contracts.model import LayerInfo
from lorabench.config.fields import knob
from lorabench.methods.low_rank import LowRank, check_is_linear


@dataclass(frozen=True)
class Config(LowRank):
    """LoRA's settings, on linear layers."""

    name: str = knob("dora", help="method")

    pack_group: ClassVar[str | None] = "dora"

    def spec(self, layer: LayerInfo) -> AdapterSpec:
        check_is_linear(self.name, self.target_modules, layer)
        return replace(super().spec(layer), kind="dora")
