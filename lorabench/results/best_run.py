"""The one run that stands for a whole sweep: of its recommended cell, the confirmation run that validation puts first."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorabench.config.errors import ConfigError
from lorabench.results import formatting
from lorabench.results.cells import Result
from lorabench.results.findings import Findings, find
from lorabench.results.formatting import plural
from lorabench.results.sweep import load
from lorabench.store.records import Record

PLACE = "a sweep's directory, or a run's, <sweep>/runs/<run_id>"


@dataclass(frozen=True)
class BestRun:
    """A run's directory. why: what was chosen and by what, in words; None where the run itself was named."""

    path: Path
    why: str | None = None


def best_run(path: str | Path, cell: str | None = None) -> BestRun:
    """Return the run at `path`: a run's directory as it is, of a sweep's directory its best run.

    The cell is the one asked for (an id, or a name as tables show it), else the recommended one, else the best adapter
    of the tuning runs. Of its confirmation runs at the chosen rate, validation chooses; test results are not looked at. Only
    runs whose weights are there count. Raises `ConfigError` for an unknown cell, one without such a run, and a `cell`
    beside a single run.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError("run", str(path), f"{PLACE}; there is no such directory")
    if not ((path / "sweep.json").is_file() or (path / "runs").is_dir()):
        if cell is not None:
            raise ConfigError("--cell", cell, f"with a sweep's directory; {path} is none")
        return BestRun(path)
    found = find(load(path))
    chosen, reason = _named_cell(found, cell) if cell is not None else _default_cell(found)
    with_weights = [r for r in chosen.runs if _has_weights(found.sweep.store.run_dir(r.run_id))]
    if not with_weights:
        raise ConfigError("--cell" if cell else "sweep dir", cell or str(path), _nothing_to_take(found, chosen))
    run = min(with_weights, key=lambda r: (_worse(found, r), r.config["seed"], r.run_id))
    why = f"{chosen.name} ({reason}), run {run.run_id}, seed {run.config['seed']}: {_place(found, chosen, run)}"
    return BestRun(found.sweep.store.run_dir(run.run_id), why)


def _named_cell(f: Findings, cell: str) -> tuple[Result, str]:
    named = [r for r in f.results.values() if cell in (r.id, r.name)]
    if len(named) != 1:
        raise ConfigError("--cell", cell, f"a cell of this sweep: {_listed(f.results)}")
    return named[0], "as asked"


def _default_cell(f: Findings) -> tuple[Result, str]:
    if f.recommendation and f.recommendation.cell:
        return f.results[f.recommendation.cell], "the recommended cell"
    if f.best:
        return f.results[f.best], "nothing is recommended; the best adapter of the tuning runs"
    ran = [r for r in f.results.values() if r.runs]
    if not ran:
        raise ConfigError("sweep dir", str(f.sweep.store.root), "a sweep in which the rates of a cell have all ended")
    best = min(ran, key=lambda r: (math.inf if r.tuned is None else r.tuned, r.id))
    return best, "nothing is recommended; the best cell of the tuning runs" if len(
        ran
    ) > 1 else "the only cell with runs"


def _has_weights(run_dir: Path) -> bool:
    return any((run_dir / name).is_dir() for name in ("adapter", ".adapter.old"))


def _worse(f: Findings, run: Record) -> float:
    value = run.metrics.get(f"val/{f.sweep.selection}")
    return math.inf if value is None else f.sweep.worse(float(value))


def _place(f: Findings, chosen: Result, run: Record) -> str:
    """Return by what a run was chosen, and among how many."""
    runs = plural(len(chosen.runs), "confirmation run" if chosen.role == "confirm" else "tuning run")
    value = run.metrics.get(f"val/{f.sweep.selection}")
    score = "" if value is None else f" ({float(value):.4g})"
    metric = formatting.TITLES.get(f.sweep.selection, f.sweep.selection)
    text = f"of {runs} the best by validation {metric}{score}" if len(chosen.runs) > 1 else f"of {runs}"
    return text + ("" if chosen.role == "confirm" else "; no confirmation run has ended, so it chose its own rate")


def _nothing_to_take(f: Findings, chosen: Result) -> str:
    others = [r.id for r in f.results.values() if any(_has_weights(f.sweep.store.run_dir(x.run_id)) for x in r.runs)]
    elsewhere = f"; --cell takes another: {_listed(others)}" if others else ""
    if not chosen.runs:
        return f"a cell with a completed run; {chosen.id} has none yet{elsewhere}"
    why = "trainer.save_weights was false, they were deleted, or this is a copy without them (lorabench.slim)"
    return f"a cell whose runs kept their weights (adapter/); {chosen.id} has none: {why}{elsewhere}"


def _listed(cells: Iterable[str]) -> str:
    return ", ".join(cells)
