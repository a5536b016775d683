"""Whether slices see each other: one is poisoned with NaN, forward and backward, and the others are looked at.

Names cannot tell: time-major activations, batch statistics, token routing and layers fed without a batch axis only
show in what they compute. Shape letters: K slices, N = K * B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorabench.adapters.context import SlicesMix
from lorabench.adapters.stack import Stack

POISONED = 0  # the first slice: what leaks from earlier rows to later ones (scans, capacity limits) starts there


def check_slices_independent(model: nn.Module, stack: Stack, forward: Callable[[], Tensor]) -> None:
    """Raise `SlicesMix` naming the first layer where the slices of a pack see each other; leave everything as it was.

    forward: runs the model on a small batch of K * B rows, different for each slice (a router that sends equal tokens
    the same way would look harmless), and gives per-example losses [N]. It runs three times, in training mode, with
    noise on the trainable tensors, as adapters that start at zero hide each other. On a CPU the other slices' losses
    and gradients must not change by one bit, elsewhere by rounding.
    """
    if stack.size == 1:
        return
    with restore_after(model, stack):
        model.train()
        torch.manual_seed(0)
        for t in stack.named_trainables():
            t.parameter.data.add_(torch.randn_like(t.parameter), alpha=0.1)
        clean = _run(stack, forward)
        for t in stack.named_trainables():
            t.parameter.data[POISONED] = torch.nan
        poisoned = _run(stack, forward)
        if not _same(clean[0], poisoned[0]):
            raise SlicesMix(_first_mixing(model, stack, forward, rows=stack.size * clean[0].shape[1]), "forward pass")
        for name in reversed(clean[1]):
            if not _same(clean[1][name], poisoned[1][name]):
                raise SlicesMix(name.rpartition(".")[0], "backward pass")


def _run(stack: Stack, forward: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return losses [K, B] and gradients [K, ...] by name."""
    trainables = stack.named_trainables()
    for t in trainables:
        t.parameter.grad = None
    losses = forward()
    losses.sum().backward()
    grads = {t.name: t.parameter.grad for t in trainables if t.parameter.grad is not None}
    return losses.detach().view(stack.size, -1), grads


def _same(clean: Tensor, poisoned: Tensor) -> bool:
    """Whether the slices beside the poisoned one agree (leading axis K)."""
    a, b = clean[POISONED + 1 :], poisoned[POISONED + 1 :]
    if a.device.type == "cpu":
        return torch.allclose(
            a, b, rtol=0, atol=0, equal_nan=True
        )  # a slice may overflow on its own, with a vast alpha
    return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max())))


@torch.no_grad()
def _first_mixing(model: nn.Module, stack: Stack, forward: Callable[[], Tensor], rows: int) -> str:
    """Return the first module, in the order of execution, whose output holds NaN outside the poisoned slice's rows."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and any(_leaks(x, stack.size, rows) for x in tree_leaves(output) if isinstance(x, Tensor)):
                found.append(name.removesuffix(".base"))

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "(the loss)"


def _leaks(x: Tensor, size: int, rows: int) -> bool:
    """Whether NaN stands outside the poisoned slice, or anywhere in a tensor whose leading axis is not the batch's."""
    if x.dim() == 0 or not x.is_floating_point() or not bool(x.isnan().any()):
        return False
    if x.shape[0] == 0 or x.shape[0] % rows:
        return True
    return bool(x.reshape(size, -1)[POISONED + 1 :].isnan().any())


@contextmanager
def restore_after(model: nn.Module, stack: Stack) -> Iterator[None]:
    """Put trainable tensors, gradients, buffers, training flags and the random state back after the block."""
    trainables = stack.named_trainables()
    values = [t.parameter.detach().clone() for t in trainables]
    grads = [t.parameter.grad for t in trainables]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for t, value, grad in zip(trainables, values, grads, strict=True):
                t.parameter.copy_(value)
                t.parameter.grad = grad
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode
