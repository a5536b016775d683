"""(IA)^3 (Liu et al., arXiv 2205.05638): a vector scales keys, values and what enters the MLP's second matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config.contracts.method import AdapterSpec, Method, SlicePlan
from lorabench.config.contracts.model import BaseInfo
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.config.method_names import display_name
from lorabench.methods.low_rank import check_is_linear
from lorabench.methods.targets import check_targets, match_layers, targets_text, whole_modules


@dataclass(frozen=True)
class Config(Method):
    """One vector a targeted linear layer: on its output, or on its input for `feedforward_modules`."""

    name: str = knob("ia3", help="method")
    target_modules: Any = knob("k+v+down", help="as method=lora's; down: the MLP's second matrix", varies=True)
    feedforward_modules: Any = knob("down", help="those of them whose input is scaled; null: none")
    layers: list[int] | None = knob(None, help="indices of the blocks to adapt; null: all", varies=True)
    modules_to_save: list[str] | None = knob(None, help="modules that train whole, beside a new head")

    pack_group: ClassVar[str | None] = "ia3"

    def validate(self, key: str) -> None:
        check_targets(key, self.target_modules, self.layers)
        if self.feedforward_modules is not None:
            check_targets(key, self.feedforward_modules, None, field="feedforward_modules")

    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        modules = whole_modules(base, self.modules_to_save)
        layers = match_layers(base, self.target_modules, self.layers, modules)
        inputs: set[str] = set()
        if self.feedforward_modules is not None:
            inputs = {x.name for x in match_layers(base, self.feedforward_modules, self.layers, modules)}
        missing = sorted(inputs - {x.name for x in layers})
        if missing:
            allowed = f"some of method.target_modules; {missing[0]} is not"
            raise ConfigError("method.feedforward_modules", self.feedforward_modules, allowed)
        for layer in layers:
            check_is_linear(self.name, self.target_modules, layer)
        specs = {
            x.name: AdapterSpec(r=1, scaling=1.0, alpha=1.0, kind="ia3_input" if x.name in inputs else "ia3")
            for x in layers
        }
        return SlicePlan(seed=seed, adapters=specs, modules=modules)

    def label(self) -> dict[str, Any]:
        targets = targets_text(self.target_modules)
        return {"method": display_name(self.name), "r": None, "alpha": None, "targets": targets}
