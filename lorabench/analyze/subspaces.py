"""Subspace similarity between finished runs: phi of A and of dW, beside its value before training.

phi is averaged over layers and pairs of runs; a few values of each layer are kept too. The directions are
right-singular ones, of the input side. Source: the LoRA paper (arXiv 2106.09685), sections 7.2 and 7.3. Shape letters:
n and m numbers of directions, d their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lorabench.adapters.init import adapter_start, embedding_start
from lorabench.adapters.variants import FROM_WEIGHT
from lorabench.analyze import spectra
from lorabench.analyze.deltas import BaseCache, State, TrainedRun, layer_update

MAX_DIRECTIONS = 64  # directions of one matrix that are compared
KEPT_SIZES = (*range(1, 9), 10, 12, 16, 20, 24, 32, 40, 48, 64)  # i and j whose phi the file keeps, beside the largest
Pairs = Sequence[tuple[str, str]]  # run_ids
Directions = Mapping[str, Mapping[str, Tensor]]  # layer -> "A", "start" or "dW" -> [n, d], orthonormal rows


def similarity_entries(
    pairs: Pairs, layers: Sequence[str], runs: Mapping[str, TrainedRun], bases: BaseCache
) -> list[dict[str, Any]]:
    """Return phi over pairs of runs: one entry for A, where both runs have one, and one for dW.

    {"of": "A", "i": [..], "j": [..], "phi": [[..]], "start": [[..]] or None, "inverse_width": mean of 1 / d,
    "layers": {name: {"first": phi(1, 1), "all": phi(n, m), "random": its random baseline, "start": its start}}}
    """
    run_ids = dict.fromkeys(run_id for pair in pairs for run_id in pair)
    by_run = {run_id: directions(runs[run_id], layers, bases) for run_id in run_ids}
    entries = (_entry(of, pairs, layers, by_run) for of in ("A", "dW"))
    return [entry for entry in entries if entry is not None]


@torch.no_grad()
def directions(run: TrainedRun, layers: Sequence[str], bases: BaseCache) -> Directions:
    """Return right-singular directions of A, of A as it was drawn, and of dW, the most important first.

    A zero matrix has none. A is that of LoRA and DoRA; VeRA's is frozen and the same in every run.
    """
    state = run.state()
    lora_only = not run.plan.full and all(run.plan.adapters[name].kind == "lora" for name in layers)
    frozen = None if lora_only else bases.weights(run)
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name in layers:
        update = layer_update(run, state, name, frozen)
        svds = {"dW": update.svd(frozen.weight(name) if frozen else None)}
        if "lora_A" in update.tensors and _starts_from_draw(run):
            svds["A"] = spectra.svd(update.tensors["lora_A"].flatten(1))
            svds["start"] = spectra.svd(initial_lora_a(run, state, name, bases).flatten(1))
        rows = {of: _leading_directions(svd) for of, svd in svds.items()}
        by_layer[name] = {of: V for of, V in rows.items() if len(V)}
    return by_layer


def _starts_from_draw(run: TrainedRun) -> bool:
    """Whether A was drawn at random. PiSSA's and OLoRA's is a part of W, and saved beside the change from it."""
    return run.saved.run.method.init not in FROM_WEIGHT


def initial_lora_a(run: TrainedRun, state: State, name: str, bases: BaseCache) -> Tensor:
    """Return lora_A as this run drew it before training, from its seed and the layer's name."""
    a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
    draw = embedding_start if bases.info(run).by_name[name].kind == "Embedding" else adapter_start
    return draw(run.plan.adapters[name], run.seed, name, tuple(a.shape), tuple(b.shape))[0]


def _leading_directions(svd: spectra.SVD) -> Tensor:
    rank = spectra.numerical_rank(svd.S, svd.U.shape[0], svd.Vh.shape[1])
    return svd.Vh[: min(MAX_DIRECTIONS, rank)]


def _entry(of: str, pairs: Pairs, layers: Sequence[str], by_run: Mapping[str, Directions]) -> dict[str, Any] | None:
    grids = _grids(of, pairs, layers, by_run)
    if not grids:
        return None
    starts = _grids("start", pairs, list(grids), by_run) if of == "A" else {}
    widths = {name: _width(of, pairs, name, by_run) for name in grids}
    n, m = (min(grid.shape[axis] for grid in grids.values()) for axis in (0, 1))
    i, j = (sorted({*(k for k in KEPT_SIZES if k <= size), size}) for size in (n, m))
    has_start = len(starts) == len(grids) and all(s.shape[0] >= n and s.shape[1] >= m for s in starts.values())
    return {
        "of": of,
        "i": i,
        "j": j,
        "phi": _mean_at(grids, i, j),
        "start": _mean_at(starts, i, j) if has_start else None,
        "inverse_width": fmean(1 / d for d in widths.values()),
        "layers": {
            name: {
                "first": float(grid[0, 0]),
                "all": float(grid[-1, -1]),
                "random": spectra.random_similarity(grid.shape[0], grid.shape[1], widths[name]),
                "start": float(starts[name][-1, -1]) if name in starts else None,
            }
            for name, grid in grids.items()
        },
    }


def _grids(of: str, pairs: Pairs, layers: Sequence[str], by_run: Mapping[str, Directions]) -> dict[str, Tensor]:
    """Return phi [n, m] of each layer that some pair has, the mean over the pairs that have it.

    n and m are the fewest directions of any pair.
    """
    grids = {}
    for name in layers:
        similarities = [
            spectra.subspace_similarity(by_run[a][name][of], by_run[b][name][of])
            for a, b in pairs
            if of in by_run[a][name] and of in by_run[b][name]
        ]
        if similarities:
            grids[name] = _mean(similarities)
    return grids


def _width(of: str, pairs: Pairs, name: str, by_run: Mapping[str, Directions]) -> int:
    return next(by_run[i][name][of].shape[1] for pair in pairs for i in pair if of in by_run[i][name])


def _mean_at(grids: Mapping[str, Tensor], i: Sequence[int], j: Sequence[int]) -> list[list[float]]:
    """Return the mean of the layers' grids at the sizes i and j, which count from 1."""
    mean = _mean(list(grids.values()))
    return mean[torch.tensor(i) - 1][:, torch.tensor(j) - 1].tolist()


def _mean(grids: Sequence[Tensor]) -> Tensor:
    """Return the mean of grids [n, m], each cut to the smallest."""
    n, m = (min(grid.shape[axis] for grid in grids) for axis in (0, 1))
    return torch.stack([grid[:n, :m] for grid in grids]).mean(0)
