"""A sweep that Optuna steers: trials train as tuning runs, then the best trial's cell is confirmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from lorabench.config.cells import cell_id
from lorabench.config.errors import ConfigError
from lorabench.launch.compose import LABELLED_AXES, RATE, SEED, Composer, is_remote, tune_seeds
from lorabench.launch.optuna_space import parse_space
from lorabench.launch.optuna_study import Drawn, OptunaStudy, StudySettings
from lorabench.runtime.terminal import say
from lorabench.store.records import Store
from lorabench.sweep import phases

if TYPE_CHECKING:
    from lorabench.sweep.packs import Job


@dataclass(frozen=True)
class Trial:
    """number: in the study. override_sets: one a tuning seed. jobs: the same sets, composed."""

    number: int
    override_sets: list[tuple[str, ...]]
    jobs: list[Job]


class OptunaSearch:
    """The search of one sweep. settings: the sweeper's. arguments: the command line's overrides.

    Raises `ConfigError` for settings that cannot be searched, after the space's first corner was checked as a run.
    """

    def __init__(
        self, context: HydraContext, config: DictConfig, settings: Mapping[str, Any], arguments: Sequence[str]
    ) -> None:
        self.composer = Composer.shared(context, config)
        for name in ("n_trials", "n_jobs"):
            if settings[name] < 1:
                raise ConfigError(f"hydra.sweeper.{name}", settings[name], "at least 1")
        self.batch_size: int = settings["n_jobs"]
        self.space = parse_space(settings["params"], arguments)
        if SEED in self.space.axes:
            raise ConfigError(SEED, "swept", "a trial's seeds are sweep.tune_seeds; a seed is not searched for")
        self.seeds = tune_seeds(config)
        corner = self._trial(Drawn(-1, self.space.corner())).jobs
        self.run_config, self.settings = corner[0].run, corner[0].settings
        phases.require_fresh(self.settings)
        from lorabench.sweep.execute import check_all  # torch: not before the configs are known to be good

        check_all(corner)
        self.store = Store(self.settings.sweep.dir)
        self.store.check_foreign()
        self.trials: dict[int, Trial] = {}  # reported by this launcher
        task, sweep = self.run_config.task, self.settings.sweep
        self.study = OptunaStudy(
            self.store,
            self.space,
            StudySettings(settings["n_trials"], settings["sampler"], settings["seed"], sweep.retry_failed),
            metric=task.metric,
            lower_is_better=task.metric in task.lower_is_better,
            in_memory=bool(sweep.dry_run),
        )

    def run(self, launcher: Launcher) -> list[Any]:
        """Train batches until the study is complete, then confirm the best cell; return what the launcher returned.

        A dry run launches the first batch only, from a study in memory.
        """
        if self.settings.sweep.dry_run:
            return list(launcher.launch(_unique_sets(self._next_batch()), 0))
        returned: list[Any] = []
        while batch := self._next_batch():
            returned += launcher.launch(_unique_sets(batch), len(returned))
            self._report(batch)
        if confirmation := self._confirmation():
            returned += launcher.launch(confirmation, len(returned))
        self._finish(measure_alone=not is_remote(launcher))
        return returned

    def _trial(self, drawn: Drawn) -> Trial:
        sets = [(*drawn.overrides, f"{SEED}={seed}", *self.composer.name_overrides) for seed in self.seeds]
        values = dict(o.split("=", 1) for o in drawn.overrides)
        shown = self.space.axes.keys() - LABELLED_AXES - {RATE}
        extra = {key: value for key, value in values.items() if key in shown}
        return Trial(drawn.number, sets, [self.composer.job(overrides, extra) for overrides in sets])

    def _next_batch(self) -> list[Trial]:
        batch = [self._trial(drawn) for drawn in self.study.ask(self.batch_size)]
        if batch:
            phases.declare([job for trial in batch for job in trial.jobs])
        return batch

    def _report(self, batch: Sequence[Trial]) -> None:
        for trial in batch:
            self.study.report(trial.number, [self.store.read(job.run.run_id) for job in trial.jobs])
            self.trials[trial.number] = trial

    def _best_trial(self) -> tuple[Trial, float] | None:
        best = self.study.best()
        if best is None:
            return None
        drawn, value = best
        return self.trials.get(drawn.number) or self._trial(drawn), value

    def _confirmation(self) -> list[list[str]]:
        """Return override sets of fresh seeds for the best trial's cell, at the rate that tuning chose there."""
        seeds = self.settings.sweep.confirm_seeds
        if not seeds or self.settings.sweep.role != "tune" or (best := self._best_trial()) is None:
            return []
        trial, _ = best
        label = trial.jobs[0].label
        lr = phases.chosen_rates(self.settings).get(cell_id(label))
        if lr is None:
            return []
        fixed = [o for o in trial.override_sets[0] if o.split("=", 1)[0] not in (RATE, SEED)]
        sets = [(*fixed, f"{RATE}={lr!r}", f"{SEED}={seed}", "sweep.role=confirm") for seed in seeds]
        phases.declare([self.composer.job(overrides, label["extra"]) for overrides in sets])
        return [list(overrides) for overrides in sets]

    def _finish(self, *, measure_alone: bool) -> None:
        from lorabench.sweep.execute import finish

        if (best := self._best_trial()) is not None:
            trial, value = best
            tried = " ".join(o for o in trial.override_sets[0] if o.split("=", 1)[0] in self.space.axes)
            say(f"best of {self.study.size} trials: {tried}: {self.run_config.task.metric} {value:.4g}")
            if measure_alone:
                phases.measure_cells(self.settings, trial.jobs)
        finish(self.settings)


def _unique_sets(batch: Sequence[Trial]) -> list[list[str]]:
    """Return one override set a run: two trials may come to the same run."""
    pairs = [(job.run.run_id, o) for trial in batch for job, o in zip(trial.jobs, trial.override_sets, strict=True)]
    return [list(overrides) for overrides in dict(reversed(pairs)).values()]
