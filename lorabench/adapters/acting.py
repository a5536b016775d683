"""Whether every adapter acts: its start leaves its layer's output as it was, and the loss gives it a gradient.

A model may read a layer's weight instead of calling the layer, leave a part of itself unused, or give a layer a forward
pass that is not its class's. Names cannot tell, one forward and backward pass can. Shape letters: K slices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.context import SlicesMix
from lorabench.adapters.isolation import restore_after
from lorabench.adapters.layers import StackedAdapter, WrappedModule
from lorabench.adapters.stack import Stack
from lorabench.adapters.variants import StackedScale

NOISES = (0.0, 0.01, 0.1)  # on what trains: a start may lie where a gradient is zero by chance
_EXPERT = re.compile(r"(experts?[._](?:expert_)?)\d+")


class IdleAdapters(RuntimeError):
    """Adapters that would count as trained and change nothing.

    bypassed: layers whose adapter changes the output at its start, so it does not stand for the layer. idle: layers
    whose adapter gets no gradient in some slice. acting: the other layers that carry adapters.
    """

    def __init__(self, bypassed: list[str], idle: list[str], acting: list[str]) -> None:
        self.bypassed, self.idle, self.acting = bypassed, idle, acting
        super().__init__(f"adapters that do not act: {', '.join(bypassed + idle)}")


def check_adapters_act(model: nn.Module, stack: Stack, batches: Iterable[Callable[[], Tensor]]) -> None:
    """Raise `IdleAdapters` unless every adapter of every slice acts; leave everything as it was.

    batches: each runs the model on another small batch of K * B rows and gives per-example losses [N]. More than the
    first are run only while an adapter has had no gradient. Of experts that tokens are routed to, one that acts
    answers for those of its layer that no token reached.
    """
    layers = {x.name: x for x in stack.layers if isinstance(x, (StackedAdapter, StackedScale))}
    if not layers:
        return
    waiting = {name: {k for k, spec in enumerate(x.specs) if spec and spec.r} for name, x in layers.items()}
    bypassed: set[str] = set()
    with restore_after(model, stack):
        model.eval()
        for first, forward in enumerate(batches):
            for noise in NOISES:
                _start(stack, layers.values(), noise)
                with _compare_outputs(layers.values(), bypassed, on=not first and not noise):
                    losses = forward()
                    if losses.requires_grad:
                        losses.sum().backward()
                _drop_acting(layers, waiting)
                if bypassed or not waiting:
                    break
            if bypassed or not waiting:
                break
    idle = set() if bypassed else _without_experts(waiting, layers.keys() - waiting.keys())
    if bypassed or idle:
        wrong = [name for name in layers if name in bypassed | idle]
        acting = [name for name in layers if name not in wrong]
        raise IdleAdapters([n for n in wrong if n in bypassed], [n for n in wrong if n in idle], acting)


def _without_experts(idle: Iterable[str], acting: Iterable[str]) -> set[str]:
    """Return the idle layers but for experts of which another acts in the same place."""
    reached = {_EXPERT.sub(r"\1*", name) for name in acting}
    return {name for name in idle if not (_EXPERT.search(name) and _EXPERT.sub(r"\1*", name) in reached)}


def _start(stack: Stack, layers: Iterable[Any], noise: float) -> None:
    """Put adapters where they leave their layers as they are, or add noise; drop all gradients."""
    torch.manual_seed(0)
    for t in stack.named_trainables():
        t.parameter.grad = None
        if noise:
            t.parameter.data.add_(torch.randn_like(t.parameter), alpha=noise)
    for layer in () if noise else layers:
        for k, spec in enumerate(layer.specs):
            if spec and spec.init == "orthogonal":  # the one start at which B is not zero
                layer.lora_B.data[k] = 0


def _drop_acting(layers: dict[str, Any], waiting: dict[str, set[int]]) -> None:
    """Take the slices out of `waiting` in which some tensor of a layer has a gradient that is not zero."""
    for name in list(waiting):
        grads = [part.parameter.grad for part in layers[name].parts().values()]
        waiting[name] -= {
            k for k in waiting[name] if any(grad is not None and bool((grad[k] != 0).any()) for grad in grads)
        }
        if not waiting[name]:
            del waiting[name]


@contextmanager
def _compare_outputs(layers: Iterable[WrappedModule], bypassed: set[str], *, on: bool) -> Iterator[None]:
    """Add the layers whose output differs from their base's to `bypassed`, at each call inside the block.

    An exception that such a layer causes ends the block: one in its own forward pass, or in what takes its output.
    """
    entered: list[str] = []

    def enter(layer: Any, args: Any) -> None:
        entered.append(layer.name)

    def leave(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        with torch.no_grad():
            if not _equal(layer.base(*args, **kwargs), output):
                bypassed.add(layer.name)
        entered.pop()

    hooks: list[Any] = []
    for layer in layers if on else ():
        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, with_kwargs=True)]
    try:
        yield
    except (SlicesMix, torch.OutOfMemoryError):
        raise
    except Exception:
        bypassed.update(entered)
        if not bypassed:
            raise
    finally:
        for hook in hooks:
            hook.remove()


def _equal(own: Any, adapted: Any) -> bool:
    """Whether two outputs agree but for rounding."""
    if not (isinstance(own, Tensor) and isinstance(adapted, Tensor) and own.shape == adapted.shape):
        return False
    share = 0.05 if own.dtype in (torch.bfloat16, torch.float16) else 1e-4
    largest = float(own.detach().abs().max()) if own.numel() else 0.0
    return torch.allclose(own.float(), adapted.float(), rtol=0, atol=share * largest, equal_nan=True)
