"""From listed runs to records: check all, plan packs, skip what is finished, train the rest, say what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lorabench.config.contracts.method import SlicePlan
from lorabench.config.errors import ConfigError
from lorabench.config.runs import Pack, RunConfig, Settings
from lorabench.results.formatting import plural
from lorabench.runtime.files import keep_cache_as_it_is, name_unwritable
from lorabench.runtime.leases import Lease, LeaseLost
from lorabench.runtime.provenance import code_fingerprint
from lorabench.runtime.terminal import make_console
from lorabench.store import checkpoints
from lorabench.store.integrity import damaged_files
from lorabench.store.records import Record, Store
from lorabench.sweep import declaration, reuse
from lorabench.sweep.dry_run import dry_run
from lorabench.sweep.memory import estimate_pack, shortages
from lorabench.sweep.packs import Job, assign_packs, planning_round, replace_pack, replacing_packs, write_cells
from lorabench.sweep.progress import ProgressDisplay, announce_slow, data_notices, say
from lorabench.sweep.ranks import train
from lorabench.sweep.resume import finished_records
from lorabench.sweep.sharing import FinishedRuns, wait_for_packs, waiting_lease
from lorabench.sweep.workers import Crew, make_workers, share_count, worker_threads
from lorabench.training import acting, precision, preparation
from lorabench.training.distributed import ProcessLost
from lorabench.training.train import Listener, OutOfMemory, SlicesMix

Executor = Callable[[Callable[[Pack], list[Record]], Sequence[Pack]], Iterable[list[Record]]]


class SweepFailed(Exception):
    """Some runs of a sweep failed, or are unfinished; the others are done and recorded. Exit code 1."""


def check_all(jobs: Sequence[Job]) -> dict[str, SlicePlan]:
    """Check every listed run before anything is written. Raises `ConfigError` for the first bad one.

    A dry run puts nothing into the cache either.
    """
    settings = jobs[0].settings
    if settings.report.enabled:
        from lorabench.report import directory

        directory.check_place(Path(settings.report.dir), Path(settings.sweep.dir))
    reuse.open_sources(settings.sweep.reuse)
    for job in jobs:
        declaration.check_metrics(job)
        if (job.settings.sweep.workers or 1) > 1 and precision.device_count(job.run.trainer) > 1:
            allowed = "1 where a pack trains on several devices (trainer.devices): packs then follow one another"
            raise ConfigError("sweep.workers", job.settings.sweep.workers, allowed)
    checking = f"reading the data and checking {plural(len(jobs), 'run')}"
    with announce_slow(checking), keep_cache_as_it_is(jobs[0].settings.sweep.dry_run):
        return {job.run.run_id: preparation.check_run(job.run) for job in jobs}


def execute(jobs: Sequence[Job], *, executor: Executor = map, console: Console | None = None) -> list[Record | None]:
    """Train the listed runs that have no record yet. Return the jobs' records in their order, None each for a dry run.

    executor: calls a function for each pack, as `map` does, or a `Crew` whose packs are jobs of a cluster. Raises
    `ConfigError` before anything is written, and `SweepFailed` where packs were left unfinished.
    """
    settings = jobs[0].settings
    console = console or make_console(stderr=True)
    store = Store(settings.sweep.dir)
    store.check_foreign()
    plans = check_all(jobs)
    for job in jobs:
        precision.check_nodes(job.run.trainer.num_nodes, getattr(executor, "nodes", 1))
    for line in data_notices(jobs) if settings.sweep.dry_run or settings.sweep.progress else ():
        console.print(line, soft_wrap=True)
    if settings.sweep.dry_run:
        dry_run(store, jobs, plans, console)
        return [None] * len(jobs)
    declaration.check_standing(store, jobs)
    here = not isinstance(executor, Crew)  # else packs are jobs, and the machine that trains notes its device
    if here:
        acting.check_runs([job.run for job in jobs], store, max_pack=settings.sweep.max_pack)
    write_cells(store, jobs, plans, only_new=True)
    with store.locked():
        for line in reuse.copy_runs(store, [job.run for job in jobs], settings.sweep.reuse):
            console.print(line, soft_wrap=True)
        if here:
            precision.note_device(store, jobs[0].run)
        packs = assign_packs(store, jobs)
    runs = [run for pack in packs for run in pack.runs]
    ended = _find_finished(store, settings, runs, console)
    todo = [p for p in packs if any(i in plans and i not in ended.finished for i in p.run_ids)]
    if todo and here and (notice := precision.check_device(store, runs, accept_drift=settings.sweep.accept_drift)):
        say(console, notice)
    if here and settings.sweep.progress:
        _say_shortages(store, todo, plans, console)
    _clear_after_kill(store, packs, ended)
    if not todo and settings.sweep.progress:
        say(console, f"{store.root}: all {len(plans)} runs are finished, nothing to train")
    with ProgressDisplay(console, todo, enabled=settings.sweep.progress) as progress:
        shares = share_count(planning_round(store, packs), settings.sweep.workers)
        train_packs(todo, shares, store, settings, ended, executor, progress)
    return [store.read(j.run.run_id) for j in jobs]


def _find_finished(store: Store, settings: Settings, runs: Sequence[RunConfig], console: Console) -> FinishedRuns:
    """Return which runs need no training. What cannot be read, and what other source code made, is said on the
    console."""
    stamps = {run.run_id: store.stamp(run.run_id) for run in runs}
    torn = damaged_files(store, stamps)
    for run_id, name in torn.items():
        say(console, f"{store.run_dir(run_id)}: {name} cannot be read; the run trains again")
    finished = finished_records(store, settings, [run for run in runs if run.run_id not in torn])
    for run_id in sorted(store.edited & finished.keys()):
        path = store.run_dir(run_id) / "run.json"
        console.print(f"{path}: edited since it was written; moved away, the run trains again", soft_wrap=True)
    other = sum(record.provenance.get("code") != code_fingerprint() for record in finished.values())
    if other and settings.sweep.progress:
        text = f"{store.root}: {other} finished runs were made by other source code of lorabench"
        say(console, text)
    return FinishedRuns(store, finished, stamps)


def _say_shortages(store: Store, packs: Sequence[Pack], plans: dict[str, SlicePlan], console: Console) -> None:
    """Say which packs are estimated to need more memory than is free. They are tried nevertheless."""
    auto, kept = precision.noted_precision(store), [[r for r in pack.runs if r.run_id in plans] for pack in packs]
    sizes = [estimate_pack(runs, [plans[run.run_id] for run in runs], auto) for runs in kept]
    device = precision.resolve(packs[0].runs[0], auto).device if packs else "cpu"
    for line in shortages(packs, sizes, device):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _clear_after_kill(store: Store, packs: Sequence[Pack], ended: FinishedRuns) -> None:
    """Remove checkpoints and leases of packs that were cut after their last record."""
    for pack in packs:
        if all(i in ended.finished and ended.finished[i].status != "failed" for i in pack.run_ids):
            checkpoints.remove(store.root, pack.id)
            for name in (pack.id, waiting_lease(pack)):
                store.leases.tidy(name)


def train_packs(
    todo: Sequence[Pack],
    shares: int,
    store: Store,
    settings: Settings,
    ended: FinishedRuns,
    executor: Executor,
    progress: ProgressDisplay,
) -> None:
    """Train packs until each has its records, other launchers' packs included.

    shares: into how many the cores or devices are cut. Raises `SweepFailed` where a pack's processes were lost and it
    got no further.
    """
    from lorabench.trackers import make_tracker

    tracker = make_tracker(settings.tracker, sweep=store.root.name, sweep_dir=store.root)
    jobs = isinstance(executor, Crew)
    workers = executor if isinstance(executor, Crew) else make_workers(todo, shares)
    train_pack, executor = (workers.train, workers.map) if workers else (train, executor)
    trainer = _PackTrainer(store, settings, ended, progress, tracker, train_pack, jobs)
    try:
        with workers or worker_threads(shares):
            while todo:
                for records in executor(trainer.train, todo):
                    progress.done(records)
                todo = wait_for_packs(store, trainer.held, progress, jobs=jobs)
    finally:
        if tracker is not None:
            tracker.close()
    if trainer.lost:
        raise SweepFailed(f"{'; '.join(trainer.lost)}; the same command goes on from its last checkpoint")


@dataclass
class _PackTrainer:
    """Trains one pack after another under its lease; splits one that does not fit or whose slices mix.

    jobs: whether packs are jobs. A job holds the pack that it trains, and its launcher that it waits for it. held:
    packs that another launcher holds, or that go on. lost: what became of packs whose processes were lost.
    """

    store: Store
    settings: Settings
    ended: FinishedRuns
    progress: ProgressDisplay
    tracker: Any
    train_pack: Callable[..., list[Record]]
    jobs: bool
    held: list[Pack] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def train(self, pack: Pack) -> list[Record]:
        """Return the records of a pack's runs; [] where it is left to another launcher, or to the next round."""
        with name_unwritable(self.store.leases.folder):
            lease = self.store.leases.take(waiting_lease(pack) if self.jobs else pack.id)
        if lease is None:
            self.held.append(pack)
            return []
        with lease:
            keep = self.ended.of(pack)  # another launcher may have ended some since, or all
            parts = replacing_packs(self.store, pack)
            if not parts and not keep.issuperset(pack.run_ids):
                began = checkpoints.last_step(self.store.root, pack.id) or 0
                try:
                    return self._train(pack, lease, keep, began)
                except (LeaseLost, ProcessLost) as e:
                    self._note_lost(pack, e, began)
                    return []
                except SlicesMix as e:
                    parts = self._split(pack, 1, f"{e}; its runs train one by one")
                except OutOfMemory as e:
                    parts = self._split(pack, (len(pack.runs) + 1) // 2, f"{e}; it trains in halves")
        return [record for part in parts for record in self.train(part)]

    def _train(self, pack: Pack, lease: Lease, keep: set[str], began: int) -> list[Record]:
        listener = _listener(self.progress.step(pack, began), self.tracker)
        drift = self.settings.sweep.accept_drift
        return self.train_pack(pack, self.store.under(lease), listener, keep=keep, accept_drift=drift)

    def _note_lost(self, pack: Pack, error: LeaseLost | ProcessLost, began: int) -> None:
        """Keep a pack for the next round if another launcher has it, or if it got further; else note that it is
        lost."""
        if isinstance(error, LeaseLost):
            self.progress.say(f"{pack.id}: {error}")
            self.held.append(pack)
        elif (checkpoints.last_step(self.store.root, pack.id) or 0) > began:
            self.progress.say(f"{pack.id}: {error}; it goes on from its last checkpoint")
            self.held.append(pack)
        else:
            self.lost.append(f"{pack.id}: {error}")

    def _split(self, pack: Pack, size: int, why: str) -> list[Pack]:
        """Plan a pack anew in parts of at most `size` runs, and return them."""
        self.progress.say(why)
        checkpoints.remove(self.store.root, pack.id)  # a job that was killed for its memory has left some
        groups = [pack.runs[i : i + size] for i in range(0, len(pack.runs), size)]
        parts = [Pack(f"{pack.id}.{k}", runs) for k, runs in enumerate(groups)]
        replace_pack(self.store, pack, parts)
        return parts


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
    console = console or make_console()
    if settings.sweep.dry_run:
        return
    from lorabench.report import render, terminal_table

    store = Store(settings.sweep.dir)
    records = store.records()
    if any(r.status == "completed" for r in records):
        console.print(terminal_table(settings.sweep.dir))
        if settings.report.enabled:
            render(settings.sweep.dir, settings.report.dir, title=settings.report.title)
            console.print(f"report: {settings.report.dir}/report.html", soft_wrap=True)
            _mirror_report(settings, store)
    counts = Counter(r.status for r in records)
    console.print(f"{len(records)} runs: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    failed = [r for r in records if r.status == "failed"]
    if failed:
        for r in failed[:10]:
            say(console, f"failed {r.run_id}: {r.error}")
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
