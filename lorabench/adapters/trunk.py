"""The blocks of a base below everything that trains. Their output for an example never changes, so it is computed once.

A head alone, or adapters on upper layers only, leave a frozen trunk. Its output for each example of a split is kept and
served whenever that example comes again, in whichever slice, step or evaluation. Shape letters: N rows of a batch,
T tokens, H hidden features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.dropout import has_dropout
from lorabench.adapters.layers import WrappedModule
from lorabench.adapters.stack import Stack

TokenMask = Callable[[Mapping[str, Tensor]], Tensor | None]  # of a batch [N, T]; None: its examples are no tokens
MAX_FEATURE_BYTES = 2**30  # of one split's outputs; a larger split is computed anew each time


@dataclass(frozen=True)
class Features:
    """A trunk's output for the examples of one split: `flat` [all tokens, H], and where each example's rows begin.

    seconds: what computing it took.
    """

    flat: Tensor
    starts: dict[int, int]  # by example id
    lengths: dict[int, int]
    seconds: float = 0.0

    def batch(self, examples: Sequence[int], tokens: int) -> Tensor:
        """Return the trunk's output [N, T, H] for these examples. What lies beyond an example's length is never looked
        at."""
        device = self.flat.device
        first = torch.tensor([self.starts[e] for e in examples], device=device)
        last = torch.tensor([self.lengths[e] - 1 for e in examples], device=device)
        place = torch.minimum(torch.arange(tokens, device=device), last[:, None])
        return self.flat[first[:, None] + place]


class _Stop(Exception):
    """What ends a forward pass where the trunk ends."""


class Trunk:
    """The first `depth` blocks of a model; made by `find_trunk`. `serving`: their output for the rows at hand, if
    known."""

    def __init__(self, model: nn.Module, stack: Stack, blocks: Sequence[nn.Module], token_mask: TokenMask) -> None:
        self.model, self.stack, self.blocks, self._token_mask = model, stack, tuple(blocks), token_mask
        self.serving: Tensor | None = None
        self._tuple = False
        for block in self.blocks[:-1]:
            self._stand_in(block, lambda own, hidden: hidden)
        self._stand_in(self.blocks[-1], lambda own, hidden: own)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which positions [N, T] of a batch are tokens and no padding."""
        mask = self._token_mask(batch)
        assert mask is not None, "find_trunk takes batches of tokens only"
        return mask

    def _stand_in(self, block: nn.Module, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace a block's forward pass while features are served: it hands on its input, the last one what is
        served."""
        real = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.serving is None:
                return real(*args, **kwargs)
            given = args[0] if args else kwargs["hidden_states"]
            out = answer(self.serving, given)
            return (out,) if self._tuple else out

        self.stack.undo.callback(_forget, block, block.__dict__.get("forward"))
        block.forward = forward

    @torch.no_grad()
    def output(self, forward: Callable[[], Any]) -> Tensor:
        """Return the trunk's output in a forward pass of the plain base, [N, T, H]; the pass ends there."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: Any, out: Any) -> None:
            self._tuple = isinstance(out, tuple)
            found.append(out[0] if self._tuple else out)
            raise _Stop

        hook = self.blocks[-1].register_forward_hook(stop)
        training = self.model.training
        self.model.eval()
        try:
            with self.stack.active([]):
                forward()
        except _Stop:
            pass
        finally:
            hook.remove()
            self.model.train(training)
        return found[0]

    def features(self, batches: Iterator[Mapping[str, Tensor]], run: Callable[[Any], Any], tokens: int) -> Features:
        """Return the trunk's output for every example of these batches.

        run: a forward pass of the model on one of them. tokens: how many they all have.

        Written in place: pieces put together at the end would take twice the memory, and leave it in small change.
        """
        flat: Tensor | None = None
        starts: dict[int, int] = {}
        lengths: dict[int, int] = {}
        total, start = 0, time.monotonic()
        for batch in batches:
            hidden = self.output(lambda: run(batch))  # noqa: B023
            own = self.mask(batch).sum(1).tolist()
            if flat is None:
                flat = hidden.new_empty(tokens, hidden.shape[2])
            if total + sum(own) > len(flat):  # a task that adds tokens as it collates
                flat = torch.cat([flat, hidden.new_empty(total + sum(own), hidden.shape[2])])
            for row, example, length in zip(hidden, batch["example"].tolist(), own, strict=True):
                starts[example], lengths[example] = total, length
                flat[total : total + length] = row[:length]
                total += length
        assert flat is not None, "no example"
        return Features(flat[:total], starts, lengths, time.monotonic() - start)

    @contextmanager
    def serve(self, features: Features | None, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Take the trunk's output for the rows of `batch` from `features` inside the block; None: it is computed."""
        if features is None:
            yield
            return
        self.serving = features.batch(batch["example"].tolist(), self.mask(batch).shape[1])
        try:
            yield
        finally:
            self.serving = None


def find_trunk(
    model: nn.Module,
    stack: Stack,
    layers: int,
    forward: Callable[[], Tensor],
    batch: Mapping[str, Tensor],
    *,
    token_mask: TokenMask,
    tried: bool = False,
) -> Trunk | None:
    """Return the trunk of a base with its stack on; None where there is none, or where reuse would not be exact.

    layers: how many blocks the base has. forward: per-example losses [N] of `batch`, of one slice's rows. Reuse is
    tried on it: the same losses must come out, bit for bit on a CPU. So a base whose upper blocks look at more than the
    hidden states (relative positions handed on from block to block, a sum over all layers) is found out. tried: it was,
    well.
    """
    blocks = _blocks(model, layers)
    if stack.own or not blocks or token_mask(batch) is None or has_dropout(model):
        return None
    depth = next((i for i, block in enumerate(blocks) if _trains(block)), len(blocks))
    if depth == 0:
        return None
    trunk = Trunk(model, stack, blocks[:depth], token_mask)
    if tried:
        trunk.output(forward)  # its kind of output is looked at there
        return trunk
    if not _exact(trunk, forward, batch):
        trunk.serving = None
        return None
    return trunk


@torch.no_grad()
def _exact(trunk: Trunk, forward: Callable[[], Tensor], batch: Mapping[str, Tensor]) -> bool:
    before: list[str] = []  # trainable layers that run before the trunk has ended
    hooks = [layer.register_forward_pre_hook(lambda m, args: before.append(m.name)) for layer in trunk.stack.layers]
    try:
        hidden = trunk.output(forward)
    except IndexError:  # the blocks are not run by this forward pass
        return False
    finally:
        for hook in hooks:
            hook.remove()
    if before or hidden.dim() != 3 or hidden.shape[:2] != trunk.mask(batch).shape:
        return False
    training = trunk.model.training
    trunk.model.eval()  # adapters' own dropout is keyed by the rows of the whole part
    try:
        with trunk.stack.active([0]):
            plain = forward()
            trunk.serving = hidden
            served = forward()
    except Exception:  # a block above wants what a stand-in does not give
        return False
    finally:
        trunk.serving = None
        trunk.model.train(training)
    if plain.device.type == "cpu":
        return torch.equal(plain, served)
    return torch.allclose(plain, served, rtol=1e-3, atol=1e-4)


def _blocks(model: nn.Module, layers: int) -> list[nn.Module]:
    """Return the base's blocks in their order: its one list of that many modules of one class."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == layers and len({type(x) for x in m}) == 1
    ]
    return list(lists[0]) if len(lists) == 1 else []


def _trains(block: nn.Module) -> bool:
    return any(isinstance(m, WrappedModule) for m in block.modules())


def _forget(block: nn.Module, own: Any) -> None:
    if own is None:
        block.__dict__.pop("forward", None)
    else:
        block.forward = own
