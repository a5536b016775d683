"""Modules trained whole (a new head, PEFT's modules_to_save) and biases, one copy a slice.

Shape letters: K slices, B batch, O out channels. Copies are float32 whatever the base's type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from lorabench.adapters.context import Context
from lorabench.adapters.layers import StackedParameter, WrappedModule
from lorabench.config.contracts.model import BIASED, CHANNELS_FIRST
from lorabench.config.errors import ConfigError


class StackedModule(WrappedModule):
    """A module that trains whole: `stacked[name]` [K, ...] for each of its parameters, called once a slice.

    starts: what each slice begins with, by parameter name. new: the module has no pretrained weights; then it computes
    in its parameters' own float32 (logits in bf16 would carry 8 bits), else in the base's type.
    """

    def __init__(
        self,
        base: nn.Module,
        name: str,
        context: Context,
        starts: Sequence[Mapping[str, Tensor]],
        *,
        new: bool,
        vector_rates: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(base, name, context)
        self.new, self.vector_rates = new, vector_rates
        self.stacked = nn.ParameterDict()
        for key, p in base.named_parameters():
            dtype = torch.promote_types(p.dtype, torch.float32)
            stack = torch.stack([start[key].to(device=p.device, dtype=dtype) for start in starts])
            self.stacked[key.replace(".", "/")] = nn.Parameter(stack)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module once a slice. Tensor arguments and outputs are [K * B, ...]."""
        if not self.context.active:
            return self.base(*args, **kwargs)
        if self.training and getattr(self.base, "gradient_checkpointing", False):
            raise ConfigError("trainer.gradient_checkpointing", True, f"false while the whole block {self.name} trains")
        outputs, parameters = [], {key: self.context.pick(p) for key, p in self.stacked.items()}
        for position in range(len(self.context.active)):
            own_args, own_kwargs = tree_map(lambda x: self._own(x, position), (args, dict(kwargs)))  # noqa: B023
            with self.context.only(position):
                own = self._own_parameters(parameters, position)
                outputs.append(functional_call(self.base, own, own_args, own_kwargs))
        return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs)

    def _own(self, x: Any, position: int) -> Any:
        if not isinstance(x, Tensor):
            return x
        own = self.context.split(x, self.name)[position] if x.dim() else x
        dtype = self._compute_dtype()
        return own.to(dtype) if own.is_floating_point() and dtype else own

    def _compute_dtype(self) -> torch.dtype | None:
        return next(iter(self.stacked.values())).dtype if self.new else None

    def _own_parameters(self, parameters: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
        own = {key: parameters[key.replace(".", "/")][position] for key, _ in self.base.named_parameters()}
        return own if self.new else {key: own[key].to(p.dtype) for key, p in self.base.named_parameters()}

    def slice_state(self, k: int) -> dict[str, Tensor]:
        return {key.replace("/", "."): p.detach()[k] for key, p in self.stacked.items()}

    def load_slice(self, k: int, state: Mapping[str, Tensor]) -> None:
        for key, own in self.slice_state(k).items():
            own.copy_(state[key])

    def parts(self) -> dict[str, StackedParameter]:
        # biases and norms, vectors but for their K, do not decay
        return {
            key.replace("/", "."): StackedParameter(p, p.dim() > 2, None if p.dim() > 2 else self.vector_rates)
            for key, p in self.stacked.items()
        }


class StackedBias(WrappedModule):
    """A layer whose bias trains: y = base(x) + (bias_k - bias of the base), bias [K, O]. BitFit, arXiv 2106.10199."""

    def __init__(self, base: nn.Module, name: str, kind: str, context: Context) -> None:
        super().__init__(base, name, context)
        assert kind in BIASED, kind
        frozen = base.bias
        assert isinstance(frozen, Tensor)
        self.channels_first = kind in CHANNELS_FIRST
        own = frozen.detach().to(torch.promote_types(frozen.dtype, torch.float32))
        self.stacked = nn.Parameter(own.expand(context.size, *own.shape).clone())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base(x, *args, **kwargs)
        if not self.context.active:
            return y
        frozen = self.base.bias
        assert isinstance(frozen, Tensor)
        change = self.context.pick(self.stacked) - frozen.to(self.stacked.dtype)
        rows = self.context.split(y, self.name)  # [K, B, ..., O] or [K, B, O, ...]
        shape = [len(rows)] + [1] * (rows.dim() - 1)
        if self.channels_first:
            shape[2] = -1
        else:
            shape[rows.dim() - frozen.dim() :] = frozen.shape
        return (rows + change.view(shape).to(y.dtype)).view_as(y)

    def slice_state(self, k: int) -> dict[str, Tensor]:
        return {"bias": self.stacked.detach()[k]}

    def load_slice(self, k: int, state: Mapping[str, Tensor]) -> None:
        self.stacked.detach()[k].copy_(state["bias"])

    def parts(self) -> dict[str, StackedParameter]:
        return {"bias": StackedParameter(self.stacked, False)}
