"""Which of a sweep's runs need no training: those whose record stands, on the data, base and Python files that are
here."""

from __future__ import annotations

from collections.abc import Sequence

from lorabench.config.errors import ExistingWork
from lorabench.config.runs import RunConfig, Settings
from lorabench.store.records import Record, Store
from lorabench.tasks.probe import probe_fingerprint
from lorabench.training import preparation


def finished_records(store: Store, settings: Settings, runs: Sequence[RunConfig]) -> dict[str, Record]:
    """Return the records of the runs that need no training, after checking that what they were trained on is what is
    here.

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
    """Raise `ExistingWork` for a record whose data, model or own Python files are not those that are here now."""
    now = (
        ("task", "data", "data_fingerprint", preparation.load_data(run.task).fingerprint),
        ("model", "model", "model_fingerprint", preparation.model_fingerprint(run)),
        ("model", "processor", "processor_fingerprint", preparation.processor_fingerprint(run)),
        ("task.probe", "probe's data", "probe_fingerprint", probe_fingerprint(run)),
        ("task.file", "Python", "user_code", preparation.user_code_fingerprint(run)),
    )
    for key, what, name, value in now:
        then = record.provenance.get(name)
        if name == "processor_fingerprint" and name not in record.provenance:
            continue  # a record older than this fingerprint
        if then != value:
            raise ExistingWork(
                key,
                run.model.name if key == "model" else run.task.name,
                f"the {what} files are not those that run {record.run_id} was trained on ({then} then, {value} now); "
                "use another sweep.name, or sweep.accept_drift=true to keep the old records",
            )
