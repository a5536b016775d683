"""AdamW, clipping and schedules for K slices at once. Shapes: K slices; a stacked tensor is [K, ...].

The update is that of torch.optim.AdamW (Loshchilov & Hutter, arXiv 1711.05101), with one learning rate and one
decay a slice. A tensor that is not stacked (of a base that trains itself) belongs to the one slice of its pack.
Where it is sharded over processes (`fsdp`), each steps its share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lorabench.training import distributed
from lorabench.training.fsdp import is_shard, local_part


def per_slice(values: Tensor, like: Tensor, *, stacked: bool) -> Tensor:
    """Return `values` [K] shaped to broadcast over `like`: [K, 1, ...] if stacked, else [1, ...] (K = 1)."""
    shape = (-1,) + (1,) * (like.dim() - 1) if stacked else (1,) * max(like.dim(), 1)
    return values.to(device=like.device, dtype=like.dtype).view(shape)


class PackedAdamW(torch.optim.Optimizer):
    """AdamW whose peak rate and decay are vectors over the slices of a pack.

    torch's own fused AdamW steps each slice on its views of the stacked tensors, so a slice's numbers are those of
    torch.optim.AdamW. group["lr"] is the scalar factor of the schedule, so torch's schedulers work unchanged; the rates
    by slice stand beside it. A frozen slice gets no update, whatever its gradients are.

    groups: dicts with "params", "stacked" (tensors are [K, ...]), "decay" (weight decay applies) and, where not all
    slices train these at their full rate, "rates" (a factor a slice; 0: frozen).
    lr, weight_decay: one number a slice.
    """

    STATE = ("exp_avg", "exp_avg_sq", "steps")  # shapes: the parameter's, the parameter's, [K]

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: Sequence[float],
        weight_decay: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        rates = torch.tensor(lr, dtype=torch.float64)
        decay = torch.tensor(weight_decay, dtype=torch.float64)
        assert rates.shape == decay.shape and rates.dim() == 1
        copies = [dict(group) for group in groups]
        for group in copies:
            factors = group.pop("rates", None)
            group["slice_lr"] = rates * torch.tensor(factors or [1.0] * len(rates), dtype=torch.float64)
            group["slice_decay"] = decay.clone() if group.pop("decay") else torch.zeros_like(decay)
        super().__init__(copies, {"lr": 1.0, "betas": betas, "eps": eps, "stacked": True})

    def freeze(self, slices: Tensor) -> None:
        """Take slices (bool [K]) out of training for good."""
        for group in self.param_groups:
            group["slice_lr"][slices.cpu()] = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for k, lr in enumerate(group["slice_lr"].tolist()):
                if lr > 0:
                    self._step_slice(group, k, lr * group["lr"])
        return loss

    def _step_slice(self, group: dict[str, Any], k: int, lr: float) -> None:
        """Apply torch's AdamW to slice k of every tensor of a group that has a gradient."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                slices = len(group["slice_lr"])
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["steps"] = torch.zeros(slices, device=p.device)
            parts = [local_part(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
            views = (*(t[k] if group["stacked"] else t for t in parts), state["steps"][k])
            for column, tensor in zip(lists, views, strict=True):
                column.append(tensor)
        params, grads, avgs, squares, steps = lists
        if params:
            beta1, beta2 = group["betas"]
            decay = float(group["slice_decay"][k])
            settings = {"beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": decay, "eps": group["eps"]}
            adamw(params, grads, avgs, squares, [], steps, fused=True, amsgrad=False, maximize=False, **settings)


@torch.no_grad()
def zero_frozen_grads(parameter: nn.Parameter, rates: Sequence[float] | None) -> None:
    """Zero the gradients of slices whose rate factor is 0, so they add to no norm. rates: one a slice, or None."""
    if rates and not all(rates) and parameter.grad is not None:
        parameter.grad[[k for k, rate in enumerate(rates) if not rate]] = 0.0


def grad_norms(parameters: Sequence[tuple[nn.Parameter, bool]], slices: int) -> Tensor:
    """Return the gradient norm of each slice over all its tensors, [K] float64 on the CPU.

    parameters: (tensor, stacked). Collective where some are sharded: the squares of the shares are summed.
    """
    whole, shares = list[Tensor](), list[Tensor]()
    for p, stacked in parameters:
        if p.grad is not None:
            grad = local_part(p.grad)
            flat = grad.flatten(1) if stacked else grad.reshape(1, -1)
            wide = torch.promote_types(p.dtype, torch.float32)
            norm = torch.linalg.vector_norm(flat, dim=1, dtype=wide)
            (shares if is_shard(p) else whole).append(norm)
    squares = torch.zeros(slices, dtype=torch.float64)
    if whole:
        squares = torch.stack(whole).cpu().double().square().sum(0)  # one copy off the device, not one a tensor
    if shares:
        of_shares = torch.stack(shares).double().square().sum(0)
        distributed.sum_over_ranks([of_shares])
        squares = squares + of_shares.cpu()
    return squares.sqrt()


@torch.no_grad()
def scale_grads(parameters: Sequence[tuple[nn.Parameter, bool]], factors: Tensor) -> None:
    """Multiply each slice's gradients by its factor, in place. factors: [K]."""
    for p, stacked in parameters:
        if p.grad is not None:
            grad = local_part(p.grad)
            grad.mul_(per_slice(factors, grad, stacked=stacked))


def clip_factors(norms: Tensor, max_norm: float | None) -> Tensor:
    """Return the coefficient of torch.nn.utils.clip_grad_norm_ by slice: min(1, max_norm / (norm + 1e-6))."""
    if max_norm is None:
        return torch.ones_like(norms)
    return (max_norm / (norms + 1e-6)).clamp(max=1.0)


def schedule(name: str, total_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Return the factor of the peak rate as a function of the step, from 0.

    A linear warm-up, then constant, or linear or cosine decay to zero.
    """
    warmup = math.ceil(total_steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if name == "linear":
            return 1.0 - progress
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor
