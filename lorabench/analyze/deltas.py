"""Measure what finished runs added to their bases, layer by layer: `updates` and `spectra`, applied to saved runs.

Every matrix is that of the layer's map x -> W x, [O, I]. Conv1D and Embedding hold theirs the other way round, and a
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
from lorabench.analyze.updates import LayerUpdate
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import BaseInfo, is_inside
from lorabench.config.errors import ConfigError
from lorabench.training.saved_run import SavedRun, open_run

MAX_SINGULAR_VALUES = 64  # the leading ones of a layer, which the file keeps
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainedRun:
    """A saved run that trained matrices of its base, and its plan. Its weights are read on each call of `state`."""

    saved: SavedRun
    plan: SlicePlan

    @property
    def run_id(self) -> str:
        return self.saved.record.run_id

    @property
    def seed(self) -> int:
        return self.saved.run.seed

    @property
    def checksum(self) -> str:
        return self.saved.checksum

    @property
    def base_key(self) -> str:
        return self.saved.base_key

    def state(self) -> State:
        return self.saved.weights()[0]


def open_trained_run(path: str | Path, *, trust: bool = False) -> TrainedRun:
    """Return the run behind a directory.

    Raises `ConfigError` where it has no weights, or torn ones, or trained no matrix.
    """
    saved = open_run(path, trust=trust)
    run = TrainedRun(saved, saved.weights()[1])
    if not run.plan.adapters and not run.plan.full:
        raise ConfigError("run", str(path), f"a run that trains matrices of its base; {saved.run.method.name} has none")
    return run


# -- the frozen side -------------------------------------------------------------------------------------------------


def weight_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as [O, I] in float64."""
    weight = weight.detach().double()
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        return weight.T
    return weight.flatten(1)


class FrozenWeights:
    """The weights of one base as matrices. The SVDs already computed are kept: twice the base's own memory at most."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.projections: Projections = {}  # VeRA's pairs, drawn once
        self._svds: dict[str, SVD] = {}

    def layer(self, name: str) -> nn.Module:
        """Raises `ConfigError` where the base has no layer of this name."""
        try:
            return self.model.get_submodule(name)
        except AttributeError as e:
            raise ConfigError("adapter", name, "layers of this base; it has none of this name") from e

    def weight(self, name: str) -> Tensor:
        """Return a layer's weight as [O, I] in float64."""
        layer = self.layer(name)
        assert isinstance(layer.weight, Tensor)
        return weight_matrix(layer, layer.weight)

    def state_key(self, name: str, state: State) -> str:
        """Return the name of a layer's weight in a fully trained state, which holds tied weights once."""
        weight = self.layer(name).weight
        parameters = self.model.named_parameters(remove_duplicate=False)
        return next((n for n, p in parameters if p is weight and n in state), f"{name}.weight")

    def svd(self, name: str) -> SVD:
        if name not in self._svds:
            self._svds[name] = spectra.svd(self.weight(name))
        return self._svds[name]


class BaseCache:
    """The base that runs trained on, loaded when it is first asked for. One base is held at a time."""

    def __init__(self) -> None:
        self._held: tuple[str, FrozenWeights] | None = None
        self._infos: dict[str, BaseInfo] = {}

    def info(self, run: TrainedRun) -> BaseInfo:
        """Return the layers of a run's base, without reading weights."""
        if run.base_key not in self._infos:
            self._infos[run.base_key] = run.saved.run.model.info(run.saved.head)
        return self._infos[run.base_key]

    def weights(self, run: TrainedRun) -> FrozenWeights:
        """Return the weights of a run's base. Raises `ConfigError` where the base's files are gone or changed."""
        if self._held is None or self._held[0] != run.base_key:
            self._held = None  # frees the base before
            self._held = (run.base_key, FrozenWeights(run.saved.base(dtype="float32").model))
        return self._held[1]

    def linear_layers(self, run: TrainedRun) -> list[str]:
        """Return the linear layers of a run's base, without head and output.

        Full fine-tuning is measured on these where the sweep has no adapter whose layers it could be measured on.
        """
        info = self.info(run)
        left_out = (*info.head, *info.output)
        return [x.name for x in info.layers if x.kind in ("Linear", "Conv1D") and not is_inside(x.name, left_out)]


# -- the update ------------------------------------------------------------------------------------------------------


def layer_update(run: TrainedRun, state: State, name: str, frozen: FrozenWeights | None) -> LayerUpdate:
    """Return what a run trained on one layer. frozen: the base; None for LoRA, which does not need it."""
    if run.plan.full:
        assert frozen is not None
        return LayerUpdate(None, {"weight": weight_matrix(frozen.layer(name), state[frozen.state_key(name, state)])})
    spec = run.plan.adapters[name]
    tensors = {part: state[f"{name}.{part}"] for part in PARTS_OF_KIND[spec.kind]}
    return LayerUpdate(spec, tensors, frozen.projections if frozen else {})


def unmeasurable_reason(update: LayerUpdate) -> str | None:
    """Return why a layer has no update that can be measured; None where it has one."""
    if not update.is_finite():
        return "its weights are not all finite"
    if update.kind == "lora" and update.tensors["lora_A"].shape[0] != update.tensors["lora_B"].shape[1]:
        return "a convolution with groups: its adapter reads all channels, so no update has the weight's shape"
    return None


@torch.no_grad()
def measure_run(
    run: TrainedRun,
    names: Sequence[str],
    frozen: FrozenWeights,
    *,
    intruders: bool,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the named layers of one run: {"layers": {name: {...}}, "left_out": {name: reason}}.

    intruders: count intruder dimensions too, which takes the SVD of each whole weight. tick: called after each layer.
    Raises `ConfigError` for weights that do not fit the base.
    """
    state = run.state()
    layers: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in names:
        update = layer_update(run, state, name, frozen)
        if reason := unmeasurable_reason(update):
            left_out[name] = reason
        else:
            layers[name] = _update_measures(update, name, frozen)
            if intruders:
                layers[name] |= _intruder_measures(update, name, frozen, layers[name]["directions"])
        tick()
    return {"layers": layers, "left_out": left_out}


def _update_measures(update: LayerUpdate, name: str, frozen: FrozenWeights) -> dict[str, Any]:
    """Measure dW beside W, without the SVD of W.

    "directions" is how many of dW's directions W is projected on: the rank of a factored update, else as many as hold
    90 % of dW.
    """
    W = frozen.weight(name)
    O, I = W.shape
    if not update.fits(O, I):
        given = ", ".join(f"{part} {list(t.shape)}" for part, t in update.tensors.items())
        raise ConfigError("adapter", f"{name}: {given}", f"weights that fit this base; it has {[O, I]}")
    U, S, Vh = dW = update.svd(W)
    variance_rank = spectra.variance_rank(S, 0.9)
    n = spectra.numerical_rank(S, O, I) if update.factored else variance_rank
    weight_norm = float(W.norm())
    magnitude, direction = update.row_changes(W)
    return {
        "kind": update.kind,
        "shape": [O, I],
        "r": update.r,
        "norm": float(S.norm()),
        "weight_norm": weight_norm,
        "relative_norm": spectra.relative_norm(S, W),
        "stable_rank": spectra.stable_rank(S),
        "effective_rank": spectra.effective_rank(S),
        "variance_rank": variance_rank,
        "directions": n,
        "amplification": spectra.amplification(dW, W, n),
        "projected": spectra.projected_norm(U[:, :n], Vh[:n], W),
        "projected_own": None,
        "projected_random": spectra.random_projected_norm(weight_norm, n, O, I),
        "intruders": None,
        "singular_values": S[:MAX_SINGULAR_VALUES].tolist(),
        "magnitude": magnitude,
        "direction": direction,
    }


def _intruder_measures(update: LayerUpdate, name: str, frozen: FrozenWeights, n: int) -> dict[str, Any]:
    """Measure what takes the SVD of W itself: intruders, and what W holds in its own n leading directions."""
    weight_svd = frozen.svd(name)
    counts = spectra.intruder_dimensions(weight_svd.U, update.tuned_weight(frozen.weight(name)))
    return {
        "intruders": {f"{threshold:g}": count for threshold, count in counts.items()},
        "projected_own": float(weight_svd.S[:n].norm()),
    }
