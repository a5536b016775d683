"""An Optuna study over a sweep: trials as jobs, records as what they are told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import optuna
from hydra.types import HydraContext
from omegaconf import DictConfig
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock, get_lock_file
from optuna.trial import TrialState

from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.launch.compose import Composer, tune_seeds
from lorabench.launch.optuna_space import space
from lorabench.runtime.files import name_unwritable
from lorabench.runtime.leases import Leases
from lorabench.store.records import Record, Store
from lorabench.sweep import phases

RATE, SEED = "optimizer.lr", "seed"
# What a cell's own label says already; any other axis is named beside it.
LABELLED = (RATE, "method", "method.r", "method.alpha", "method.target_modules", "method.use_rslora")


def _tpe(seed: int | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # trials of a batch keep their distance


@dataclass
class Trial:
    """number: Optuna's. overrides: one set a tuning seed. jobs: the same, composed."""

    number: int
    overrides: list[tuple[str, ...]]
    jobs: list[Any]


class Search:
    """The study of one sweep. Its journal lies in the sweep's directory, so the same command goes on with it."""

    again: set[int] | None = None  # trials that had failed before, to be asked for once more
    SAMPLERS: ClassVar[Mapping[str, Callable[[int | None], Any]]] = {
        "tpe": _tpe,
        "random": optuna.samplers.RandomSampler,
    }

    def __init__(
        self, context: HydraContext, config: DictConfig, settings: Mapping[str, Any], arguments: Sequence[str]
    ) -> None:
        self.composer, self.options = Composer.of(context, config), settings
        for name in ("n_trials", "n_jobs"):
            if settings[name] < 1:
                raise ConfigError(f"hydra.sweeper.{name}", settings[name], "at least 1")
        self.space = space(settings["params"], arguments)
        if SEED in self.space.axes:
            raise ConfigError(SEED, "swept", "a trial's seeds are sweep.tune_seeds; a seed is not searched for")
        self.always = () if config.sweep.name else (f"sweep.name={self.composer.name}",)
        self.seeds = tune_seeds(config)
        from lorabench.sweep import execute as sweep

        corner = self._trial(-1, self.space.corner()).jobs
        self.run, self.settings = corner[0].run, corner[0].settings
        phases.require_fresh(self.settings)
        sweep.check_all(corner)
        self.store = Store(self.settings.sweep.dir)
        self.store.check_foreign()
        self.dry_run = bool(self.settings.sweep.dry_run)
        self.kept: dict[int, Trial] = {}
        self.study = self._opened()

    def _opened(self) -> Any:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        lower = self.run.task.metric in self.run.task.lower_is_better
        name = self.options["sampler"]
        if name not in self.SAMPLERS:
            raise ConfigError("hydra.sweeper.sampler", name, f"allowed: {', '.join(self.SAMPLERS)}")
        study = optuna.create_study(
            storage=None if self.dry_run else _journal(self.store), study_name="lorabench", direction="minimize" if lower else "maximize", load_if_exists=True,
        )  # fmt: skip
        if (study.direction.name == "MINIMIZE") != lower:
            allowed = f"its study does not {'minimize' if lower else 'maximize'} {self.run.task.metric}"
            raise ExistingWork("sweep.dir", str(self.store.root), allowed)
        return study

    def _ask(self, number: int) -> Any:
        """A trial drawn from the seed and its number: a study that is cut and goes on must not draw its first trials again."""
        seed = self.options["seed"]
        own = None if seed is None else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        self.study.sampler = self.SAMPLERS[self.options["sampler"]](own)
        return self.study.ask(dict(self.space.axes))

    def _unfinished(self) -> tuple[list[Trial], int]:
        """Trials that were asked for and never told, by this launcher or another one, and how many are left to ask for. One
        that failed before this launcher came is asked for again where failed runs are retried, and one that was cut while it
        was drawn is none."""
        pending, told, trials = [], 0, self.study.get_trials(deepcopy=False)
        drawn = {t.number for t in trials if t.params.keys() == self.space.axes.keys()}
        if self.again is None:
            retried = self.settings.sweep.retry_failed
            self.again = {n for n in drawn if retried and trials[n].state == TrialState.FAIL}
            tried = [t.params or t.system_attrs.get("fixed_params") for t in trials if t.state != TrialState.FAIL]
            for params in (trials[n].params for n in sorted(self.again)):
                if params not in tried:  # nor again once that went well, or is under way
                    self.study.enqueue_trial(params)
                    tried.append(params)
        for t in trials:
            if t.state == TrialState.RUNNING and t.number in drawn:
                pending.append(self._trial(t.number, self.space.overrides(t.params)))
            elif t.state == TrialState.RUNNING:  # cut while it was drawn, or of another space
                self.study.tell(t.number, state=TrialState.FAIL)
            told += t.state != TrialState.WAITING and t.number in drawn - self.again
        return pending, max(0, self.options["n_trials"] - told)

    def _trial(self, number: int, overrides: Sequence[str]) -> Trial:
        sets = [(*overrides, f"{SEED}={seed}", *self.always) for seed in self.seeds]
        shown = [o.split("=", 1) for o in overrides]
        extra = {k: v for k, v in shown if k in self.space.axes and k not in LABELLED}
        return Trial(number, sets, [self.composer.job(o, extra) for o in sets])

    def ask(self) -> list[Trial]:
        """The next batch: first what was asked for before a launcher was killed, or by one beside this one. Empty when the study
        is complete."""
        most = self.options["n_jobs"]
        alone: AbstractContextManager[Any] = nullcontext() if self.dry_run else self.store.leases.wait("optuna")
        with alone:  # another may be asking, too
            pending, left = self._unfinished()
            batch = pending[:most]
            try:
                drawn = len(self.study.get_trials(deepcopy=False))
                asked = [self._ask(drawn + i) for i in range(min(left, most - len(batch)))]
            except ValueError as e:
                raise ExistingWork("sweep.dir", str(self.store.root), f"its study searches another space ({e})") from e
        batch += [self._trial(t.number, self.space.overrides(t.params)) for t in asked]
        if batch:
            phases.declare([job for trial in batch for job in trial.jobs])
        return batch

    def preview(self) -> list[list[str]]:
        """The first batch, from a study in memory."""
        return self.override_sets(self.ask())

    def override_sets(self, batch: Sequence[Trial]) -> list[list[str]]:
        """One a run: two trials may come to the same one."""
        pairs = [(job.run.run_id, o) for t in batch for job, o in zip(t.jobs, t.overrides, strict=True)]
        return [list(o) for o in dict(reversed(pairs)).values()]

    def tell(self, batch: Sequence[Trial]) -> None:
        """A trial's value; PRUNED for one that diverged, was pruned or has none, FAIL for one that failed."""
        for trial in batch:
            records = [self.store.read(job.run.run_id) for job in trial.jobs]
            state, value = told(records)
            self.study.tell(trial.number, value, state=state, skip_if_finished=True)
            self.kept[trial.number] = trial

    def _best(self) -> Trial | None:
        done = [t for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        if not done:
            return None
        best = self.study.best_trial
        return self.kept.get(best.number) or self._trial(best.number, self.space.overrides(best.params))

    def confirmation(self) -> list[list[str]]:
        """Fresh seeds for the best trial's cell, at the rate which tuning chose there."""
        seeds, best = self.settings.sweep.confirm_seeds, self._best()
        if not seeds or best is None or self.settings.sweep.role != "tune":
            return []
        from lorabench.sweep.packs import cell_id

        lr = phases.chosen_rates(self.settings).get(cell_id(best.jobs[0].label))
        if lr is None:
            return []
        base = [o for o in best.overrides[0] if o.split("=", 1)[0] not in (RATE, SEED)]
        sets = [(*base, f"{RATE}={lr!r}", f"{SEED}={seed}", "sweep.role=confirm") for seed in seeds]
        phases.declare([self.composer.job(o, best.jobs[0].label["extra"]) for o in sets])
        return [list(o) for o in sets]

    def finish(self, *, solo: bool) -> None:
        from lorabench.sweep import execute as sweep

        if (best := self._best()) is not None:
            found = " ".join(o for o in best.overrides[0] if o.split("=", 1)[0] in self.space.axes)
            print(
                f"best of {len(self.study.trials)} trials: {found}: {self.run.task.metric} {self.study.best_value:.4g}"
            )
            if solo:
                phases.measure_cells(self.settings, best.jobs)
        sweep.finish(self.settings)


def _journal(store: Store) -> optuna.storages.JournalStorage:
    """The study's journal; its last line goes where the disk was full, or the power gone, before it was whole."""
    path, lock = store.root / "optuna" / "journal", _Lock(store.leases)
    with name_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path), lock)
        with get_lock_file(lock), open(path, "r+b") as f:
            raw = f.read()
            if whole := len(raw) - raw.rfind(b"\n") - 1:
                f.truncate(len(raw) - whole)
    try:
        return optuna.storages.JournalStorage(backend)
    except ValueError as e:
        allowed = f"a whole journal of a study ({e}); moved away, another study begins"
        raise ExistingWork("sweep.dir", str(path), allowed) from e


class _Lock(BaseJournalFileLock):
    """The journal's lock as a lease, which ends with its holder. Optuna's own outlives a killed one: it is a link to a path that,
    being relative, leads nowhere from where the link is, and then it waits without end."""

    def __init__(self, leases: Leases) -> None:
        self.leases = leases

    def acquire(self) -> bool:
        self.lease = self.leases.wait("journal")
        return True

    def release(self) -> None:
        self.lease.release()


def told(records: Sequence[Record | None]) -> tuple[TrialState, float | None]:
    """What a trial's records, one a seed, come to."""
    statuses = {"failed" if r is None else r.status for r in records}
    if "failed" in statuses:
        return TrialState.FAIL, None
    values = [r.metrics[f"val/{r.metrics['primary']}"] for r in records if r and r.status == "completed"]
    if statuses != {"completed"} or None in values:
        return TrialState.PRUNED, None
    return TrialState.COMPLETE, fmean(map(float, values))
