"""Dropout whose masks are a function of (seed, step, layer, example, position, feature) and of nothing else.

Padding, batch order and pack-mates cannot change a mask, a recomputed forward pass (gradient checkpointing) draws the
same one, and so does another device. The bits come from a counter-based integer hash: two xor-shift-multiply rounds
(C. Wellons' lowbias32) over 32-bit lanes, each lane giving two 16-bit draws, so p is met to 1/65536.
Shape letters: K slices, B batch, N = K * B rows, slice-major.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorabench.adapters.context import Context, digest32
from lorabench.config.errors import ConfigError


def _to_signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


_M1, _M2, _GOLDEN = _to_signed(0x7FEB352D), _to_signed(0x846CA68B), _to_signed(0x9E3779B9)


def mix_(h: Tensor) -> Tensor:
    """Hash int32 lanes in place. int32 products wrap; the masks make torch's arithmetic shifts logical ones."""
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= _M1
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= _M2
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


def _absorb(h: Tensor, counters: Tensor) -> Tensor:
    """Return keys [..., n] from keys [..., 1] and counters [n]."""
    return mix_(h ^ (counters * _GOLDEN))


def keep_mask(keys: Tensor, drop: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a mask that is True where an element stays.

    keys: int32 [N], one a row. drop: probabilities, [N]. shape: the mask's, N leading.

    The mask's value at an index does not depend on the shape.
    """
    h = keys
    for size in shape[1:-1]:
        h = _absorb(h.unsqueeze(-1), torch.arange(size, dtype=torch.int32, device=h.device))
    lanes = torch.arange((shape[-1] + 1) // 2, dtype=torch.int32, device=h.device)
    draws = _absorb(h.unsqueeze(-1), lanes).view(torch.int16)[..., : shape[-1]]
    floor = (drop * 65536).round().clamp(max=65535).to(torch.int32) - 32768
    return draws >= floor.to(torch.int16).view(-1, *[1] * (len(shape) - 1))


def row_keys(context: Context, rows: int, layer: str) -> Tensor:
    """Return one int32 key for each example of the rows at hand, [K, B], from (seed, step, layer, example)."""
    ids = context.ids(rows, layer)
    seeds = [digest32(context.seeds[k], context.step, layer) for k in context.members()]
    h = torch.tensor(seeds, dtype=torch.int32, device=ids.device).unsqueeze(1)
    low, high = ids.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
    return mix_(mix_(h ^ low) ^ high)


def keyed_dropout(x: Tensor, drop: float | Sequence[float], context: Context, layer: str) -> Tensor:
    """Return x [N, ...] with elements dropped. Rows that flatten tokens into the leading axis are told apart by it.

    drop: one probability, or one a slice at hand.
    """
    keys = row_keys(context, x.shape[0], layer)
    p = torch.tensor(drop, dtype=torch.float32, device=x.device)
    p = p.view(-1, 1).expand(keys.shape).flatten()
    rows = x.reshape(keys.numel(), -1, *x.shape[1:])
    scale = (1 / (1 - p)).to(x.dtype).view(-1, *[1] * (rows.dim() - 1))
    return (torch.where(keep_mask(keys.flatten(), p, rows.shape), rows, 0) * scale).view(x.shape)


class _KeyedCalls(TorchFunctionMode):
    """Replaces the dropout calls made inside one forward pass of a module; each is keyed by its place in it."""

    def __init__(self, context: Context, layer: str) -> None:
        super().__init__()
        self.context, self.layer, self.calls = context, layer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        attention_p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        if func is F.scaled_dot_product_attention and attention_p > 0:
            raise ConfigError(
                "model.dropout", attention_p, f"0: {self.layer} drops attention inside a fused kernel, unkeyed"
            )
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        self.calls += 1
        return keyed_dropout(x, p, self.context, f"{self.layer}#{self.calls}")


def has_dropout(model: nn.Module) -> bool:
    """Whether a base drops anything of its own in training."""
    return any(_probability(module) > 0 for module in model.modules())


def key_base_dropout(model: nn.Module, context: Context, undo: ExitStack) -> None:
    """Key every dropout of the base by wrapping the forward pass of the modules that own one.

    nn.Dropout modules and modules that call F.dropout with a probability they hold (attention among them: the base goes
    over to its eager attention, as fused kernels draw their own bits). Raises `ConfigError` under model.dropout for
    randomness that cannot be keyed.
    """
    owners = [(name, module) for name, module in model.named_modules() if _probability(module) > 0]
    if not owners:
        return
    for name, module in owners:
        _refuse(name, module)
        undo.callback(_restore_forward, module, module.__dict__.get("forward"))
        module.forward = _key_forward(module, context, name)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    switch: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    if switch is not None and before not in (None, "eager"):
        undo.callback(switch, before)
        switch("eager")


def _probability(module: nn.Module) -> float:
    """The largest dropout probability a module holds itself or in an nn.Dropout it may hand to a function."""
    own = [
        v
        for key, v in vars(module).items()
        if "drop" in key and isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    if isinstance(module, nn.modules.dropout._DropoutNd):
        own.append(module.p)
    own += [child.p for child in module.children() if isinstance(child, nn.modules.dropout._DropoutNd)]
    return max(own, default=0.0)


def _refuse(name: str, module: nn.Module) -> None:
    kind, p = type(module).__name__, _probability(module)
    layerdrop = float(vars(module).get("layerdrop", 0.0))
    fused = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) or "DropPath" in kind
    channels = isinstance(module, nn.modules.dropout._DropoutNd) and not isinstance(module, nn.Dropout)
    if layerdrop or fused or channels:
        raise ConfigError(
            "model.dropout", p, f"0 for this base: the randomness of {name} ({kind}) cannot be keyed by example"
        )


def _key_forward(module: nn.Module, context: Context, name: str) -> Callable[..., Any]:
    """Return a module's forward pass with keyed dropout in training.

    In evaluation it is the module's own: looking at each of its calls would make every answer of a served adapter
    slower.
    """
    forward = module.forward

    @functools.wraps(forward)
    def keyed(*args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return forward(*args, **kwargs)
        with _KeyedCalls(context, name):
            return forward(*args, **kwargs)

    return keyed


def _restore_forward(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.forward = own
