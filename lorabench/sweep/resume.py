"""Which of a sweep's runs need no training: those whose record stands, on the data, base and Python files that are here."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorabench.config.errors import ExistingWork
from lorabench.config.runs import Pack, RunConfig, Settings
from lorabench.store.records import Record, Store
from lorabench.sweep.progress import Progress
from lorabench.tasks.probe import probe_fingerprint
from lorabench.training import preparation


def finished_records(store: Store, settings: Settings, runs: Sequence[RunConfig]) -> dict[str, Record]:
    """Records of the runs that need no training, after checking that what they were trained on is what is here.

    A pruned run is finished as long as `sweep.prune` is on; without it, it is one to train to its end.
    """
    again = {"failed"} if settings.sweep.retry_failed else set()
    again |= set() if settings.sweep.prune else {"pruned"}
    done: dict[str, Record] = {}
    for run in runs:
        record = store.read(run.run_id)
        if record is None or record.status in again:
            continue
        if record.status != "failed" and not settings.sweep.accept_drift:
            check_drift(record, run)
        done[run.run_id] = record
    return done


def check_drift(record: Record, run: RunConfig) -> None:
    """Refuse to reuse a record whose data, model or own Python files are not those that are here now."""
    now = (
        ("task", "data", "data_fingerprint", preparation.load_data(run.task).fingerprint),
        ("model", "model", "model_fingerprint", preparation.model_fingerprint(run)),
        ("task.probe", "probe's data", "probe_fingerprint", probe_fingerprint(run)),
        ("task.file", "Python", "user_code", preparation.user_code_fingerprint(run)),
    )
    for key, what, name, value in now:
        then = record.provenance.get(name)
        if then != value:
            raise ExistingWork(
                key, run.model.name if key == "model" else run.task.name,
                f"the {what} files are not those that run {record.run_id} was trained on ({then} then, {value} now); "
                "use another sweep.name, or sweep.accept_drift=true to keep the old records",
            )  # fmt: skip


class Ended:
    """Which runs need no training: those that had ended when this launcher looked first, and what has ended since.

    stamps: `Store.stamp` of each run before that first look. A failed run that is to be trained again has a stamp, too.
    """

    def __init__(self, store: Store, finished: Collection[str], stamps: Mapping[str, Any]) -> None:
        self.store, self.finished, self.stamps = store, frozenset(finished), stamps

    def of(self, pack: Pack) -> set[str]:
        new = {i for i in set(pack.run_ids) - self.finished if self.store.stamp(i) != self.stamps.get(i)}
        return {i for i in pack.run_ids if i in self.finished or (i in new and self.store.read(i))}


def waits_for(pack: Pack) -> str:
    """The lease of a launcher that waits for a pack's job. The job itself holds the pack's, as everybody who trains it."""
    return f"{pack.id}.job"


def freed(store: Store, held: list[Pack], progress: Progress, *, jobs: bool = False) -> list[Pack]:
    """Wait until another launcher, or a job of one, has let go of some of the packs it holds, or died; they are taken off the
    list. jobs: whether packs are jobs here."""
    pause = 0.0
    while held:
        holders = {pack.id: store.leases.holder(waits_for(pack) if jobs else pack.id) for pack in held}
        free = [pack for pack in held if holders[pack.id] is None]
        if free:
            held[:] = [pack for pack in held if pack not in free]
            return free
        if not pause:
            named = ", ".join(f"{i} ({holder})" for i, holder in holders.items())
            progress.say(f"waiting for packs that other launchers train: {named}")
        pause = min(2.0, 0.1 + 1.5 * pause)
        time.sleep(pause)
    return []
