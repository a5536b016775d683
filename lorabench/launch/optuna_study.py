"""An Optuna study whose journal lies in the sweep's directory, so that every launcher of the sweep goes on with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock, get_lock_file
from optuna.trial import TrialState

from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.launch.optuna_space import Space
from lorabench.runtime.files import name_unwritable
from lorabench.runtime.leases import Leases
from lorabench.store.records import Record, Store


def _tpe(seed: int | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # trials of a batch keep their distance


SAMPLERS: Mapping[str, Callable[[int | None], Any]] = {"tpe": _tpe, "random": optuna.samplers.RandomSampler}


@dataclass(frozen=True)
class Drawn:
    """A trial's number in the study and what it tries, as override texts without a seed."""

    number: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class StudySettings:
    """How a study is run. n_trials: of the whole study. seed: of the sampler; None draws differently each time."""

    n_trials: int
    sampler: str
    seed: int | None
    retry_failed: bool = False


class OptunaStudy:
    """The trials of one sweep. in_memory: nothing is read or written, for a dry run.

    Raises `ConfigError` for an unknown sampler, `ExistingWork` for a study that optimises in the other direction.
    """

    def __init__(
        self,
        store: Store,
        space: Space,
        settings: StudySettings,
        *,
        metric: str,
        lower_is_better: bool,
        in_memory: bool = False,
    ) -> None:
        self.store, self.space, self.settings, self.in_memory = store, space, settings, in_memory
        self._retried: set[int] | None = None  # trials that had failed before, to be tried once more
        self._study = self._load(metric, lower_is_better)

    def _load(self, metric: str, lower_is_better: bool) -> Any:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if self.settings.sampler not in SAMPLERS:
            raise ConfigError("hydra.sweeper.sampler", self.settings.sampler, f"allowed: {', '.join(SAMPLERS)}")
        study = optuna.create_study(
            storage=None if self.in_memory else _load_journal(self.store),
            study_name="lorabench",
            direction="minimize" if lower_is_better else "maximize",
            load_if_exists=True,
        )
        if (study.direction.name == "MINIMIZE") != lower_is_better:
            allowed = f"its study does not {'minimize' if lower_is_better else 'maximize'} {metric}"
            raise ExistingWork("sweep.dir", str(self.store.root), allowed)
        return study

    def ask(self, count: int) -> list[Drawn]:
        """Return the next trials, at most `count`: first those that a launcher was given and never reported.

        Empty when the study is complete. Raises `ExistingWork` where the journal's study searches another space.
        """
        alone: AbstractContextManager[Any] = nullcontext() if self.in_memory else self.store.leases.wait("optuna")
        with alone:  # another launcher may be asking, too
            pending, left = self._pending()
            batch = pending[:count]
            try:
                first = len(self._study.get_trials(deepcopy=False))
                drawn = [self._draw(first + i) for i in range(min(left, count - len(batch)))]
            except ValueError as e:
                raise ExistingWork("sweep.dir", str(self.store.root), f"its study searches another space ({e})") from e
        return batch + [Drawn(t.number, self.space.overrides(t.params)) for t in drawn]

    def _draw(self, number: int) -> Any:
        """Draw a trial from the seed and its number, so that a study that goes on never draws a trial again."""
        seed = self.settings.seed
        own = None if seed is None else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        self._study.sampler = SAMPLERS[self.settings.sampler](own)
        return self._study.ask(dict(self.space.axes))

    def _pending(self) -> tuple[list[Drawn], int]:
        """Return the trials that were asked for and not reported, by any launcher, and how many are left to ask for.

        A trial that failed before this launcher came is asked for again where failed runs are retried. One that was cut
        while it was drawn counts as none.
        """
        trials = self._study.get_trials(deepcopy=False)
        complete = {t.number for t in trials if t.params.keys() == self.space.axes.keys()}
        if self._retried is None:
            self._retried = self._enqueue_failed(trials, complete)
        pending, spent = [], 0
        for t in trials:
            if t.state == TrialState.RUNNING and t.number in complete:
                pending.append(Drawn(t.number, self.space.overrides(t.params)))
            elif t.state == TrialState.RUNNING:  # cut while it was drawn, or of another space
                self._study.tell(t.number, state=TrialState.FAIL)
            spent += t.state != TrialState.WAITING and t.number in complete - self._retried
        return pending, max(0, self.settings.n_trials - spent)

    def _enqueue_failed(self, trials: Sequence[Any], complete: set[int]) -> set[int]:
        """Enqueue what failed trials tried, unless it went well since or is under way; return their numbers."""
        if not self.settings.retry_failed:
            return set()
        failed = {n for n in complete if trials[n].state == TrialState.FAIL}
        tried = [t.params or t.system_attrs.get("fixed_params") for t in trials if t.state != TrialState.FAIL]
        for params in (trials[n].params for n in sorted(failed)):
            if params not in tried:
                self._study.enqueue_trial(params)
                tried.append(params)
        return failed

    def report(self, number: int, records: Sequence[Record | None]) -> None:
        """Report a trial's value to the study. records: one a tuning seed; what another launcher reported stays."""
        state, value = outcome(records)
        self._study.tell(number, value, state=state, skip_if_finished=True)

    def best(self) -> tuple[Drawn, float] | None:
        """Return the best trial and its value; None where no trial completed."""
        if not any(t.state == TrialState.COMPLETE for t in self._study.get_trials(deepcopy=False)):
            return None
        best = self._study.best_trial
        return Drawn(best.number, self.space.overrides(best.params)), float(self._study.best_value)

    @property
    def size(self) -> int:
        """Number of trials, of whatever state."""
        return len(self._study.trials)


def outcome(records: Sequence[Record | None]) -> tuple[TrialState, float | None]:
    """Return a trial's state and its mean primary metric over seeds.

    PRUNED: a run diverged, was pruned or has no value. FAIL: one failed or has no record.
    """
    statuses = {"failed" if r is None else r.status for r in records}
    if "failed" in statuses:
        return TrialState.FAIL, None
    values = [r.metrics[f"val/{r.metrics['primary']}"] for r in records if r and r.status == "completed"]
    if statuses != {"completed"} or None in values:
        return TrialState.PRUNED, None
    return TrialState.COMPLETE, fmean(map(float, values))


def _load_journal(store: Store) -> optuna.storages.JournalStorage:
    """Open the study's journal. A last line that is not whole (disk full, power gone) is removed first."""
    path, lock = store.root / "optuna" / "journal", _LeaseLock(store.leases)
    with name_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path), lock)
        with get_lock_file(lock), open(path, "r+b") as f:
            raw = f.read()
            if torn := len(raw) - raw.rfind(b"\n") - 1:
                f.truncate(len(raw) - torn)
    try:
        return optuna.storages.JournalStorage(backend)
    except ValueError as e:
        allowed = f"a whole journal of a study ({e}); moved away, another study begins"
        raise ExistingWork("sweep.dir", str(path), allowed) from e


class _LeaseLock(BaseJournalFileLock):
    """The journal's lock as a lease, which ends with its holder.

    Optuna's own lock outlives a killed holder: it is a link to a relative path, which leads nowhere from where the link
    is, and is then waited for without end.
    """

    def __init__(self, leases: Leases) -> None:
        self.leases = leases

    def acquire(self) -> bool:
        self.lease = self.leases.wait("journal")
        return True

    def release(self) -> None:
        self.lease.release()
