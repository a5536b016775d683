"""The handle of a pack's trainable state: what trains, slice by slice, and how to take it off the base again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorabench.adapters.context import Context
from lorabench.adapters.layers import WrappedModule
from lorabench.config.contracts.method import SlicePlan


@dataclass(frozen=True)
class Trainable:
    """One tensor for the optimizer.

    stacked: whether it is [K, ...]; else it is a parameter of the base itself. decay: whether weight decay applies.
    rates: a factor of the learning rate for each slice, where 0 freezes it; None: 1 for all.
    """

    name: str
    parameter: nn.Parameter
    stacked: bool
    decay: bool
    rates: tuple[float, ...] | None = None


class Stack:
    """K slices on one base; made by `inject`. `context` keys dropout; `layers` are the wrappers now in the model."""

    def __init__(self, model: nn.Module, plans: Sequence[SlicePlan]) -> None:
        self.model, self.plans = model, tuple(plans)
        self.context = Context(len(plans))
        self.layers: list[WrappedModule] = []
        self.own: dict[str, nn.Parameter] = {}  # the base's own trainable parameters (full fine-tuning)
        self.undo = ExitStack()

    @property
    def size(self) -> int:
        """K"""
        return len(self.plans)

    def named_trainables(self) -> list[Trainable]:
        """All that trains, in the base's order. Names: `<layer>.lora_A`, `<layer>.bias`, `<module>.<parameter>`."""
        found = [Trainable(name, p, stacked=False, decay=p.dim() > 1) for name, p in self.own.items()]
        for layer in self.layers:
            found += [
                Trainable(f"{layer.name}.{key}", own.parameter, True, own.decay, _uneven(own.rates))
                for key, own in layer.parts().items()
            ]
        return found

    def slice_state(self, k: int) -> dict[str, Tensor]:
        """Return what slice k trains, in PEFT's shapes without padding rows.

        Names are those of `named_trainables`. Tensors may share memory with the model: clone them to keep them.
        """
        state = {name: p.detach() for name, p in self.own.items()}
        for layer in self.layers:
            state |= {f"{layer.name}.{key}": value for key, value in layer.slice_state(k).items()}
        return state

    def export_slice(self, k: int) -> tuple[dict[str, Tensor], SlicePlan]:
        """Return slice k for files: a change of the plain base, and the plan that fits it.

        For most methods it is `slice_state(k)`. PiSSA and OLoRA become a LoRA of twice the rank.
        """
        state = {name: p.detach() for name, p in self.own.items()}
        adapters = dict(self.plans[k].adapters)
        for layer in self.layers:
            own, spec = layer.export_slice(k)
            state |= {f"{layer.name}.{key}": value for key, value in own.items()}
            if spec is not None:
                adapters[layer.name] = spec
        return state, replace(self.plans[k], adapters=adapters)

    @torch.no_grad()
    def load_slice(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Write a state that `slice_state` gave into slice k. Raises ValueError for a tensor that is missing, unknown
        or misshapen, before anything is written."""
        own = self.slice_state(k)
        wrong = sorted(own.keys() ^ state.keys())
        wrong = wrong or sorted(name for name, value in state.items() if value.shape != own[name].shape)
        if wrong:
            raise ValueError(f"slice {k} does not fit the state given: {', '.join(wrong[:5])}")
        for name, p in self.own.items():
            p.copy_(state[name])
        for layer in self.layers:
            part = {key: state[f"{layer.name}.{key}"] for key in layer.slice_state(k)}
            if part:
                layer.load_slice(k, part)

    @contextmanager
    def active(self, slices: Sequence[int]) -> Iterator[None]:
        """Give the rows of a batch to these slices inside the block, slice-major; []: to the plain base."""
        assert all(0 <= k < self.size for k in slices), f"slices {slices} of a pack of {self.size}"
        before = self.context.active, self.context.leaves
        self.context.active, self.context.leaves = tuple(slices), {}
        try:
            yield
        finally:
            self.context.active, self.context.leaves = before

    def remove(self) -> None:
        """Give the base back as it was, bit for bit. The stacked tensors are gone with it."""
        self.undo.close()
        self.layers, self.own = [], {}


def _uneven(rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Return the rates; None where every slice trains at its full rate."""
    return rates if rates and set(rates) != {1.0} else None
