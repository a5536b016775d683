"""What finished runs added to their bases, layer by layer, measured: between saved runs and `spectra`.

Every matrix is that of the layer's map x -> W x, [O, I]: Conv1D and Embedding hold theirs the other way round, and a
convolution's is [O, I * kh * kw]. Shape letters: I in, O out, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.init import Projections
from lorabench.adapters.peft import PARTS_OF_KIND
from lorabench.analyze import spectra
from lorabench.analyze.spectra import SVD
from lorabench.analyze.updates import Trained
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import BaseInfo, is_inside
from lorabench.config.errors import ConfigError
from lorabench.training.saved_run import SavedRun, open_run

SPECTRUM = 64  # leading singular values kept of a layer
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Opened:
    """A run with trained weights, and what of it trained; the weights themselves are read when they are asked for."""

    saved: SavedRun
    plan: SlicePlan

    @property
    def run_id(self) -> str:
        return self.saved.record.run_id

    @property
    def seed(self) -> int:
        return self.saved.run.seed

    def state(self) -> State:
        return self.saved.weights()[0]

    @property
    def checksum(self) -> str:
        return self.saved.checksum

    @property
    def base_key(self) -> str:
        return self.saved.base_key


def open_weights(path: str | Path) -> Opened:
    """The run behind a directory. Raises `ConfigError` where it has no weights, or torn ones, or trains no matrix."""
    saved = open_run(path)
    opened = Opened(saved, saved.weights()[1])
    if not opened.plan.adapters and not opened.plan.full:
        raise ConfigError("run", str(path), f"a run that trains matrices of its base; {saved.run.method.name} has none")
    return opened


# -- the frozen side -----------------------------------------------------------------------------------------------------


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as [O, I] in float64."""
    weight = weight.detach().double()
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        return weight.T
    return weight.flatten(1)


class Frozen:
    """The weights of one base as matrices. The SVD of each is kept once it was asked for: twice the base's own memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.projections: Projections = {}  # VeRA's pairs, drawn once
        self._svd: dict[str, SVD] = {}

    def layer(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as e:
            raise ConfigError("adapter", name, "layers of this base; it has none of this name") from e

    def weight(self, name: str) -> Tensor:
        layer = self.layer(name)
        assert isinstance(layer.weight, Tensor)
        return matrix(layer, layer.weight)

    def saved_as(self, name: str, state: State) -> str:
        """What a layer's weight is called in a fully trained state, where weights that are tied stand once."""
        weight = self.layer(name).weight
        every = self.model.named_parameters(remove_duplicate=False)
        return next((n for n, p in every if p is weight and n in state), f"{name}.weight")

    def svd(self, name: str) -> SVD:
        if name not in self._svd:
            self._svd[name] = spectra.svd(self.weight(name))
        return self._svd[name]


class Bases:
    """Loads a base when it is first asked for; holds one at a time."""

    def __init__(self) -> None:
        self._held: tuple[str, Frozen] | None = None
        self._infos: dict[str, BaseInfo] = {}

    def info(self, opened: Opened) -> BaseInfo:
        """The layers of a run's base; no weights are read for it."""
        if opened.base_key not in self._infos:
            self._infos[opened.base_key] = opened.saved.run.model.info(opened.saved.head)
        return self._infos[opened.base_key]

    def of(self, opened: Opened) -> Frozen:
        """Raises `ConfigError` where the base's files are gone or changed."""
        if self._held is None or self._held[0] != opened.base_key:
            self._held = None  # the one before goes first
            self._held = (opened.base_key, Frozen(opened.saved.base(dtype="float32").model))
        return self._held[1]

    def linear_layers(self, opened: Opened) -> list[str]:
        """What full fine-tuning is measured on where no adapter beside it says so: linear layers, but head and output."""
        info = self.info(opened)
        left_out = (*info.head, *info.output)
        return [x.name for x in info.layers if x.kind in ("Linear", "Conv1D") and not is_inside(x.name, left_out)]


# -- the update ----------------------------------------------------------------------------------------------------------


def trained(opened: Opened, state: State, name: str, frozen: Frozen | None) -> Trained:
    """A layer's own tensors and what they mean. frozen: full fine-tuning's weight is turned as its layer says."""
    if opened.plan.full:
        assert frozen is not None
        return Trained(None, {"weight": matrix(frozen.layer(name), state[frozen.saved_as(name, state)])})
    spec = opened.plan.adapters[name]
    own = {part: state[f"{name}.{part}"] for part in PARTS_OF_KIND[spec.kind]}
    return Trained(spec, own, frozen.projections if frozen else {})


def unmeasured(found: Trained) -> str | None:
    """Why a layer has no update that can be measured; None where it has one."""
    if not found.finite():
        return "its weights are not all finite"
    if found.kind == "lora" and found.own["lora_A"].shape[0] != found.own["lora_B"].shape[1]:
        return "a convolution with groups: its adapter reads all channels, so no update has the weight's shape"
    return None


@torch.no_grad()
def measure(
    opened: Opened,
    names: Sequence[str],
    frozen: Frozen,
    *,
    intruders: bool,
    tick: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """The measures of one run: {"layers": {name: {...}}, "left_out": {name: reason}}. tick: layers done so far.

    Raises `ConfigError` for weights that do not fit the base.
    """
    state = opened.state()
    layers: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for done, name in enumerate(names, 1):
        found = trained(opened, state, name, frozen)
        if reason := unmeasured(found):
            left_out[name] = reason
        else:
            layers[name] = _measures(found, name, frozen)
            if intruders:
                layers[name] |= _beside_own(found, name, frozen, layers[name]["directions"])
        tick(done)
    return {"layers": layers, "left_out": left_out}


def _measures(found: Trained, name: str, frozen: Frozen) -> dict[str, Any]:
    """directions: of dW that the projection of W takes, the rank of a factored update, else what holds 90 % of it."""
    W = frozen.weight(name)
    shape = (W.shape[0], W.shape[1])
    if not found.fits(*shape):
        given = ", ".join(f"{part} {list(t.shape)}" for part, t in found.own.items())
        raise ConfigError("adapter", f"{name}: {given}", f"weights that fit this base; it has {list(shape)}")
    U, S, Vh = dW = found.svd(W)
    ninety = spectra.variance_rank(S, 0.9)
    n = spectra.numerical_rank(S, *shape) if found.factored else ninety
    weight_norm, (magnitude, direction) = float(W.norm()), found.rows(W)
    return {
        "kind": found.kind, "shape": list(shape), "r": found.r, "norm": float(S.norm()), "weight_norm": weight_norm,
        "relative_norm": spectra.relative_norm(S, W), "stable_rank": spectra.stable_rank(S), "effective_rank": spectra.effective_rank(S),
        "variance_rank": ninety, "directions": n, "amplification": spectra.amplification(dW, W, n),
        "projected": spectra.projected_norm(U[:, :n], Vh[:n], W), "projected_own": None, "intruders": None,
        "projected_random": spectra.random_projected_norm(weight_norm, n, *shape), "singular_values": S[:SPECTRUM].tolist(),
        "magnitude": magnitude, "direction": direction,
    }  # fmt: skip


def _beside_own(found: Trained, name: str, frozen: Frozen, n: int) -> dict[str, Any]:
    """What takes the SVD of W itself: intruders, and what W holds in its own n leading directions."""
    own = frozen.svd(name)
    counts = spectra.intruder_dimensions(own.U, found.tuned(frozen.weight(name)))
    return {
        "intruders": {f"{threshold:g}": count for threshold, count in counts.items()},
        "projected_own": float(own.S[:n].norm()),
    }
