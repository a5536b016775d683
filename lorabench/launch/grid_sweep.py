"""A sweep of grids: tune every cell at every rate, add rates where asked, then train the confirmation seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from lorabench.config.cells import cell_id
from lorabench.launch.command_line import sweep_words
from lorabench.launch.compose import LABELLED_AXES, RATE, SEED, Composer, is_remote, tune_seeds
from lorabench.launch.grid import Point, expand
from lorabench.sweep import phases

if TYPE_CHECKING:
    from lorabench.sweep.packs import Job

MAX_ADDED_RATES = 6  # per cell: a factor of 64 where rates double

OverrideSet = tuple[str, ...]


@dataclass(frozen=True)
class ListedCell:
    """A cell as the grids list it. extra: axes that tell it from other cells and that its label does not show."""

    point: Point
    extra: Mapping[str, str]


class NullLauncher(Launcher):
    """Stands in for a sweep's launcher and launches nothing: the sweep is listed only."""

    def setup(self, **kwargs: Any) -> None:
        pass

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        return []


class GridSweep:
    """One sweep. launcher: trains lists of override sets, or launches nothing where jobs are only listed."""

    def __init__(self, context: HydraContext, config: DictConfig, launcher: Launcher) -> None:
        self.config, self.launcher = config, launcher
        self.composer = Composer.shared(context, config)
        self.jobs: dict[OverrideSet, Job] = {}  # tuning runs, those of added rates too
        self.cells: dict[str, ListedCell] = {}  # by cell id

    def run(self, grids: Mapping[str, Any], params: Mapping[str, Any], arguments: Sequence[str]) -> list[Any]:
        """Run all phases and return what the launcher returned. Raises `ConfigError` before anything is trained.

        grids, params: the sweeper's settings. arguments: the command line's overrides.
        """
        points = expand(grids, params, arguments)
        self.tune_seeds = tune_seeds(self.config)
        is_tuning = self.config.sweep.role == "tune"
        self._list_tuning_jobs(points)
        from lorabench.sweep import declaration  # torch: not before all configs are known to be good
        from lorabench.sweep.execute import finish

        jobs = list(self.jobs.values())
        self.settings = jobs[0].settings
        phases.require_fresh(self.settings, {job.run.seed for job in jobs} if is_tuning else ())
        declaration.check_cells(jobs)
        phases.declare(jobs, sweep_words(self.config.hydra))
        returned = self._launch(self.jobs, first_index=0)
        if is_tuning and self.settings.sweep.dry_run and not isinstance(self.launcher, NullLauncher):
            from lorabench.sweep.dry_run import confirmation_line

            print(confirmation_line(jobs, self.settings, sweep_words(self.config.hydra)), file=sys.stderr)
        elif is_tuning and not self.settings.sweep.dry_run:
            if self.settings.sweep.extend_lr:
                returned += self._extend_rates()
            if self.settings.sweep.confirm_seeds:
                returned += self._confirm()
        if not is_remote(self.launcher):  # seconds of this machine would say nothing of a node's
            phases.measure_cells(self.settings, list(self.jobs.values()))
        finish(self.settings)
        return returned

    def _list_tuning_jobs(self, points: Sequence[Point]) -> None:
        listed: dict[OverrideSet, ListedCell] = {}
        for cell in _with_extras(points):
            for rate in cell.point.rates or (f"{RATE}={self.config.optimizer.lr}",):
                listed |= dict.fromkeys(self._override_sets(cell.point, [rate]), cell)
        for overrides, cell in listed.items():
            job = self.jobs[overrides] = self.composer.job(overrides, cell.extra)
            self.cells[cell_id(job.label)] = cell

    def _override_sets(self, point: Point, rates: Iterable[str]) -> list[OverrideSet]:
        """Return one override set for each rate (an override text) and tuning seed of a cell."""
        seeds = point.seeds or [f"{SEED}={seed}" for seed in self.tune_seeds]
        return [(*point.fixed, rate, seed, *self.composer.name_overrides) for rate in rates for seed in seeds]

    def _launch(self, jobs: Mapping[OverrideSet, Job], first_index: int) -> list[Any]:
        """Launch one override set a run: a run that belongs to two cells trains once."""
        sets = {job.run.run_id: list(overrides) for overrides, job in reversed(list(jobs.items()))}
        unique = dict.fromkeys(job.run.run_id for job in jobs.values())
        return list(self.launcher.launch([sets[run_id] for run_id in unique], first_index))

    def _extend_rates(self) -> list[Any]:
        """Tune one more rate outward in every cell whose best lies at an end, until none does."""
        tried: dict[str, set[float]] = {}
        for job in self.jobs.values():
            tried.setdefault(cell_id(job.label), set()).add(job.run.optimizer.lr)
        limits = {cell: len(rates) + MAX_ADDED_RATES for cell, rates in tried.items()}
        returned: list[Any] = []
        while outward := self._outward_rates(tried, limits):
            added: dict[OverrideSet, Job] = {}
            for cell, lr in outward.items():
                tried[cell].add(lr)
                listed = self.cells[cell]
                for overrides in self._override_sets(listed.point, [f"{RATE}={lr!r}"]):
                    added[overrides] = self.composer.job(overrides, listed.extra)
            phases.declare(list(added.values()))
            returned += self._launch(added, first_index=len(self.jobs))
            self.jobs |= added
        return returned

    def _outward_rates(self, tried: Mapping[str, set[float]], limits: Mapping[str, int]) -> dict[str, float]:
        rates = phases.outward_rates(self.settings, tried, limits)
        return {cell: lr for cell, lr in rates.items() if cell in self.cells}

    def _confirm(self) -> list[Any]:
        """Train fresh seeds of every cell at the rate that tuning chose there."""
        chosen = phases.chosen_rates(self.settings)
        jobs: dict[OverrideSet, Job] = {}
        for name, cell in self.cells.items():
            if name not in chosen:
                continue
            for seed in self.settings.sweep.confirm_seeds:
                rate_and_seed = (f"{RATE}={chosen[name]!r}", f"{SEED}={seed}")
                overrides = (*cell.point.fixed, *rate_and_seed, "sweep.role=confirm", *self.composer.name_overrides)
                jobs[overrides] = self.composer.job(overrides, cell.extra)
        if not jobs:
            return []
        phases.declare(list(jobs.values()))
        return self._launch(jobs, first_index=len(self.jobs))


def _with_extras(points: Sequence[Point]) -> list[ListedCell]:
    """Return the cells with the axes on which they differ beside what a method's own label shows."""
    values: dict[str, set[str]] = {}
    for point in points:
        for key, value in point.axes.items():
            values.setdefault(key, set()).add(value)
    shown = {key for key, different in values.items() if len(different) > 1} - LABELLED_AXES
    return [ListedCell(p, {key: value for key, value in p.axes.items() if key in shown}) for p in points]
