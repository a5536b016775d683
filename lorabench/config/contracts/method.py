"""What a method makes of a base: the plan of one slice of a pack, and the contract of `methods/<name>.py`.

Torch-free, so that a dry run can count parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lorabench.config.contracts.component import Component, attribute
from lorabench.config.contracts.model import BaseInfo, LayerInfo, is_inside


@dataclass(frozen=True)
class AdapterSpec:
    """One slice's adapter on one layer: W' = W + scaling * B @ A, or what `kind` makes of it."""

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
        """Return the number of trainable parameters on a layer, exactly."""
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
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)  # by layer name
    modules: tuple[str, ...] = ()  # modules trained whole, e.g. the head
    biases: tuple[str, ...] = ()  # layers whose bias trains
    full: bool = False  # the base itself trains (a pack of one)
    vector_rate: float = 1.0  # factor of the learning rate of the vectors (biases, norms) of whole modules

    def trainable(self, base: BaseInfo) -> int:
        """Return the number of trainable parameters, exactly."""
        if self.full:
            return base.parameters
        layers = base.by_name
        n = sum(spec.trainable(layers[name]) for name, spec in self.adapters.items())
        n += sum(layers[name].bias_numel for name in self.biases if not is_inside(name, self.modules))
        return n + base.module_parameters(self.modules)


@dataclass(frozen=True)
class Method(Component, ABC):
    """What trains, as a run names it: a frozen dataclass `Config` in `methods/<name>.py`.

    Fields of the dataclass are the settings under `method.`.
    """

    pack_group: ClassVar[str | None] = None
    """Runs of one group may train as slices of one pack. None: a run has its base to itself."""

    trains_base: ClassVar[bool] = False
    """Whether the base's own weights train, which are float32 then and compute under autocast."""

    @attribute
    def name(self) -> str:
        """Name of the module that defines the method."""
        raise NotImplementedError

    @attribute
    def r(self) -> int:
        """Rank of the adapters. 0: the method has no rank."""
        return 0

    @attribute
    def init(self) -> str | None:
        """How the adapters' matrices start. None: nothing is drawn, or there is one way only."""
        return None

    @attribute
    def match_parameters(self) -> int | None:
        """Number of parameters that the adapters are to train, which gives the rank. None: the rank is set."""
        return None

    @abstractmethod
    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        """Return what one slice trains on this base. Raises `ConfigError` with a key under `method.`.

        seed: of the run; adapters are drawn from it when the plan is injected.
        """

    @abstractmethod
    def label(self) -> dict[str, Any]:
        """Return what tables call the cell: `method` (display name), `r`, `alpha` (or None), `targets`."""
