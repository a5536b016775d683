"""What one slice of a pack trains: the answer of a method to a base. Torch-free, so a dry run can count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorabench.models.base import BaseInfo, LayerInfo


@dataclass(frozen=True)
class AdapterSpec:
    """One slice's adapter on one layer: W' = W + scaling * B @ A, or what `kind` makes of it (`adapters/variants.py`)."""

    r: int  # 0: this slice does not target the layer; ia3 has no rank and says 1
    scaling: float
    alpha: float
    dropout: float = 0.0
    init: str = "kaiming"  # kaiming, gaussian, orthogonal, pissa, olora
    kind: str = "lora"  # lora, dora, vera, ia3 (scales the output), ia3_input (scales the input)
    rate_A: float = 1.0  # factors of the learning rate; 0: frozen
    rate_B: float = 1.0
    d_initial: float = 0.1  # vera: where lambda_d starts
    projection: tuple[int, int, int] = (0, 0, 0)  # vera: seed and (I, O) of the pair of matrices all layers share

    def trainable(self, layer: LayerInfo) -> int:
        """Number of trainable parameters on a layer, exactly."""
        if self.kind == "vera":
            return self.r + layer.out_features
        if self.kind.startswith("ia3"):
            return layer.in_features if self.kind == "ia3_input" else layer.out_features
        a = self.r * layer.in_features * layer.kernel
        b = layer.out_features * (self.r // layer.groups)
        return a * (self.rate_A > 0) + b * (self.rate_B > 0) + layer.out_features * (self.kind == "dora")


@dataclass(frozen=True)
class SlicePlan:
    """What one slice trains. No adapters but a head in `modules` is head-only training."""

    seed: int
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)  # layer name -> spec
    modules: tuple[str, ...] = ()  # modules trained whole, e.g. the head
    biases: tuple[str, ...] = ()  # layers whose bias trains
    full: bool = False  # the base itself trains (a pack of one)
    vector_rate: float = 1.0  # factor of the learning rate of the vectors (biases, norms) of whole modules

    def trainable(self, base: BaseInfo) -> int:
        """Number of trainable parameters, exactly."""
        if self.full:
            return base.parameters
        layers = base.by_name
        n = sum(spec.trainable(layers[name]) for name, spec in self.adapters.items())
        n += sum(layers[name].bias_numel for name in self.biases if not _inside(name, self.modules))
        return n + base.module_parameters(self.modules)


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)
