"""A slice merged into a plain base's own weights, and taken out again. Shapes: I in, O out, r rank.

W' = W + scaling * B @ A, computed in float64 and rounded once to the weight's own type. What that rounding costs is
measured and stated, layer by layer: in bfloat16 an update much smaller than the weight can vanish in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.schema import ConfigError
from lorabench.slice_plan import SlicePlan

CHUNK = 2**22  # weights computed at once: float64 copies stay small beside the base


@dataclass(frozen=True)
class LayerMerge:
    """What rounding to the weight's type did to one merged layer."""

    max_error: float  # max |merged - (W + delta)|, measured
    lost: float  # the same error's Frobenius norm over delta's: the share of the update that rounding replaced
    unmerge_bound: float  # max |unmerged - W| after subtraction, guaranteed; 0 where the original was kept


@dataclass
class Merged:
    """A merged base: its errors, and the way back."""

    model: nn.Module
    layers: dict[str, LayerMerge]
    untied: tuple[str, ...]  # notes: which weights no longer share memory
    _undo: list[Any] = field(repr=False)

    @property
    def max_error(self) -> float:
        return max((layer.max_error for layer in self.layers.values()), default=0.0)

    def unmerge(self) -> None:
        """The base as it was: bit for bit if it was merged with `keep`, else within `unmerge_bound`. Ties come back."""
        while self._undo:
            self._undo.pop()()


@torch.no_grad()
def merge(model: nn.Module, state: Mapping[str, Tensor], plan: SlicePlan, *, keep: bool = False) -> Merged:
    """Merge a slice into a plain base (no stack injected), in place: adapters added, whole modules and biases copied.

    keep: hold the original weights for an exact `unmerge`. A weight the adapted layer shares with another (an output
    embedding tied to the input's) becomes its own, which `untied` says; the other keeps the original.
    Raises `ConfigError` for a slice that does not fit the base.
    """
    done = Merged(model, {}, (), [])
    try:
        for name, spec in plan.adapters.items():
            layer = _module(model, name)
            done.untied += _untie(model, name, layer, done._undo)
            a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
            done.layers[name] = _add(name, layer, a, b, spec.scaling, done._undo, keep=keep)
        adapted = tuple(f"{name}.lora_" for name in plan.adapters)
        _copy(model, {n: t for n, t in state.items() if not (adapted and n.startswith(adapted))}, done._undo)
    except BaseException:
        done.unmerge()
        raise
    return done


def _factors(layer: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """left [rows, r], right [r, columns] with left @ right = B @ A, transposed where the layer keeps weights [I, O]
    (Conv1D, and Embedding with a row a token). Conv2d: B [O, r] times A [r, I * kh * kw]."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        return a.T, b.T
    return b, a


def _add(
    name: str, layer: nn.Module, a: Tensor, b: Tensor, scaling: float, undo: list[Any], *, keep: bool
) -> LayerMerge:
    weight = _weight(name, layer)
    if getattr(layer, "groups", 1) > 1:
        why = "this one has groups, and its adapter, as PEFT's, reads all channels: keep it separate"
        raise ConfigError("adapter", name, f"layers whose update has the weight's shape; {why}")
    left, right = _factors(layer, a.to(weight.device), b.to(weight.device))
    flat = weight.data.view(weight.shape[0], -1)
    if (left.shape[0], right.shape[1]) != flat.shape:
        shapes = f"lora_A {list(a.shape)}, lora_B {list(b.shape)} for a weight {list(weight.shape)}"
        raise ConfigError("adapter", f"{name}: {shapes}", "an adapter that was trained on this base")
    original = flat.clone() if keep else None
    written: list[slice] = []

    @torch.no_grad()
    def restore() -> None:
        for rows in written:
            plain = flat[rows].double() - left[rows] @ right * scaling if original is None else original[rows]
            flat[rows] = plain.to(weight.dtype)

    undo.append(restore)
    worst, lost, size, largest = 0.0, 0.0, 0.0, 0.0
    for rows in _chunks(flat):
        update = left[rows] @ right * scaling
        exact = flat[rows].double() + update
        rounded = exact.to(weight.dtype)
        if not rounded.isfinite().all():
            raise ConfigError("adapter", name, f"weights that stay finite in {weight.dtype} when merged")
        largest = max(largest, float(flat[rows].abs().max()), float(exact.abs().max()))
        flat[rows] = rounded
        written.append(rows)
        error = rounded.double() - exact
        worst = max(worst, float(error.abs().max()))
        lost, size = lost + float(error.square().sum()), size + float(update.square().sum())
    # Subtraction meets W + e with |e| <= worst and rounds once more, by half a unit in the last place at most;
    # float64's own rounding of update, sum and difference comes on top.
    half_unit = torch.finfo(weight.dtype).eps / 2 + 4 * torch.finfo(torch.float64).eps
    bound = 0.0 if keep else worst + (largest + worst) * half_unit
    return LayerMerge(worst, (lost / size) ** 0.5 if size else 0.0, bound)


def _chunks(flat: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, flat.shape[1]))
    return (slice(i, i + step) for i in range(0, flat.shape[0], step))


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as e:
        raise ConfigError("adapter", name, "layers of this base; it has none of this name") from e


def _weight(name: str, layer: nn.Module) -> nn.Parameter:
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or not weight.is_contiguous():
        raise ConfigError(
            "adapter", name, "a layer with a plain floating-point weight; quantized ones cannot be merged into"
        )
    return weight


def _untie(model: nn.Module, name: str, layer: nn.Module, undo: list[Any]) -> tuple[str, ...]:
    """Give the layer a weight of its own where it shares one; the other owners keep the original."""
    weight = _weight(name, layer)
    others = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight and n != f"{name}.weight"]
    if not others:
        return ()
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    undo.append(lambda: setattr(layer, "weight", weight))
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):  # or loading a saved copy would tie them again
        config.tie_word_embeddings = False
        undo.append(lambda: setattr(config, "tie_word_embeddings", True))
    return (f"{name}.weight is no longer tied to {', '.join(others)}",)


def _copy(model: nn.Module, state: Mapping[str, Tensor], undo: list[Any]) -> None:
    """Whole modules, biases, or a full model: tensors by the base's own names. The originals are kept."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = list(own[name].shape) if name in own else "no such tensor"
            raise ConfigError("adapter", f"{name} {list(tensor.shape)}", f"tensors that fit this base; it has {shape}")
        original = own[name].detach().clone()
        own[name].data.copy_(tensor)
        undo.append(lambda target=own[name], original=original: target.data.copy_(original))
