"""From listed runs to records: check all, plan packs, skip what is finished, train the rest, say what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lorabench.config.contracts.method import SlicePlan
from lorabench.config.errors import ConfigError
from lorabench.config.runs import Pack, RunConfig, Settings
from lorabench.results.formatting import plural
from lorabench.runtime.files import name_unwritable
from lorabench.runtime.leases import LeaseLost
from lorabench.runtime.provenance import code_fingerprint
from lorabench.store import checkpoints
from lorabench.store.integrity import damaged_files
from lorabench.store.records import Record, Store
from lorabench.sweep import declaration, reuse
from lorabench.sweep.dry_run import dry_run
from lorabench.sweep.packs import Job, assign_packs, planning_round, replace_pack, replacing_packs, write_cells
from lorabench.sweep.progress import ProgressDisplay, announce_slow, data_notices
from lorabench.sweep.ranks import train
from lorabench.sweep.resume import finished_records
from lorabench.sweep.sharing import FinishedRuns, wait_for_packs, waiting_lease
from lorabench.sweep.workers import Crew, make_workers, share_count, worker_threads
from lorabench.training import precision, preparation
from lorabench.training.distributed import ProcessLost
from lorabench.training.train import Listener, OutOfMemory, SlicesMix

Executor = Callable[[Callable[[Pack], list[Record]], Sequence[Pack]], Iterable[list[Record]]]


class SweepFailed(Exception):
    """Some runs of a sweep failed, or are unfinished; the others are done and recorded. Exit code 1."""


def check_all(jobs: Sequence[Job]) -> dict[str, SlicePlan]:
    """Check every listed run before anything is written. Raises `ConfigError` for the first bad one."""
    reuse.open_sources(jobs[0].settings.sweep.reuse)
    for job in jobs:
        declaration.check_metrics(job)
        if (job.settings.sweep.workers or 1) > 1 and precision.device_count(job.run.trainer) > 1:
            allowed = "1 where a pack trains on several devices (trainer.devices): packs then follow one another"
            raise ConfigError("sweep.workers", job.settings.sweep.workers, allowed)
    with announce_slow(f"reading the data and checking {plural(len(jobs), 'run')}"):
        return {job.run.run_id: preparation.check_run(job.run) for job in jobs}


def execute(jobs: Sequence[Job], *, executor: Executor = map, console: Console | None = None) -> list[Record | None]:
    """Train the listed runs that have no record yet; returns the jobs' records in their order, None after a dry run."""
    settings = jobs[0].settings
    console = console or Console(stderr=True)
    store = Store(settings.sweep.dir)
    store.check_foreign()
    plans = check_all(jobs)
    for job in jobs:
        precision.check_nodes(job.run.trainer.num_nodes, getattr(executor, "nodes", 1))
    for line in data_notices(jobs) if settings.sweep.dry_run or settings.sweep.progress else ():
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if settings.sweep.dry_run:
        dry_run(store, jobs, plans, console)
        return [None] * len(jobs)
    declaration.check_unchanged(store.manifest(), settings.study, store.root)
    write_cells(store, jobs, plans, only_new=True)
    here = not isinstance(executor, Crew)  # else packs are jobs, and the machine that trains settles
    with store.locked():
        for line in reuse.copy_runs(store, [job.run for job in jobs], settings.sweep.reuse):
            console.print(line, highlight=False, soft_wrap=True)
        if here:
            precision.note_device(store, jobs[0].run)
        packs = assign_packs(store, jobs)
    runs = [run for pack in packs for run in pack.runs]
    stamps = {run.run_id: store.stamp(run.run_id) for run in runs}
    torn = damaged_files(store, stamps)
    for run_id, name in torn.items():
        console.print(f"{store.run_dir(run_id)}: {name} cannot be read; the run trains again", highlight=False)
    finished = finished_records(store, settings, [run for run in runs if run.run_id not in torn])
    todo = [p for p in packs if any(i in plans and i not in finished for i in p.run_ids)]
    for pack in packs:  # cut after its last record and before its checkpoints and its lease went
        if all(i in finished and finished[i].status != "failed" for i in pack.run_ids):
            checkpoints.remove(store.root, pack.id)
            for name in (pack.id, waiting_lease(pack)):
                store.leases.tidy(name)
    other = sum(record.provenance.get("code") != code_fingerprint() for record in finished.values())
    if other and settings.sweep.progress:
        console.print(
            f"{store.root}: {other} finished runs were made by other source code of lorabench", highlight=False
        )
    if todo and here and (said := precision.check_device(store, runs, accept_drift=settings.sweep.accept_drift)):
        console.print(said, highlight=False)
    if not todo and settings.sweep.progress:
        console.print(f"{store.root}: all {len(plans)} runs are finished, nothing to train", highlight=False)
    with ProgressDisplay(console, todo, enabled=settings.sweep.progress) as progress:
        cut = share_count(planning_round(store, packs), settings.sweep.workers)
        train_packs(todo, cut, store, settings, FinishedRuns(store, finished, stamps), executor, progress)
    return [store.read(j.run.run_id) for j in jobs]


def train_packs(
    todo: Sequence[Pack], cut: int, store: Store, settings: Settings, ended: FinishedRuns, executor: Executor, progress: ProgressDisplay,
) -> None:  # fmt: skip
    from lorabench.trackers import make_tracker

    tracker = make_tracker(settings.tracker, sweep=store.root.name, sweep_dir=store.root)
    jobs = isinstance(executor, Crew)  # a job holds the pack that it trains, and its launcher that it waits for it
    workers = executor if isinstance(executor, Crew) else make_workers(todo, cut)
    train_pack, executor = (workers.train, workers.map) if workers else (train, executor)

    others: list[Pack] = []  # packs that another launcher holds, or that go on
    lost: list[str] = []

    def one(pack: Pack) -> list[Record]:
        with name_unwritable(store.leases.folder):
            lease = store.leases.take(waiting_lease(pack) if jobs else pack.id)
        if lease is None:
            others.append(pack)
            return []
        with lease:
            keep = ended.of(pack)  # another launcher may have ended some since, or all
            parts = replacing_packs(store, pack)
            if not parts and not keep.issuperset(pack.run_ids):
                drift, began = settings.sweep.accept_drift, checkpoints.last_step(store.root, pack.id) or 0
                listener = _listener(progress.step(pack, began), tracker)
                try:
                    return train_pack(pack, store.under(lease), listener, keep=keep, accept_drift=drift)
                except LeaseLost as e:
                    progress.say(f"{pack.id}: {e}")
                    others.append(pack)
                    return []
                except ProcessLost as e:
                    if (checkpoints.last_step(store.root, pack.id) or 0) > began:
                        progress.say(f"{pack.id}: {e}; it goes on from its last checkpoint")
                        others.append(pack)
                    else:
                        lost.append(f"{pack.id}: {e}")
                    return []
                except SlicesMix as e:
                    size, why = 1, f"{e}; its runs train one by one"
                except OutOfMemory as e:
                    size, why = (len(pack.runs) + 1) // 2, f"{e}; it trains in halves"
                progress.say(why)
                checkpoints.remove(store.root, pack.id)  # a job that was killed for its memory has left some
                parts = _split(pack, size)
                replace_pack(store, pack, parts)
        return [record for part in parts for record in one(part)]

    try:
        with workers or worker_threads(cut):
            while todo:
                for records in executor(one, todo):
                    progress.done(records)
                todo = wait_for_packs(store, others, progress, jobs=jobs)
    finally:
        if tracker is not None:
            tracker.close()
    if lost:
        raise SweepFailed(f"{'; '.join(lost)}; the same command goes on from its last checkpoint")


def _split(pack: Pack, size: int) -> list[Pack]:
    parts = [pack.runs[i : i + size] for i in range(0, len(pack.runs), size)]
    return [Pack(f"{pack.id}.{k}", runs) for k, runs in enumerate(parts)]


def _listener(step: Callable[[int, int], None], tracker: Any) -> Listener:
    if tracker is None:
        return Listener(step=step)

    def start(run: RunConfig) -> None:
        tracker.start(run.run_id, run.to_dict(), method=run.method.name, tags=[run.model.name, run.task.name, run.role])

    def rows(run_id: str, new: list[dict[str, Any]]) -> None:
        for row in new:
            tracker.log(run_id, row)

    return Listener(step=step, start=start, rows=rows, finish=lambda r: tracker.finish(r.run_id, r))


def finish(settings: Settings, *, console: Console | None = None) -> None:
    """Render the report and show the comparison on the terminal."""
    console = console or Console()
    if settings.sweep.dry_run:
        return
    from lorabench.report import render, terminal_table

    store = Store(settings.sweep.dir)
    records = store.records()
    if any(r.status == "completed" for r in records):
        console.print(terminal_table(settings.sweep.dir))
        if settings.report.enabled:
            render(settings.sweep.dir, settings.report.dir, title=settings.report.title)
            console.print(f"report: {settings.report.dir}/report.html", soft_wrap=True, highlight=False)
            _mirror_report(settings, store)
    counts = Counter(r.status for r in records)
    console.print(
        f"{len(records)} runs: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())), highlight=False
    )
    failed = [r for r in records if r.status == "failed"]
    if failed:
        for r in failed[:10]:
            console.print(f"failed {r.run_id}: {r.error}", highlight=False, markup=False)
        raise SweepFailed(f"{len(failed)} of {len(records)} runs failed; start again with sweep.retry_failed=true")


def _mirror_report(settings: Settings, store: Store) -> None:
    """Let the sweep's tracker show the report, if it can."""
    from lorabench.trackers import make_tracker

    tracker = make_tracker(settings.tracker, sweep=store.root.name, sweep_dir=store.root)
    if tracker is None:
        return
    from lorabench.report.summary import tracker_summary

    tracker.report(Path(settings.report.dir), tracker_summary(store.root))
    tracker.close()
