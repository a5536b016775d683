"""A pack that is a job: what its listener has heard of it, and its end as the caller of `train` knows it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lorabench.config.errors import ExistingWork
from lorabench.config.runs import Pack
from lorabench.store.integrity import damaged_files
from lorabench.store.records import Record, Store
from lorabench.training import preparation
from lorabench.training.train import Listener, OutOfMemory, SlicesMix


@dataclass(eq=False)
class Watch:
    """A pack that waits for its job or is one, and how much of its histories the listener has heard.

    keep: runs whose record stays. options: what else `train` is told. tries: how often it was submitted. missed: looks
    in a row that found neither the job nor its end. heard: rows of each run's history; sizes: bytes.
    """

    pack: Pack
    store: Store
    listener: Listener
    keep: Collection[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    result: Future[list[Record]] = field(default_factory=Future)
    job: str | None = None
    tries: int = 0
    missed: int = 0
    heard: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    step: int = 0
    begun: bool = False


def _announce_start(watch: Watch) -> None:
    """Tell the listener, once, that the pack's runs have begun; those that keep their record were told before."""
    if not watch.begun:
        watch.begun = True
        for run in watch.pack.runs:
            if run.run_id not in watch.keep:
                watch.listener.start(run)


def runs_to_replace(watch: Watch) -> list[str]:
    """Return the runs whose record is to be replaced.

    These failed, were pruned where pruning is off now, or have a file that cannot be read.
    """
    read = {i: watch.store.read(i) for i in watch.pack.run_ids if i not in watch.keep}
    found = {i: record for i, record in read.items() if record}
    torn = damaged_files(watch.store, found)
    return [i for i, record in found.items() if i in torn or record.status in ("failed", "pruned")]


def pass_on_rows(watch: Watch) -> None:
    """Tell the listener what the histories have grown by. A pack that starts again repeats its rows: those were
    heard."""
    for run in watch.pack.runs:
        try:
            size = (watch.store.run_dir(run.run_id) / "history.jsonl").stat().st_size
        except OSError:
            continue
        if run.run_id in watch.keep or watch.sizes.get(run.run_id) == size:
            continue
        watch.sizes[run.run_id] = size
        rows = watch.store.history(run.run_id)
        _announce_start(watch)
        if new := rows[watch.heard.get(run.run_id, 0) :]:
            watch.heard[run.run_id] = len(rows)
            watch.listener.rows(run.run_id, new)
        step = max((int(row.get("step") or 0) for row in rows), default=0)
        if step > watch.step:
            watch.step = step
            watch.listener.step(step, _total(watch.pack))


def _total(pack: Pack) -> int:
    first = pack.runs[0]
    return preparation.total_steps(
        first, len(preparation.prepare(first).encoded.splits["train"])
    )  # of plain text blocks, not rows


def close(watch: Watch, told: Mapping[str, Any]) -> None:
    """End the wait for a pack as `train` would have ended: with its records, or with the error that its job told of."""
    if told["kind"] == "mix":
        resolve(watch, error=SlicesMix(told["layer"], told["reason"]))
    elif told["kind"] == "memory":
        resolve(watch, error=OutOfMemory(told["reason"]))
    elif told["kind"] == "refused":
        resolve(watch, error=ExistingWork(told["key"], told["value"], told["allowed"]))
    else:
        pass_on_rows(watch)
        found = [watch.store.read(i) for i in watch.pack.run_ids]
        records = [r for r in found if r is not None]
        if len(records) < len(found):
            return  # a network file system that is late: the next look may find it
        _announce_start(watch)
        for record in records:
            if record.run_id not in watch.keep:
                watch.listener.finish(record)
        if 0 < watch.step < (total := _total(watch.pack)):
            watch.listener.step(total, total)
        resolve(watch, records)


def resolve(watch: Watch, records: list[Record] | None = None, error: BaseException | None = None) -> None:
    if watch.result.done():
        return
    if error is not None:
        watch.result.set_exception(error)
    else:
        watch.result.set_result(records or [])
