"""VeRA (Kopiczko et al., arXiv 2310.11454): random frozen matrices shared by all layers; two vectors a layer train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config.contracts.method import AdapterSpec, Method, SlicePlan
from lorabench.config.contracts.model import BaseInfo
from lorabench.config.fields import knob
from lorabench.config.method_names import display_name
from lorabench.methods.low_rank import check_is_linear
from lorabench.methods.targets import check_targets, match_layers, targets_text, whole_modules


@dataclass(frozen=True)
class Config(Method):
    """W' = W + diag(b) B diag(d) A on linear layers."""

    name: str = knob("vera", help="method")
    r: int = knob(256, help="rank of the shared matrices", low=1, varies=True)
    d_initial: float = knob(0.1, help="where the vector d starts; b starts at zero", varies=True)
    projection_key: int = knob(0, help="seed of the shared matrices, the same for all runs", low=0, varies=True)
    dropout: float = knob(0.0, help="on the adapter's input", low=0, high=0.95, varies=True)
    target_modules: Any = knob("all-linear", help="as method=lora's", varies=True)
    layers: list[int] | None = knob(None, help="indices of the blocks to adapt; null: all", varies=True)
    modules_to_save: list[str] | None = knob(None, help="modules that train whole, beside a new head")

    pack_group: ClassVar[str | None] = "vera"

    def validate(self, key: str) -> None:
        check_targets(key, self.target_modules, self.layers)

    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        modules = whole_modules(base, self.modules_to_save)
        layers = match_layers(base, self.target_modules, self.layers, modules)
        for layer in layers:
            check_is_linear(self.name, self.target_modules, layer)
        widest = max(x.in_features for x in layers), max(x.out_features for x in layers)
        spec = AdapterSpec(
            r=self.r,
            scaling=1.0,
            alpha=1.0,
            dropout=self.dropout,
            kind="vera",
            d_initial=self.d_initial,
            projection=(self.projection_key, *widest),
        )
        return SlicePlan(seed=seed, adapters={x.name: spec for x in layers}, modules=modules)

    def label(self) -> dict[str, Any]:
        targets = targets_text(self.target_modules)
        return {"method": display_name(self.name), "r": self.r, "alpha": None, "targets": targets}
