"""Subspace similarity between finished runs: phi of A and of dW, beside its value before training.

phi is averaged over layers and pairs of runs; a few values a layer are kept too. The directions are right-singular
ones, of the input side. Source: the LoRA paper (arXiv 2106.09685), sections 7.2 and 7.3.
Shape letters: n and m numbers of directions, d their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lorabench.adapters import init as draw
from lorabench.adapters.variants import FROM_WEIGHT
from lorabench.analyze import spectra
from lorabench.analyze.deltas import Bases, Opened, State, trained

MOST = 64  # directions of one matrix that are compared
SHOWN = (*range(1, 9), 10, 12, 16, 20, 24, 32, 40, 48, 64)  # i and j that are kept; the largest of all is added
Pairs = Sequence[tuple[str, str]]  # run_ids
Directions = Mapping[str, Mapping[str, Tensor]]  # layer -> "A", "start" or "dW" -> [n, d], orthonormal rows


@torch.no_grad()
def directions(opened: Opened, layers: Sequence[str], bases: Bases) -> Directions:
    """Right-singular directions of A, of A as it was drawn, and of dW, the most important first; a zero matrix has none.

    A: of LoRA and DoRA; VeRA's is frozen and the same in every run.
    """
    state = opened.state()
    plain = not opened.plan.full and all(opened.plan.adapters[name].kind == "lora" for name in layers)
    frozen = None if plain else bases.of(opened)
    made: dict[str, dict[str, Tensor]] = {}
    for name in layers:
        own = trained(opened, state, name, frozen)
        found = {"dW": own.svd(frozen.weight(name) if frozen else None)}
        if "lora_A" in own.own and _drawn(opened):
            drawn = start(opened, state, name, bases)
            found |= {"A": spectra.svd(own.own["lora_A"].flatten(1)), "start": spectra.svd(drawn.flatten(1))}
        rows = {of: _rows(svd) for of, svd in found.items()}
        made[name] = {of: V for of, V in rows.items() if len(V)}
    return made


def _drawn(opened: Opened) -> bool:
    """Whether A started from a draw: PiSSA's and OLoRA's is a part of W, and saved beside the change from it."""
    return opened.saved.run.method.init not in FROM_WEIGHT


def start(opened: Opened, state: State, name: str, bases: Bases) -> Tensor:
    """lora_A as this run drew it before training, from its seed and the layer's name."""
    a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
    embedding = bases.info(opened).by_name[name].kind == "Embedding"
    drawn = draw.embedding_start if embedding else draw.adapter_start
    return drawn(opened.plan.adapters[name], opened.seed, name, tuple(a.shape), tuple(b.shape))[0]


def _rows(found: spectra.SVD) -> Tensor:
    return found.Vh[: min(MOST, spectra.numerical_rank(found.S, found.U.shape[0], found.Vh.shape[1]))]


def compare(pairs: Pairs, layers: Sequence[str], runs: Mapping[str, Opened], bases: Bases) -> list[dict[str, Any]]:
    """phi over these pairs of runs: one entry of A, where both have one, and one of dW.

    {"of": "A", "i": [..], "j": [..], "phi": [[..]], "start": [[..]] or None, "inverse_width": mean of 1 / d,
    "layers": {name: {"first": phi(1, 1), "all": phi(n, m), "random": its random baseline, "start": its start}}}
    """
    made = {
        run_id: directions(runs[run_id], layers, bases) for run_id in dict.fromkeys(i for pair in pairs for i in pair)
    }
    found = (_entry(of, pairs, layers, made) for of in ("A", "dW"))
    return [entry for entry in found if entry is not None]


def _entry(of: str, pairs: Pairs, layers: Sequence[str], made: Mapping[str, Directions]) -> dict[str, Any] | None:
    grids = {name: grid for name in layers if (grid := _grid(of, pairs, name, made)) is not None}
    if not grids:
        return None
    starts = {name: grid for name in grids if of == "A" and (grid := _grid("start", pairs, name, made)) is not None}
    widths = {
        name: next(made[i][name][of].shape[1] for pair in pairs for i in pair if of in made[i][name]) for name in grids
    }
    n, m = (min(grid.shape[axis] for grid in grids.values()) for axis in (0, 1))
    i, j = (sorted({*(k for k in SHOWN if k <= size), size}) for size in (n, m))
    whole = len(starts) == len(grids) and all(s.shape[0] >= n and s.shape[1] >= m for s in starts.values())
    return {
        "of": of, "i": i, "j": j, "phi": _shown(grids, i, j), "start": _shown(starts, i, j) if whole else None,
        "inverse_width": fmean(1 / d for d in widths.values()),
        "layers": {
            name: {
                "first": float(grid[0, 0]), "all": float(grid[-1, -1]), "random": spectra.random_similarity(grid.shape[0], grid.shape[1], widths[name]),
                "start": float(starts[name][-1, -1]) if name in starts else None,
            }
            for name, grid in grids.items()
        },
    }  # fmt: skip


def _grid(of: str, pairs: Pairs, name: str, made: Mapping[str, Directions]) -> Tensor | None:
    """phi [n, m] of one layer, the mean over the pairs that have it; n and m are the fewest directions of any pair."""
    found = [
        spectra.subspace_similarity(made[a][name][of], made[b][name][of])
        for a, b in pairs
        if of in made[a][name] and of in made[b][name]
    ]
    return _mean(found) if found else None


def _shown(grids: Mapping[str, Tensor], i: Sequence[int], j: Sequence[int]) -> list[list[float]]:
    mean = _mean(list(grids.values()))
    return mean[torch.tensor(i) - 1][:, torch.tensor(j) - 1].tolist()


def _mean(grids: Sequence[Tensor]) -> Tensor:
    n, m = (min(grid.shape[axis] for grid in grids) for axis in (0, 1))
    return torch.stack([grid[:n, :m] for grid in grids]).mean(0)
