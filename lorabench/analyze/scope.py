"""What of a sweep is analysed: cells, their runs with weights, the layers of each, and the pairs of runs to compare.

Torch-free until a run is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.errors import ConfigError
from lorabench.store.records import Store

if TYPE_CHECKING:
    from lorabench.analyze.deltas import Bases, Opened
    from lorabench.results.cells import Result

PAIRS = 3  # of runs, a comparison


@dataclass(frozen=True)
class Asked:
    """What of a sweep is analysed. cells: ids; layers: names or their ends; both may hold * and ?; empty: all."""

    cells: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    intruders: bool = True


@dataclass(frozen=True)
class Comparison:
    """Pairs of runs whose subspaces are compared: the seeds of one cell, or two ranks of one series at other seeds."""

    kind: str  # seeds, ranks
    cells: tuple[str, str]
    pairs: tuple[tuple[str, str], ...]


@dataclass
class Source:
    """The runs behind the cells, opened, and why others are left out."""

    runs: dict[str, Opened] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def opened(sweep_dir: str | Path, every: Mapping[str, Result], chosen: Mapping[str, Result]) -> Source:
    """The chosen cells' runs, and those of other adapter cells: their layers are what full fine-tuning is measured on.

    Raises `ConfigError` where no run of the chosen cells has weights.
    """
    from lorabench.analyze.deltas import open_weights

    store, source = Store(sweep_dir), Source()
    for r in every.values():
        for run in r.runs if r.id in chosen or r.cell.adapter else ():
            try:
                source.runs[run.run_id] = open_weights(store.run_dir(run.run_id))
            except ConfigError as e:
                if r.id in chosen:
                    source.left_out[run.run_id] = e.allowed
    if not {x.run_id for r in chosen.values() for x in r.runs} & set(source.runs):
        told = next(iter(source.left_out.values()), "no cell has a finished run at its chosen rate")
        raise ConfigError(
            "sweep dir", str(sweep_dir), f"a sweep whose finished runs kept what they trained; asked for: {told}"
        )
    return source


def layers(source: Source, chosen: Mapping[str, Result], patterns: Sequence[str], bases: Bases) -> dict[str, list[str]]:
    """The layers of each chosen run. Full fine-tuning: those that adapters of the sweep train, else all linear ones.

    Raises `ConfigError` for a pattern that matches none.
    """
    adapted: dict[str, dict[str, None]] = {}
    for o in source.runs.values():
        adapted.setdefault(o.base_key, {}).update(dict.fromkeys(o.plan.adapters))
    wanted: dict[str, list[str]] = {}
    for run_id in dict.fromkeys(x.run_id for r in chosen.values() for x in r.runs if x.run_id in source.runs):
        o = source.runs[run_id]
        wanted[run_id] = list((adapted[o.base_key] or bases.linear_layers(o)) if o.plan.full else o.plan.adapters)
    names = list(dict.fromkeys(name for those in wanted.values() for name in those))
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            ends = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise ConfigError("--layers", pattern, f"layers that were trained, by name or its end: {ends}")
    if patterns:
        wanted = {i: [n for n in those if any(_matches(n, p) for p in patterns)] for i, those in wanted.items()}
    return wanted


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def comparisons(results: Sequence[Result], having: set[str]) -> list[Comparison]:
    """Within each cell between seeds; along a rank axis every rank against the largest, never at one and the same seed:
    there the smaller A starts as the first rows of the larger, and phi is 1 before training. having: run_ids measured."""
    runs = {r.id: [x for x in r.runs if x.run_id in having] for r in results}
    made = []
    for r in results:
        near = sorted(combinations(range(len(runs[r.id])), 2), key=lambda pair: (pair[1] - pair[0], pair))
        pairs = [(runs[r.id][a].run_id, runs[r.id][b].run_id) for a, b in near]
        made.append(Comparison("seeds", (r.id, r.id), tuple(pairs[:PAIRS])))
    for r in results:
        series = [o for o in results if o.cell.adapter and o.cell.series == r.cell.series]
        top = max(series, key=lambda o: o.cell.r or 0, default=r)
        if r.cell.adapter and (r.cell.r or 0) < (top.cell.r or 0):
            made.append(Comparison("ranks", (r.id, top.id), tuple(_other_seeds(runs[r.id], runs[top.id]))))
    return [c for c in made if c.pairs]


def _other_seeds(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[str, str]]:
    """Pairs of runs of two cells at different seeds, each run once while that lasts."""
    pairs = [(x, b[(k + shift) % len(b)]) for shift in range(1, len(b) + 1) for k, x in enumerate(a)]
    return [(x.run_id, y.run_id) for x, y in pairs if x.config["seed"] != y.config["seed"]][:PAIRS]
