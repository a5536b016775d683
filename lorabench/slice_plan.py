"""What one slice of a pack trains: the answer of a method to a base. Torch-free, so a dry run can count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorabench.base import BaseInfo


@dataclass(frozen=True)
class AdapterSpec:
    """One slice's adapter on one layer: W' = W + scaling * B @ A."""

    r: int
    scaling: float
    alpha: float
    dropout: float = 0.0
    init: str = "kaiming"  # kaiming, gaussian, orthogonal
    kind: str = "lora"


@dataclass(frozen=True)
class SlicePlan:
    """What one slice trains. No adapters but a head in `modules` is head-only training."""

    seed: int
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)  # layer name -> spec
    modules: tuple[str, ...] = ()  # modules trained whole, e.g. the head
    biases: tuple[str, ...] = ()  # layers whose bias trains
    full: bool = False  # the base itself trains (a pack of one)

    def trainable(self, base: BaseInfo) -> int:
        """Number of trainable parameters, exactly."""
        if self.full:
            return base.parameters
        layers = base.by_name
        n = sum(layers[name].adapter_parameters(spec.r) for name, spec in self.adapters.items())
        n += sum(layers[name].bias_numel for name in self.biases if not _inside(name, self.modules))
        return n + base.module_parameters(self.modules)


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)
