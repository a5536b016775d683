"""Full fine-tuning: the base itself trains, so a run has its base to itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config.contracts.method import Method, SlicePlan
from lorabench.config.contracts.model import BaseInfo
from lorabench.config.fields import knob
from lorabench.config.method_names import display_name


@dataclass(frozen=True)
class Config(Method):
    """Every parameter trains."""

    name: str = knob("full", help="method")

    trains_base: ClassVar[bool] = True

    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        return SlicePlan(seed=seed, full=True)

    def label(self) -> dict[str, Any]:
        return {"method": display_name(self.name), "r": None, "alpha": None, "targets": "everything"}
