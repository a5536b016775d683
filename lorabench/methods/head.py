"""Head-only training: the base is a feature extractor. The control every adapter must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config.contracts.method import Method, SlicePlan
from lorabench.config.contracts.model import BaseInfo
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.config.method_names import display_name
from lorabench.methods.targets import whole_modules


@dataclass(frozen=True)
class Config(Method):
    """The new head, and what modules_to_save names."""

    name: str = knob("head", help="method")
    modules_to_save: list[str] | None = knob(None, help="modules that train whole, beside a new head")

    pack_group: ClassVar[str | None] = "head"

    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        modules = whole_modules(base, self.modules_to_save)
        if not modules:
            allowed = "names of modules to train: this base has no new head"
            raise ConfigError("method.modules_to_save", self.modules_to_save, allowed)
        return SlicePlan(seed=seed, modules=modules)

    def label(self) -> dict[str, Any]:
        return {
            "method": display_name(self.name),
            "r": None,
            "alpha": None,
            "targets": "+".join(self.modules_to_save or ["head"]),
        }
