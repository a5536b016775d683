"""BitFit (Ben Zaken et al., arXiv 2106.10199): every bias trains, and a new head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config.contracts.method import Method, SlicePlan
from lorabench.config.contracts.model import BIASED, BaseInfo, is_inside
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.config.method_names import display_name
from lorabench.methods.targets import whole_modules


@dataclass(frozen=True)
class Config(Method):
    """All biases of the base."""

    name: str = knob("bitfit", help="method")
    modules_to_save: list[str] | None = knob(None, help="modules that train whole, beside a new head")

    pack_group: ClassVar[str | None] = "bitfit"

    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        modules = whole_modules(base, self.modules_to_save)
        owners = [x for x in base.layers if x.bias_numel and not is_inside(x.name, modules)]
        if not owners:
            raise ConfigError("method.name", self.name, "another method: this base has no biases")
        for layer in owners:
            if layer.kind not in BIASED:
                allowed = f"another method: {layer.name} is {layer.kind}, whose bias is not an added one"
                raise ConfigError("method.name", self.name, allowed)
        return SlicePlan(seed=seed, biases=tuple(x.name for x in owners), modules=modules)

    def label(self) -> dict[str, Any]:
        return {"method": display_name(self.name), "r": None, "alpha": None, "targets": "biases"}
