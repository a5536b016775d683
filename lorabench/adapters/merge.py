"""A slice merged into a plain base's own weights, and taken out again. Shapes: I in, O out, r rank.

W' = W + scaling * B @ A (or what the adapter's kind makes of it), computed in float64 and rounded once to the weight's
own type. What that rounding costs is measured and stated, layer by layer: in bfloat16 an update much smaller than the
weight can vanish in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.init import projection
from lorabench.adapters.peft import PARTS_OF_KIND
from lorabench.config.contracts.method import AdapterSpec, SlicePlan
from lorabench.config.errors import ConfigError

MAX_CHUNK_WEIGHTS = 2**22  # weights computed at once: float64 copies stay small beside the base


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
        """Give the base back as it was: bit for bit if it was merged with `keep`, else within `unmerge_bound`. Ties
        come back."""
        while self._undo:
            self._undo.pop()()


@torch.no_grad()
def merge(model: nn.Module, state: Mapping[str, Tensor], plan: SlicePlan, *, keep: bool = False) -> Merged:
    """Merge a slice into a plain base (no stack injected), in place: adapters added, whole modules and biases copied.

    keep: hold the original weights for an exact `unmerge`. A weight that an adapted layer or a whole module shares with
    another (an output embedding tied to the input's) becomes its own, which `untied` says; the other keeps the
    original. Raises `ConfigError` for a slice that does not fit the base.
    """
    done = Merged(model, {}, (), [])
    try:
        for name, spec in plan.adapters.items():
            layer = _module(model, name)
            done.untied += _untie(model, f"{name}.weight", done._undo)
            own = {part: state[f"{name}.{part}"] for part in PARTS_OF_KIND[spec.kind]}
            done.layers[name] = _add(name, layer, weight_change(name, layer, spec, own), done._undo, keep=keep)
        adapted = {f"{name}.{part}" for name, spec in plan.adapters.items() for part in PARTS_OF_KIND[spec.kind]}
        whole = {n: t for n, t in state.items() if n not in adapted}
        for name in [] if plan.full else list(whole):  # full fine-tuning trains what is tied as one weight
            done.untied += _untie(model, name, done._undo)
        _copy(model, whole, done._undo)
    except BaseException:
        done.unmerge()
        raise
    return done


@dataclass(frozen=True)
class Change:
    """W' = rows * (W + left @ right * scaling) * columns on a weight as its layer keeps it, [rows, columns]; float64.

    bias: the layer's bias becomes this times it, where the adapter scales what the layer puts out.
    """

    left: Tensor  # [rows, r]
    right: Tensor  # [r, columns]
    scaling: float
    rows: Tensor | None = None
    columns: Tensor | None = None
    bias: Tensor | None = None

    def of(self, flat: Tensor, rows: slice) -> Tensor:
        """Return some rows of the merged weight."""
        new = flat[rows].double() + self.left[rows] @ self.right * self.scaling
        new = new if self.rows is None else new * self.rows[rows, None]
        return new if self.columns is None else new * self.columns

    @property
    def scales(self) -> bool:
        return self.rows is not None or self.columns is not None


def weight_change(name: str, layer: nn.Module, spec: AdapterSpec, own: Mapping[str, Tensor]) -> Change:
    """Return what an adapter does to its layer's weight. own: its tensors, as `Stack.export_slice` gives them."""
    weight = _weight(name, layer)
    flipped = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"  # the layer keeps [I, O]
    own = {part: t.to(weight.device).double() for part, t in own.items()}
    if spec.kind.startswith("ia3"):
        on_input, none = spec.kind == "ia3_input", weight.new_zeros(0, dtype=torch.float64)
        left, right = none.expand(weight.shape[0], 0), none.view(0, 1).expand(0, weight.shape[1])
        plain = Change(left, right, 1.0, bias=None if on_input else own["ia3_l"])
        return _with_scale(plain, own["ia3_l"], on_columns=on_input != flipped)
    if spec.kind == "vera":
        a, b = projection({}, spec, own["vera_lambda_d"])
        inputs, outputs = weight.shape if flipped else weight.shape[::-1]
        a, b = own["vera_lambda_d"][:, None] * a[:, :inputs], own["vera_lambda_b"][:, None] * b[:outputs]
    else:
        a, b = own["lora_A"].flatten(1), own["lora_B"].flatten(1)
    plain = Change(a.T, b.T, spec.scaling) if flipped else Change(b, a, spec.scaling)
    if spec.kind != "dora":
        return plain
    _check_shapes(name, plain, weight)
    whole = plain.of(weight.detach().view(weight.shape[0], -1), slice(None))
    ratio = own["magnitude"] / whole.norm(dim=0 if flipped else 1).clamp_min(torch.finfo().tiny)  # a row of zeros stays
    return _with_scale(plain, ratio, on_columns=flipped)


def _with_scale(change: Change, by: Tensor, *, on_columns: bool) -> Change:
    return replace(change, columns=by) if on_columns else replace(change, rows=by)


def _check_shapes(name: str, change: Change, weight: Tensor) -> None:
    flat = weight.view(weight.shape[0], -1)
    given = (change.left.shape[0], change.right.shape[1])
    scales = [len(x) for x in (change.rows, change.columns) if x is not None]
    fits = [flat.shape[0 if change.rows is not None else 1]] if scales else []
    if given != tuple(flat.shape) or scales != fits:
        what = (
            f"a change of {list(given)}{f', vectors of {scales}' if scales else ''} for a weight {list(weight.shape)}"
        )
        raise ConfigError("adapter", f"{name}: {what}", "an adapter that was trained on this base")


def _add(name: str, layer: nn.Module, change: Change, undo: list[Any], *, keep: bool) -> LayerMerge:
    weight = _weight(name, layer)
    if getattr(layer, "groups", 1) > 1:
        why = "this one has groups, and its adapter, as PEFT's, reads all channels: keep it separate"
        raise ConfigError("adapter", name, f"layers whose update has the weight's shape; {why}")
    _check_shapes(name, change, weight)
    keep = keep or change.scales  # a vector may hold zeros: there is no way back but the original
    flat = weight.data.view(weight.shape[0], -1)
    original = flat.clone() if keep else None
    written: list[slice] = []

    @torch.no_grad()
    def restore() -> None:
        for rows in written:
            update = change.left[rows] @ change.right * change.scaling
            plain = flat[rows].double() - update if original is None else original[rows]
            flat[rows] = plain.to(weight.dtype)

    undo.append(restore)
    worst, lost, size, largest = 0.0, 0.0, 0.0, 0.0
    for rows in _chunks(flat):
        exact = change.of(flat, rows)
        update = exact - flat[rows].double()
        rounded = exact.to(weight.dtype)
        if not rounded.isfinite().all():
            raise ConfigError("adapter", name, f"weights that stay finite in {weight.dtype} when merged")
        largest = max(largest, float(flat[rows].abs().max()), float(exact.abs().max()))
        flat[rows] = rounded
        written.append(rows)
        error = rounded.double() - exact
        worst = max(worst, float(error.abs().max()))
        lost, size = lost + float(error.square().sum()), size + float(update.square().sum())
    bias = getattr(layer, "bias", None)
    if change.bias is not None and bias is not None:
        before = bias.detach().clone()
        bias.data.copy_(before.double() * change.bias)
        undo.append(lambda: bias.data.copy_(before))
    # Subtraction meets W + e with |e| <= worst and rounds once more, by half a unit in the last place at most;
    # float64's own rounding of update, sum and difference comes on top.
    half_unit = torch.finfo(weight.dtype).eps / 2 + 4 * torch.finfo(torch.float64).eps
    bound = 0.0 if keep else worst + (largest + worst) * half_unit
    return LayerMerge(worst, (lost / size) ** 0.5 if size else 0.0, bound)


def _chunks(flat: Tensor) -> Iterator[slice]:
    step = max(1, MAX_CHUNK_WEIGHTS // max(1, flat.shape[1]))
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


def _untie(model: nn.Module, name: str, undo: list[Any]) -> tuple[str, ...]:
    """Give a parameter's module one of its own where others hold the same; they keep the original."""
    own = dict(model.named_parameters(remove_duplicate=False))
    shared = own.get(name)
    others = [n for n, p in own.items() if p is shared and n != name]
    if shared is None or not others:
        return ()
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, key, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    undo.append(lambda: setattr(module, key, shared))
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):  # or loading a saved copy would tie them again
        config.tie_word_embeddings = False
        undo.append(lambda: setattr(config, "tie_word_embeddings", True))
    return (f"{name} is no longer tied to {', '.join(others)}",)


def _copy(model: nn.Module, state: Mapping[str, Tensor], undo: list[Any]) -> None:
    """Copy whole modules, biases or a full model into the base: tensors by its own names. The originals are kept."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = list(own[name].shape) if name in own else "no such tensor"
            raise ConfigError("adapter", f"{name} {list(tensor.shape)}", f"tensors that fit this base; it has {shape}")
        original = own[name].detach().clone()
        own[name].data.copy_(tensor)
        undo.append(lambda target=own[name], original=original: target.data.copy_(original))
