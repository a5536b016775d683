"""What every stacked layer of one model shares: which slices the rows belong to, and what keys the dropout masks.

Shape letters: K slices, B batch, N = K * B rows of a batch, slice-major.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class SlicesMix(RuntimeError):
    """A layer of the base lets the slices of a pack see each other: its runs must train one by one."""

    def __init__(self, layer: str, reason: str) -> None:
        self.layer, self.reason = layer, reason
        super().__init__(f"slices mix at layer {layer!r}: {reason}")


def digest32(*parts: object) -> int:
    """A signed 32-bit number from SHA-256 (Python's own hash differs between processes)."""
    raw = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(raw[:4], "little", signed=True)


class Context:
    """What a `Stack` and all its layers share by reference.

    active: the slices that the rows of the next batch belong to, in order. seeds: one a slice. step: the optimizer
    step. examples: ids of the rows, int64 [N].
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.active: tuple[int, ...] = tuple(range(size))
        self.seeds: tuple[int, ...] = tuple(range(size))
        self.step = 0
        self.examples: Tensor | None = None  # int64 [N]
        self.projections: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # frozen pairs that layers share (VeRA)
        self.leaves: dict[int, Tensor] = {}  # of the active slices, by the parameter they are part of
        self._only: int | None = None

    def set(self, *, seeds: Sequence[int], step: int, examples: Tensor) -> None:
        """Set what keys the dropout masks of the next micro-batch. seeds: one a slice; examples: the rows' own ids,
        [N]."""
        assert len(seeds) == self.size, f"{len(seeds)} seeds for {self.size} slices"
        assert examples.dim() == 1 and not examples.is_floating_point()
        self.seeds, self.step, self.examples = tuple(seeds), step, examples

    @property
    def all_active(self) -> bool:
        return self.active == tuple(range(self.size))

    def pick(self, stacked: Tensor) -> Tensor:
        """Return the active slices of a [K, ...] tensor; the tensor itself when all are active.

        In training, neighbouring slices of a parameter are a leaf of their own that shares its memory and its
        gradient's: their gradient lands in place, and no gradient of the whole stack is made and added for each part of
        it.
        """
        if self.all_active:
            return stacked
        first, size = self.active[0], len(self.active)
        if self.active != tuple(range(first, first + size)):
            return stacked[list(self.active)]
        if not (stacked.requires_grad and torch.is_grad_enabled()):
            return stacked[first : first + size]
        if id(stacked) not in self.leaves:
            if stacked.grad is None:
                stacked.grad = torch.zeros_like(stacked)
            leaf = stacked.detach()[first : first + size].requires_grad_()
            leaf.grad = stacked.grad[first : first + size]
            self.leaves[id(stacked)] = leaf
        return self.leaves[id(stacked)]

    def split(self, x: Tensor, layer: str) -> Tensor:
        """Return x [K * M, ...] as [K, M, ...] over the active slices. Raises `SlicesMix` where the rows do not
        divide."""
        size = len(self.active)
        if x.dim() == 0 or x.shape[0] % size:
            raise SlicesMix(layer, f"its input {tuple(x.shape)} has no leading batch axis for {size} slices")
        return x.reshape(size, x.shape[0] // size, *x.shape[1:])

    @contextmanager
    def only(self, position: int) -> Iterator[None]:
        """Take the rows inside the block for those of one active slice: a module is called once a slice."""
        assert self._only is None
        self._only = position
        try:
            yield
        finally:
            self._only = None

    def members(self) -> tuple[int, ...]:
        """Return the slices that the rows at hand belong to, in order."""
        return self.active if self._only is None else (self.active[self._only],)

    def ids(self, rows: int, layer: str) -> Tensor:
        """Return the example ids of the rows at hand, [K, B]. A lone run whose rows are not examples counts them
        instead.

        rows: length of the leading axis, a multiple of the examples where the tokens are flattened into it.
        """
        assert self.examples is not None, "call stack.context.set(...) before a batch that draws dropout"
        members, found = self.members(), self.examples.view(len(self.active), -1)
        if self._only is not None:
            found = found[self._only : self._only + 1]
        if rows % found.numel() == 0:
            return found
        if self.size > 1:
            raise SlicesMix(layer, f"dropout over {rows} rows where the batch holds {found.numel()} examples")
        return torch.arange(rows, device=found.device).view(len(members), rows)
