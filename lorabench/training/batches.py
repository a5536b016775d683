"""Batches of a pack: one data stream a run, stacked slice-major.

Which examples a batch holds depends on a run's seed alone. Batches are sorted by length inside windows. The order of a
window's length quantiles is the same for all seeds: slices of different seeds then meet batches of one length, and
little is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
BATCHES_PER_WINDOW = 50  # as transformers groups by length: 2 % of the tokens are padding (with 16: 5 %)


def epoch_order(lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of one epoch as index arrays of `batch_size`; the one with the remainder is smaller.

    lengths: [N], in any unit. Shapes depend on the number of examples alone, so every seed's step holds as many.
    """
    of_seed = np.random.default_rng([seed, epoch])
    of_all_seeds = np.random.default_rng([20260101, epoch])
    order = of_seed.permutation(len(lengths))
    size = np.asarray(lengths)
    count = math.ceil(len(lengths) / batch_size)
    per_window = math.ceil(
        count / max(1, math.ceil(count / BATCHES_PER_WINDOW))
    )  # windows of about one size: a short last one sorts badly
    batches: list[np.ndarray] = []
    for start in range(0, len(order), per_window * batch_size):
        window = order[start : start + per_window * batch_size]
        window = window[np.argsort(size[window], kind="stable")]
        batches_here = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches.extend(batches_here[i] for i in of_all_seeds.permutation(len(batches_here)))
    return batches


def steps_per_epoch(examples: int, batch_size: int, accumulate: int) -> int:
    """Return the optimizer steps of one pass over the data."""
    return math.ceil(math.ceil(examples / batch_size) / accumulate)


class Part(NamedTuple):
    """Rows that go through the base at once: a batch of some slices of the pack, slice-major [len(slices) * B, ...]."""

    micro: int  # which micro-batch of the step this belongs to
    slices: tuple[int, ...]
    batch: dict[str, Any]
    counts: bool = True  # False: stands in for an empty share and adds nothing to sums


class PackStream:
    """All steps of a pack, indexed by the global step: `stream[step]` is the list of its parts.

    start: the step at which iteration begins. seeds: one a slice; the order of equal seeds is computed once.
    live: returns the slices that still train; called at each step.
    budget: the most padded tokens (the unit of `lengths`) that go through the base at once. Neighbouring slices share a
    part as far as it allows; one slice's micro-batch is never split.
    shares: (rank, world) where several processes train one pack, each on every `world`-th row of a micro-batch. All
    processes form as many parts of the same slices, so that their collective calls come in one order.
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
        collate: Collate,
        start: int = 0,
        budget: int | None = None,
        live: Callable[[], Sequence[int]] | None = None,
        shares: tuple[int, int] = (0, 1),
    ) -> None:
        self.examples, self.lengths, self.seeds, self.collate = examples, np.asarray(lengths), tuple(seeds), collate
        self.shares = shares
        self.batch_size, self.accumulate, self.total_steps, self.budget = batch_size, accumulate, total_steps, budget
        self.live, self.start = live or (lambda: range(len(self.seeds))), start
        self.per_epoch = steps_per_epoch(len(examples), batch_size, accumulate)
        self._orders: dict[tuple[int, int], list[np.ndarray]] = {}

    def __len__(self) -> int:
        return self.total_steps - self.start

    def __iter__(self) -> Iterator[list[Part]]:
        return (self[step] for step in range(self.start, self.total_steps))

    def __getitem__(self, step: int) -> list[Part]:
        epoch, position = divmod(step, self.per_epoch)
        first, live = position * self.accumulate, tuple(self.live())
        orders = {k: self._order(self.seeds[k], epoch)[first : first + self.accumulate] for k in live}
        micros = len(orders[live[0]]) if live else 0
        return [part for i in range(micros) for part in self._parts(i, {k: orders[k][i] for k in live})]

    def _parts(self, micro: int, indices: Mapping[int, np.ndarray]) -> list[Part]:
        """Return as few parts of about one size as the budget allows. indices: the whole micro-batch of each slice."""
        rank, world = self.shares
        longest = max(self.lengths[rows].max() for rows in indices.values())
        tokens = sum(math.ceil(len(rows) / world) for rows in indices.values()) * int(longest)
        count = min(len(indices), math.ceil(tokens / self.budget)) if self.budget else 1
        counts = all(len(rows) > rank for rows in indices.values())
        share = {k: rows[rank::world] if counts else rows[:1] for k, rows in indices.items()}
        groups = [tuple(map(int, slices)) for slices in np.array_split(list(indices), count)]
        return [Part(micro, slices, self._batch([share[k] for k in slices]), counts) for slices in groups]

    def _batch(self, rows: Sequence[np.ndarray]) -> dict[str, Any]:
        return self.collate([self.examples[i] for of_slice in rows for i in of_slice])

    def _order(self, seed: int, epoch: int) -> list[np.ndarray]:
        if (seed, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[1] == epoch}
            self._orders[seed, epoch] = epoch_order(self.lengths, self.batch_size, seed, epoch)
        return self._orders[seed, epoch]


class EvalStream:
    """Every example once for every live slice, sorted by length, in parts of all live slices.

    A part holds at most `rows` rows and, unless one example a slice is more, at most `budget` padded tokens.
    shares: (rank, world) where several processes evaluate one pack. Each takes every `world`-th example, and all form
    as many parts.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        lengths: Sequence[int],
        live: Callable[[], Sequence[int]],
        *,
        rows: int,
        collate: Collate,
        budget: int | None = None,
        shares: tuple[int, int] = (0, 1),
    ) -> None:
        self.examples, self.live, self.collate = examples, live, collate
        self.rows, self.budget = rows, budget
        rank, world = shares
        order = np.argsort(np.asarray(lengths), kind="stable")
        self.order, self.stand_in = order[rank::world], order[:1]
        last = np.minimum(np.arange(world - 1, len(order) + world - 1, world), len(order) - 1)
        self.sorted = np.asarray(lengths)[order[last]]  # the longest of what the processes take at a time

    def __len__(self) -> int:
        return len(self._cuts(len(self.live())))

    def __iter__(self) -> Iterator[Part]:
        slices = tuple(self.live())
        for start, end in self._cuts(len(slices)):
            indices = self.order[start:end]
            chunk = [self.examples[i] for i in (indices if len(indices) else self.stand_in)]
            yield Part(0, slices, self.collate(chunk * len(slices)), len(indices) > 0)

    def _cuts(self, slices: int) -> list[tuple[int, int]]:
        """Return (start, end) of each part in the order of length, as long as rows and budget allow."""
        cuts: list[tuple[int, int]] = []
        start = 0
        while slices and start < len(self.sorted):
            end = min(len(self.sorted), start + max(1, self.rows // slices))
            if self.budget:
                while end - start > 1 and (end - start) * slices * int(self.sorted[end - 1]) > self.budget:
                    end -= 1
            cuts.append((start, end))
            start = end
        return cuts
