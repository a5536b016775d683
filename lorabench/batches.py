"""One data stream a run, stacked slice-major. Which examples a batch holds depends on a run's seed alone.

Batches are sorted by length inside windows; the order in which a window's length quantiles come is one constant for
all seeds, so that slices of different seeds meet batches of one length and little is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

WINDOW = 16  # batches a window: long enough to sort well, short enough that batches stay random


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch: index arrays of `batch_size`, the last of a pass smaller where it does not divide.

    The shapes depend on the number of examples alone, so every seed's step holds as many examples.
    """
    own = np.random.default_rng([seed, epoch])
    shared = np.random.default_rng([20260101, epoch])  # one constant for all seeds
    order = own.permutation(len(lengths))
    size = np.asarray(lengths)
    batches: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = order[start : start + WINDOW * batch_size]
        window = window[np.argsort(size[window], kind="stable")]
        cut = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches.extend(cut[i] for i in shared.permutation(len(cut)))
    return batches


def steps_per_epoch(examples: int, batch_size: int, accumulate: int) -> int:
    """Optimizer steps of one pass over the data."""
    return math.ceil(math.ceil(examples / batch_size) / accumulate)


class PackStream:
    """All steps of a pack, indexed by the global step: `stream[step]` is a list of micro-batches.

    seeds: one a slice. A micro-batch is what `collate` makes of the slices' examples, one slice after the other
    ([K * B, ...]). Slices of equal seeds share their order, which is computed once.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        lengths: Sequence[int],
        seeds: Sequence[int],
        *,
        batch_size: int,
        accumulate: int,
        total_steps: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ) -> None:
        self.examples, self.lengths, self.seeds, self.collate = examples, lengths, tuple(seeds), collate
        self.batch_size, self.accumulate, self.total_steps = batch_size, accumulate, total_steps
        self.per_epoch = steps_per_epoch(len(examples), batch_size, accumulate)
        self._orders: dict[tuple[int, int], list[np.ndarray]] = {}

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return (self[step] for step in range(self.total_steps))

    def __getitem__(self, step: int) -> list[dict[str, Any]]:
        epoch, position = divmod(step, self.per_epoch)
        first = position * self.accumulate
        orders = [self._order(seed, epoch)[first : first + self.accumulate] for seed in self.seeds]
        return [self._stack([o[i] for o in orders]) for i in range(len(orders[0]))]

    def _stack(self, slices: Sequence[np.ndarray]) -> dict[str, Any]:
        return self.collate([self.examples[i] for indices in slices for i in indices])

    def _order(self, seed: int, epoch: int) -> list[np.ndarray]:
        if (seed, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[1] == epoch}
            self._orders[seed, epoch] = epoch_order(self.lengths, self.batch_size, seed, epoch)
        return self._orders[seed, epoch]


class EvalStream:
    """Every example once for every slice, sorted by length outright. Rows of a batch: slice-major [K * B, ...]."""

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        lengths: Sequence[int],
        slices: int,
        *,
        rows: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ) -> None:
        self.examples, self.slices, self.collate = examples, slices, collate
        self.order = np.argsort(np.asarray(lengths), kind="stable")
        self.size = max(1, rows // slices)

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.order), self.size):
            chunk = [self.examples[i] for i in self.order[start : start + self.size]]
            yield self.collate(chunk * self.slices)
