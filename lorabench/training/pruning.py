"""Which learning rates leave a pack before its end: successive halving inside a cell, on validation data. No torch.

After Jamieson & Talwalkar (2016, "Non-stochastic best arm identification", figure 3), with three reserves, since LoRA's
B starts at zero and early losses favour some rates: nothing is pruned before half of the steps, the best rate and its
neighbours on the grid always go on, and a tie is never broken against a rate.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import fmean

from lorabench.config.runs import RunConfig, digest

MIN_RATES = 4  # rates: of three, the best and its neighbours leave nothing worth pruning


def slices_to_prune(
    rates: Sequence[float],
    losses: Sequence[float],
    alive: Sequence[bool],
    *,
    step: int,
    total: int,
    groups: Sequence[Hashable],
) -> list[int]:
    """Return the slices to prune now, ascending. Call it after every evaluation; sequences have one entry a slice.

    losses: the validation loss a slice's record would carry if training ended here (with `trainer.keep=best` its lowest
    so far, with `last` its latest), so that what is ranked is what `results.selection` chooses by; NaN or inf:
    diverged. alive: False for a slice that was pruned, diverged or failed; True for one that stopped early: it has
    ended, but its rate is still in the race. step: optimizer steps done, of `total`. groups: the cell of a slice
    (`cell_key`).

    An evaluation at a step in [total / 2, total) is a rung. At a rung, in each cell of at least `MIN_RATES` rates:
    1. a rate's score is the mean loss over its slices; a rate with a slice that is not alive or not finite has none;
    2. best is the lowest score, of equal ones the smallest rate (as `select` chooses);
    3. these go on: best, its neighbours among all rates of the cell (whether or not these have a score), the better
       half of the rates that have a score (of an odd number the larger half), and whoever ties with the last of it;
    4. all other rates are pruned, every seed at once. So the last seeds of a rate that lost one to divergence end here,
       unless best is next to it: it cannot be chosen any more.
    Each rung halves what the rung before left, so an evaluation more is a rung more. Nothing is pruned in a cell in
    which no rate has a score. A returned slice that has stopped early needs nothing: its record stands as completed.
    """
    if not total <= 2 * step < 2 * total:
        return []
    cells: dict[Hashable, list[int]] = {}
    for k, group in enumerate(groups):
        cells.setdefault(group, []).append(k)
    return sorted(k for slices in cells.values() for k in _to_prune_in_cell(slices, rates, losses, alive))


def _to_prune_in_cell(
    slices: list[int], rates: Sequence[float], losses: Sequence[float], alive: Sequence[bool]
) -> list[int]:
    by_rate: dict[float, list[int]] = {}
    for k in slices:
        by_rate.setdefault(rates[k], []).append(k)
    grid = sorted(by_rate)
    score = {  # fmean is exact, so equal losses tie whatever the order of their seeds
        lr: fmean(losses[k] for k in by_rate[lr])
        for lr in grid
        if all(alive[k] and math.isfinite(losses[k]) for k in by_rate[lr])
    }
    if len(grid) < MIN_RATES or not score:
        return []
    ranked = sorted(score, key=lambda lr: (score[lr], lr))
    last = score[ranked[math.ceil(len(ranked) / 2) - 1]]
    best = grid.index(ranked[0])
    stay = {*grid[max(0, best - 1) : best + 2], *(lr for lr in ranked if score[lr] <= last)}
    return [k for lr in grid if lr not in stay for k in by_rate[lr] if alive[k]]


def prune_reason(step: int, total: int) -> str:
    """Return what a pruned slice's record says."""
    return f"pruned at step {step} of {total}: its learning rate was out of the race within its cell"


def cell_key(run: RunConfig) -> str:
    """Return a key that is equal for runs that differ in rate and seed only.

    A run that two named cells share has one key.
    """
    identity = run.identity()
    del identity["seed"], identity["optimizer"]["lr"]
    return digest(identity)[:12]


def is_prunable(runs: Sequence[RunConfig]) -> bool:
    """Return whether a cell's runs are worth keeping in one pack: tuning runs at enough rates.

    Confirmation runs are never pruned.
    """
    return all(r.role == "tune" for r in runs) and len({r.optimizer.lr for r in runs}) >= MIN_RATES
