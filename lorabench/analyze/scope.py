"""What of a sweep is analysed: cells, their runs with weights, the layers of each, and the pairs of runs to compare.

Torch is imported when the first run is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.errors import ConfigError, UntrustedFile
from lorabench.store.records import Store

if TYPE_CHECKING:
    from lorabench.analyze.deltas import BaseCache, TrainedRun
    from lorabench.results.cells import Result

MAX_PAIRS = 3  # of runs, for each comparison of subspaces


@dataclass(frozen=True)
class WeightsRequest:
    """What of a sweep to measure. cells: ids; layers: names or their ends; both may hold * and ?; empty: all."""

    cells: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    intruders: bool = True
    trust: bool = False  # whether Python files that records name may run


@dataclass(frozen=True)
class SimilarityPairs:
    """Pairs of runs whose subspaces are compared: the seeds of one cell, or two ranks of one series at other seeds."""

    kind: str  # seeds, ranks
    cells: tuple[str, str]
    pairs: tuple[tuple[str, str], ...]  # run_ids


@dataclass
class TrainedRuns:
    """The runs behind the cells by run_id, opened, and why others are left out."""

    runs: dict[str, TrainedRun] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def open_runs(
    sweep_dir: str | Path, results: Mapping[str, Result], chosen: Mapping[str, Result], *, trust: bool = False
) -> TrainedRuns:
    """Open the chosen cells' runs, and those of other adapter cells.

    Full fine-tuning is measured on the layers that adapters train, so theirs are needed too. Raises `ConfigError` where
    no run of the chosen cells has weights, and `UntrustedFile` as `open_run` does.
    """
    from lorabench.analyze.deltas import open_trained_run

    store, source = Store(sweep_dir), TrainedRuns()
    for result in results.values():
        for run in result.runs if result.id in chosen or result.cell.adapter else ():
            try:
                source.runs[run.run_id] = open_trained_run(store.run_dir(run.run_id), trust=trust)
            except UntrustedFile:
                raise
            except ConfigError as e:
                if result.id in chosen:
                    source.left_out[run.run_id] = e.allowed
    if not {run.run_id for result in chosen.values() for run in result.runs} & set(source.runs):
        reason = next(iter(source.left_out.values()), "no cell has a finished run at its chosen rate")
        allowed = f"a sweep whose finished runs kept what they trained; asked for: {reason}"
        raise ConfigError("sweep dir", str(sweep_dir), allowed)
    return source


def layers_by_run(
    source: TrainedRuns, chosen: Mapping[str, Result], patterns: Sequence[str], bases: BaseCache
) -> dict[str, list[str]]:
    """Return the layers of each chosen run, by run_id.

    Full fine-tuning has those that adapters of the sweep train, else all linear ones. Raises `ConfigError` for a
    pattern that matches none.
    """
    adapted: dict[str, dict[str, None]] = {}  # base -> layers, in order
    for run in source.runs.values():
        adapted.setdefault(run.base_key, {}).update(dict.fromkeys(run.plan.adapters))
    wanted: dict[str, list[str]] = {}
    for run_id in (x.run_id for result in chosen.values() for x in result.runs):
        if run_id not in source.runs:
            continue
        run = source.runs[run_id]
        if run.plan.full:
            wanted[run_id] = list(adapted[run.base_key] or bases.linear_layers(run))
        else:
            wanted[run_id] = list(run.plan.adapters)
    _check_patterns(patterns, {name for names in wanted.values() for name in names})
    if patterns:
        wanted = {i: [n for n in names if any(_matches(n, p) for p in patterns)] for i, names in wanted.items()}
    return wanted


def _check_patterns(patterns: Sequence[str], names: set[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            ends = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise ConfigError("--layers", pattern, f"layers that were trained, by name or its end: {ends}")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def pairs_to_compare(results: Sequence[Result], run_ids: set[str]) -> list[SimilarityPairs]:
    """Return the pairs of runs to compare: within each cell between seeds, and every rank with the largest of its
    series.

    Ranks are never compared at one and the same seed. There the smaller A starts as the first rows of the larger, and
    phi is 1 before training. run_ids: the runs that were measured.
    """
    runs = {result.id: [x for x in result.runs if x.run_id in run_ids] for result in results}
    comparisons = [SimilarityPairs("seeds", (r.id, r.id), tuple(_seed_pairs(runs[r.id]))) for r in results]
    for r in results:
        series = [other for other in results if other.cell.adapter and other.cell.series == r.cell.series]
        top = max(series, key=lambda other: other.cell.r or 0, default=r)
        if r.cell.adapter and (r.cell.r or 0) < (top.cell.r or 0):
            pairs = _pairs_of_other_seeds(runs[r.id], runs[top.id])
            comparisons.append(SimilarityPairs("ranks", (r.id, top.id), tuple(pairs)))
    return [comparison for comparison in comparisons if comparison.pairs]


def _seed_pairs(runs: Sequence[Any]) -> list[tuple[str, str]]:
    """Return pairs of runs of one cell, neighbours first."""
    places = sorted(combinations(range(len(runs)), 2), key=lambda pair: (pair[1] - pair[0], pair))
    return [(runs[a].run_id, runs[b].run_id) for a, b in places[:MAX_PAIRS]]


def _pairs_of_other_seeds(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[str, str]]:
    """Return pairs of runs of two cells at different seeds; no run stands twice while there are others."""
    pairs = [(x, b[(k + shift) % len(b)]) for shift in range(1, len(b) + 1) for k, x in enumerate(a)]
    return [(x.run_id, y.run_id) for x, y in pairs if x.config["seed"] != y.config["seed"]][:MAX_PAIRS]
