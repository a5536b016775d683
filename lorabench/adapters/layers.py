"""Stacked LoRA layers (Hu et al., arXiv 2106.09685): K adapters beside the one frozen weight.

Shape letters: K slices, M rows of a slice times whatever lies between, I in, O out, R rank (the pack's largest on this
layer), C channels, g groups. Activations are slice-major: [K * B, ...]. Rows of A and columns of B beyond a slice's own
rank are zero and get zero gradients, so they stay zero under AdamW; a slice of rank 0 does not target the layer.
Shapes, starts and semantics are PEFT 0.21's; adapters are float32 and cast to the activations' type where used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabench.adapters.context import Context
from lorabench.adapters.dropout import keyed_dropout
from lorabench.adapters.init import adapter_start, embedding_start
from lorabench.adapters.product import AdaptedProduct
from lorabench.config.contracts.method import AdapterSpec
from lorabench.config.contracts.model import LayerInfo


class StackedParameter(NamedTuple):
    """A tensor [K, ...] that trains on a layer.

    decay: whether weight decay applies. rates: a factor of the learning rate for each slice, where 0 freezes it; None:
    1 for all.
    """

    parameter: nn.Parameter
    decay: bool
    rates: tuple[float, ...] | None = None


class WrappedModule(nn.Module):
    """A module that stands where one of the base's stood; that one lives on, untouched, as `base`."""

    def __init__(self, base: nn.Module, name: str, context: Context) -> None:
        super().__init__()
        self.base, self.name, self.context = base, name, context
        self.training = base.training

    def __getattr__(self, key: str) -> Any:
        """Return the base's attribute: models read `weight`, `in_features`, `embed_scale` and the like off their
        layers."""
        try:
            return super().__getattr__(key)
        except AttributeError:
            return getattr(super().__getattr__("base"), key)

    def slice_state(self, k: int) -> dict[str, Tensor]:
        """Return what slice k trains here, keyed without the layer's name. It shares memory where it can."""
        raise NotImplementedError

    def load_slice(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Write a state that `slice_state` gave into slice k."""
        raise NotImplementedError

    def export_slice(self, k: int) -> tuple[dict[str, Tensor], AdapterSpec | None]:
        """Return slice k as a change of the plain base, for files, and its adapter's spec here; None where it has
        none."""
        return self.slice_state(k), None

    def parts(self) -> dict[str, StackedParameter]:
        """Return what trains here, by short name."""
        raise NotImplementedError


class StackedAdapter(WrappedModule):
    """K low-rank adapters on one layer.

    lora_A [K, R, I, ...], lora_B [K, O, R, ...], scaling [K]. specs: one a slice, None where it does not target the
    layer; seeds: one a slice.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: Tensor

    def __init__(
        self,
        base: nn.Module,
        info: LayerInfo,
        context: Context,
        specs: Sequence[AdapterSpec | None],
        seeds: Sequence[int],
    ) -> None:
        super().__init__(base, info.name, context)
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.set_specs(specs)
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        shape_a, shape_b = self.shapes(info, max(self.ranks))
        self.lora_A = nn.Parameter(torch.zeros(len(specs), *shape_a, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(len(specs), *shape_b, device=device, dtype=dtype))
        scaling = torch.tensor([s.scaling if s else 0.0 for s in specs], device=device, dtype=dtype)
        self.register_buffer("scaling", scaling)
        with torch.no_grad():
            for k, (spec, seed) in enumerate(zip(specs, seeds, strict=True)):
                if spec and spec.r:
                    a, b = self.start(spec, seed, info.name, *self.shapes(info, spec.r))
                    StackedAdapter.load_slice(self, k, {"lora_A": a, "lora_B": b})

    def set_specs(self, specs: Sequence[AdapterSpec | None]) -> None:
        """Keep each slice's spec, rank and dropout."""
        self.specs = tuple(specs)
        self.ranks = tuple(spec.r if spec else 0 for spec in specs)
        self.drop = tuple(spec.dropout if spec else 0.0 for spec in specs)

    def start(
        self, spec: AdapterSpec, seed: int, name: str, a: tuple[int, ...], b: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return lora_A and lora_B of a slice before training, of shapes `a` and `b`."""
        return adapter_start(spec, seed, name, a, b)

    def shapes(self, info: LayerInfo, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of one slice's A and B at rank r, as PEFT stores them."""
        return (r, info.in_features), (info.out_features, r)

    def views(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the rows of A and the columns of B that slice k uses; writing to them writes to the stack."""
        r = self.ranks[k]
        return self.lora_A.detach()[k, :r], self.lora_B.detach()[k, :, :r]

    def slice_state(self, k: int) -> dict[str, Tensor]:
        if not self.ranks[k]:
            return {}
        a, b = self.views(k)
        return {"lora_A": a.reshape(self.ranks[k], *self.lora_A.shape[2:]), "lora_B": b}

    def export_slice(self, k: int) -> tuple[dict[str, Tensor], AdapterSpec | None]:
        return self.slice_state(k), self.specs[k]

    def load_slice(self, k: int, state: Mapping[str, Tensor]) -> None:
        for own, key in zip(self.views(k), ("lora_A", "lora_B"), strict=True):
            own.copy_(state[key].reshape(own.shape))

    def parts(self) -> dict[str, StackedParameter]:
        specs = self.specs
        rate_A, rate_B = (tuple(getattr(s, f) if s else 1.0 for s in specs) for f in ("rate_A", "rate_B"))
        return {
            "lora_A": StackedParameter(self.lora_A, True, rate_A),
            "lora_B": StackedParameter(self.lora_B, True, rate_B),
        }

    @property
    def used(self) -> int:
        """The largest rank among the active slices; 0: none of them targets this layer."""
        return max((self.ranks[k] for k in self.context.active), default=0)

    def active_a(self) -> Tensor:
        """Return A of the active slices, without a gradient where it is frozen in all of them (LoRA-FA).

        Then none is computed, and nothing is kept for it.
        """
        specs = [self.specs[k] for k in self.context.active]
        frozen = not any(spec and spec.rate_A for spec in specs)
        return self.context.pick(self.lora_A.detach() if frozen else self.lora_A)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and scaling * B of the active slices, in the type of the activations."""
        a, b, s = self.active_a(), *(self.context.pick(t) for t in (self.lora_B, self.scaling))
        return a.to(dtype), (b * s.view(-1, *[1] * (b.dim() - 1))).to(dtype)

    def apply_dropout(self, x: Tensor) -> Tensor:
        """Drop elements of x [K * B, ...] in training, with each slice's own probability."""
        if not self.training or not any(self.drop):
            return x
        return keyed_dropout(
            x, [self.drop[k] for k in self.context.members()], self.context, f"{self.name}.lora_dropout"
        )


class StackedLinear(StackedAdapter):
    """On nn.Linear or transformers' Conv1D: x [K * B, ..., I] -> [K * B, ..., O]."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.used:
            return self.base(x, *args, **kwargs)
        self.context.split(x, self.name)
        d, dtype = self.apply_dropout(x), _compute_dtype(x)
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        y = self.product(flat, None if d is x else d.to(dtype).reshape(flat.shape))
        return y.view(*x.shape[:-1], y.shape[-1])

    def product(self, x: Tensor, d: Tensor | None) -> Tensor:
        """Return the layer's output [N, O] for x [N, I]. d [N, I]: what the adapters see of x; None where it is x
        itself."""
        weight, bias = self.frozen_weight(x.dtype)
        a, b = self.pair()
        return AdaptedProduct.apply(x, d, weight, bias, a, b, self.context.pick(self.scaling))  # type: ignore[no-untyped-call]

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A [K, R, I] and B [K, O, R] of the active slices, R being the largest rank among them."""
        return self.active_a()[:, : self.used], self.context.pick(self.lora_B)[..., : self.used]

    def frozen_weight(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight [O, I] and bias of the base; Conv1D holds its weight the other way round."""
        weight, bias = self.base.weight, self.base.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        rows = weight if isinstance(self.base, nn.Linear) else weight.T
        return rows.to(dtype), None if bias is None else bias.to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The type a product of x is computed in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class StackedEmbedding(StackedAdapter):
    """On nn.Embedding: indices [K * B, ...] -> [K * B, ..., O]. No dropout, and A = 0 with B drawn, as in PEFT."""

    def start(
        self, spec: AdapterSpec, seed: int, name: str, a: tuple[int, ...], b: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        return embedding_start(spec, seed, name, a, b)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base(x, *args, **kwargs)
        if not self.used:
            return y
        a, b = self.factors(y.dtype)
        rows = self.context.split(x, self.name).flatten(1)
        padding = getattr(self.base, "padding_idx", None)
        # one look-up a slice: [K, I, R] tables side by side would copy A every step
        low = torch.stack([F.embedding(ids, table.T, padding) for ids, table in zip(rows, a, strict=True)])
        low = low * getattr(self.base, "embed_scale", 1.0)
        return torch.baddbmm(y.reshape(*low.shape[:2], y.shape[-1]), low, b.transpose(1, 2)).view_as(y)


class StackedConv2d(StackedAdapter):
    """On nn.Conv2d: x [K * B, C, H, W] -> [K * B, O, H', W'].

    A is a convolution like the base's but without groups, B a 1x1 one with the base's groups: lora_A [K, R, C, kh, kw],
    lora_B [K, O, R / g, 1, 1]. Each group owns R / g rows of A, of which a slice of rank r uses the first r / g.
    """

    base: nn.Conv2d

    def shapes(self, info: LayerInfo, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, info.in_features, *self.base.kernel_size), (info.out_features, r // info.groups, 1, 1)

    def views(self, k: int) -> tuple[Tensor, Tensor]:
        g, own = self.base.groups, self.ranks[k] // self.base.groups
        return self.lora_A.detach()[k].unflatten(0, (g, -1))[:, :own], self.lora_B.detach()[k, :, :own]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base(x, *args, **kwargs)
        if not self.used:
            return y
        conv, (a, b) = self.base, self.factors(y.dtype)
        rows = self.context.split(self.apply_dropout(x).to(y.dtype), self.name)
        size, batch, g = len(rows), rows.shape[1], conv.groups
        # slices become groups of one convolution: [B, K * C, H, W] -> [B, K * R, H', W']
        low = F.conv2d(
            rows.transpose(0, 1).flatten(1, 2), a.flatten(0, 1), None, conv.stride, conv.padding, conv.dilation, size
        )
        low = low.view(batch, size * g, -1, y.shape[2] * y.shape[3]).permute(1, 2, 0, 3).flatten(2)
        up = torch.bmm(b.view(size * g, -1, low.shape[1]), low)
        up = up.view(size, conv.out_channels, batch, -1).transpose(1, 2)
        return y + up.reshape(y.shape)


LAYERS: dict[str, type[StackedAdapter]] = {
    "Linear": StackedLinear,
    "Conv1D": StackedLinear,
    "Embedding": StackedEmbedding,
    "Conv2d": StackedConv2d,
}
