"""Stacked layers of LoRA's relatives on nn.Linear and transformers' Conv1D: PiSSA and OLoRA, DoRA, VeRA, (IA)^3.

Shape letters: K slices, N = K * M rows, I in, O out, R rank (the largest on this layer). As in `layers`, a slice that
does not target the layer has its base's output. Starts and semantics are PEFT 0.21's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabench.adapters.context import Context
from lorabench.adapters.init import projection, weight_start
from lorabench.adapters.layers import LAYERS, StackedAdapter, StackedLinear, StackedParameter, WrappedModule
from lorabench.adapters.product import AdaptedProduct, SharedProduct
from lorabench.config.contracts.method import AdapterSpec
from lorabench.config.contracts.model import LayerInfo

FROM_WEIGHT = ("pissa", "olora")  # starts that are parts of the weight itself


class StackedResidual(StackedLinear):
    """PiSSA (Meng et al., arXiv 2404.02948) and OLoRA (Büyükakyüz, arXiv 2406.01775): A and B start as a part of W.

    The papers train on the residual W - s B0 A0. Here W stays, shared by all slices, and the change is added:
    W' = W + s (B A - B0 A0) = W + s (B (A - A0) + (B - B0) A0), exactly zero at the start, and each difference is taken
    in float32 before anything is rounded to the activations' type.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(
        self,
        base: nn.Module,
        info: LayerInfo,
        context: Context,
        specs: Sequence[AdapterSpec | None],
        seeds: Sequence[int],
    ) -> None:
        super().__init__(base, info, context, specs, seeds)
        self.residual = tuple(bool(spec and spec.init in FROM_WEIGHT) for spec in specs)
        for name, tensor in (("start_A", self.lora_A), ("start_B", self.lora_B)):
            mask = torch.tensor(self.residual, device=tensor.device).view(-1, 1, 1)
            self.register_buffer(name, tensor.detach() * mask)

    def start(
        self, spec: AdapterSpec, seed: int, name: str, a: tuple[int, ...], b: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        if spec.init not in FROM_WEIGHT:
            return super().start(spec, seed, name, a, b)
        return weight_start(self.frozen_weight(torch.float32)[0], spec)

    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = super().pair()
        if not any(self.residual[k] for k in self.context.active):
            return a, b
        a0, b0 = self.context.pick(self.start_A)[:, : self.used], self.context.pick(self.start_B)[..., : self.used]
        return torch.cat([a - a0, a0], 1), torch.cat([b, b - b0], 2)

    def export_slice(self, k: int) -> tuple[dict[str, Tensor], AdapterSpec | None]:
        """Return the change as a plain LoRA of twice the rank on the unchanged base, and its spec."""
        state, spec = super().export_slice(k)
        if spec is None or not self.residual[k]:
            return state, spec
        a0, b0 = self.start_A[k, : spec.r], self.start_B[k, :, : spec.r]
        a, b = state["lora_A"], state["lora_B"]
        both = {"lora_A": torch.cat([a - a0, a0]), "lora_B": torch.cat([b, b - b0], 1)}
        return both, replace(spec, r=2 * spec.r, alpha=2 * spec.r * spec.scaling, init="kaiming")


class StackedDora(StackedLinear):
    """DoRA (Liu et al., arXiv 2402.09353): W' = m (W + s B A) / ||W + s B A||, row by row; magnitude m [K, O].

    The norm counts as a constant in the backward pass (section 4.3 there). It is computed without forming B A:
    ||w + s b A||^2 = ||w||^2 + 2 s b (A w) + s^2 b A A^T b^T.
    """

    squares: Tensor

    def __init__(
        self,
        base: nn.Module,
        info: LayerInfo,
        context: Context,
        specs: Sequence[AdapterSpec | None],
        seeds: Sequence[int],
    ) -> None:
        super().__init__(base, info, context, specs, seeds)
        squares = self.frozen_weight(self.lora_A.dtype)[0].square().sum(1)
        self.register_buffer("squares", squares)
        self.magnitude = nn.Parameter(squares.sqrt().expand(len(specs), -1).clone())

    def product(self, x: Tensor, d: Tensor | None) -> Tensor:
        weight, bias = self.frozen_weight(x.dtype)
        a, b = self.pair()
        s = self.context.pick(self.scaling)
        z = AdaptedProduct.apply(x if d is None else d, None, weight, None, a, b, s)  # type: ignore[no-untyped-call]
        # m / norm lies near 1, where bfloat16 is coarse: its distance from 1 is not
        change = self.context.pick(self.magnitude) / self.norms(weight, a, b, s) - 1
        rows = z.view(len(a), -1, z.shape[-1])
        y = torch.addcmul(rows, rows, change.to(x.dtype).unsqueeze(1)).view_as(z)
        if d is None:
            return y if bias is None else y + bias
        return y + F.linear(x, weight, bias) - F.linear(d, weight)  # dropout is on the update's input alone

    @torch.no_grad()
    def norms(self, weight: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        """Return the norms of the rows of W + s B A, [K, O]. They are in the adapters' own type but for A W^T."""
        cross = torch.matmul(a.to(weight.dtype), weight.T).to(b.dtype).transpose(1, 2)  # [K, O, R]
        inner = torch.bmm(a, a.transpose(1, 2))
        scaled = b * s.view(-1, 1, 1)
        squares = self.squares + (scaled * (2 * cross + torch.bmm(scaled, inner))).sum(2)
        return squares.clamp_min(torch.finfo(b.dtype).tiny).sqrt()

    def slice_state(self, k: int) -> dict[str, Tensor]:
        state = super().slice_state(k)
        return state | {"magnitude": self.magnitude.detach()[k]} if state else state

    def load_slice(self, k: int, state: Mapping[str, Tensor]) -> None:
        super().load_slice(k, state)
        self.magnitude.detach()[k].copy_(state["magnitude"])

    def parts(self) -> dict[str, StackedParameter]:
        return super().parts() | {"magnitude": StackedParameter(self.magnitude, False, _targeting(self.specs))}


class StackedVera(StackedLinear):
    """VeRA (Kopiczko et al., arXiv 2310.11454): W' = W + diag(b) B diag(d) A, with A and B random, frozen and the same
    for all layers (each takes the corner it needs); vectors d [K, R] and b [K, O] train."""

    def __init__(
        self,
        base: nn.Module,
        info: LayerInfo,
        context: Context,
        specs: Sequence[AdapterSpec | None],
        seeds: Sequence[int],
    ) -> None:
        WrappedModule.__init__(self, base, info.name, context)
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.inputs, self.outputs = info.in_features, info.out_features
        self.set_specs(specs)
        kind: Any = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.vera_lambda_d = nn.Parameter(torch.zeros(len(specs), max(self.ranks), **kind))
        self.vera_lambda_b = nn.Parameter(torch.zeros(len(specs), self.outputs, **kind))
        self.register_buffer("scaling", torch.ones(len(specs), **kind))
        with torch.no_grad():
            for k, spec in enumerate(specs):
                if spec:
                    self.vera_lambda_d[k, : spec.r] = spec.d_initial

    def product(self, x: Tensor, d: Tensor | None) -> Tensor:
        """Return the output [N, O] for x [N, I]. d [N, I]: what the adapters see of x; None where it is x itself.

        Neighbouring slices of one frozen pair go through it together. A slice that does not target the layer has W's
        output.
        """
        weight, bias = self.frozen_weight(x.dtype)
        l, b = self.context.pick(self.vera_lambda_d), self.context.pick(self.vera_lambda_b)
        groups = [(pair, len(list(members))) for pair, members in groupby(self.context.active, self._pair_of)]
        counts = [n for _, n in groups]
        rows = [n * (len(x) // len(l)) for n in counts]
        seen = [None] * len(groups) if d is None else d.split(rows)
        made = []
        for (pair, _), own, dropped, own_l, own_b in zip(
            groups, x.split(rows), seen, l.split(counts), b.split(counts), strict=True
        ):
            if pair is None:
                made.append(F.linear(own, weight, bias))
                continue
            A, B = projection(self.context.projections, pair, x)
            corner = (A[:, : self.inputs], B[: self.outputs])
            made.append(SharedProduct.apply(own, dropped, weight, bias, *corner, own_l[:, : pair.r], own_b))  # type: ignore[no-untyped-call]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _pair_of(self, k: int) -> AdapterSpec | None:
        """Return what a slice's frozen matrices are drawn from; None where it has none."""
        spec = self.specs[k]
        return None if spec is None else AdapterSpec(r=spec.r, scaling=1.0, alpha=1.0, projection=spec.projection)

    def slice_state(self, k: int) -> dict[str, Tensor]:
        if not self.ranks[k]:
            return {}
        d, b = self.vera_lambda_d.detach()[k, : self.ranks[k]], self.vera_lambda_b.detach()[k]
        return {"vera_lambda_d": d, "vera_lambda_b": b}

    def load_slice(self, k: int, state: Mapping[str, Tensor]) -> None:
        for key, own in self.slice_state(k).items():
            own.copy_(state[key])

    def parts(self) -> dict[str, StackedParameter]:
        rates = _targeting(self.specs)
        return {
            "vera_lambda_d": StackedParameter(self.vera_lambda_d, True, rates),
            "vera_lambda_b": StackedParameter(self.vera_lambda_b, True, rates),
        }


class StackedScale(WrappedModule):
    """(IA)^3 (Liu et al., arXiv 2205.05638): a vector l [K, O] times the output, or [K, I] times the input; ones at the
    start."""

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
        self.specs = tuple(specs)
        kinds = {spec.kind for spec in specs if spec}
        assert len(kinds) == 1, f"{info.name}: one side for all slices"
        self.on_input = kinds == {"ia3_input"}
        width = info.in_features if self.on_input else info.out_features
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.ia3_l = nn.Parameter(torch.ones(len(specs), width, device=weight.device, dtype=dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not any(self.specs[k] for k in self.context.active):
            return self.base(x, *args, **kwargs)
        if self.on_input:
            return self.base(self._scaled(x), *args, **kwargs)
        return self._scaled(self.base(x, *args, **kwargs))

    def _scaled(self, x: Tensor) -> Tensor:
        rows = self.context.split(x, self.name)
        change = (self.context.pick(self.ia3_l) - 1).to(x.dtype)  # l lies near 1, where bfloat16 is coarse
        return torch.addcmul(rows, rows, change.view(len(rows), *[1] * (rows.dim() - 2), -1)).view_as(x)

    def slice_state(self, k: int) -> dict[str, Tensor]:
        return {"ia3_l": self.ia3_l.detach()[k]} if self.specs[k] else {}

    def export_slice(self, k: int) -> tuple[dict[str, Tensor], AdapterSpec | None]:
        return self.slice_state(k), self.specs[k]

    def load_slice(self, k: int, state: Mapping[str, Tensor]) -> None:
        self.ia3_l.detach()[k].copy_(state["ia3_l"])

    def parts(self) -> dict[str, StackedParameter]:
        return {"ia3_l": StackedParameter(self.ia3_l, True, _targeting(self.specs))}


def _targeting(specs: Sequence[AdapterSpec | None]) -> tuple[float, ...]:
    """1 for slices that target the layer; the others' copies stay as they are."""
    return tuple(float(spec is not None and spec.r > 0) for spec in specs)


VARIANTS: dict[str, type[WrappedModule]] = {
    "dora": StackedDora,
    "vera": StackedVera,
    "ia3": StackedScale,
    "ia3_input": StackedScale,
}


def layer_class(info: LayerInfo, specs: Sequence[AdapterSpec | None]) -> type[Any]:
    """The stacked layer that holds these slices' adapters: one kind a layer and pack."""
    kinds = {spec.kind for spec in specs if spec}
    assert len(kinds) == 1, f"{info.name}: adapters of one kind, not {sorted(kinds)}"
    (kind,) = kinds
    if kind != "lora":
        assert info.kind in ("Linear", "Conv1D"), f"{kind} on {info.kind}"
        return VARIANTS[kind]
    if any(spec and spec.init in FROM_WEIGHT for spec in specs):
        return StackedResidual
    found: type[StackedAdapter] = LAYERS[info.kind]
    return found
