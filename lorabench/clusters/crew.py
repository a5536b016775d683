"""Packs as jobs of a cluster, and the wait for them: a `Crew` of `sweep.workers` whose jobs outlive the launcher."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from lorabench.clusters.engines import Busy, Death, Engine, make_engine
from lorabench.clusters.job import PackJob, job_end, job_entry, jobs_folder, leave_reason, note_job
from lorabench.clusters.notice import PREEMPTED, TIME_LIMIT
from lorabench.clusters.watch import Watch, close, pass_on_rows, resolve, runs_to_replace
from lorabench.config.runs import Pack
from lorabench.runtime.signals import map_in_order
from lorabench.runtime.terminal import say
from lorabench.store import checkpoints
from lorabench.store.records import Record, Store
from lorabench.training.session import failed_record
from lorabench.training.train import Listener, OutOfMemory

MISSES_UNTIL_DEAD = 3  # looks in a row that must miss a job, its end and its records before it counts as dead
MISSES_UNTIL_LOST = (
    20  # the same for records after its end, which a network file system may show later, and for what cannot be read
)
MAX_WAITING_PACKS = 1000  # packs that wait at once


class JobCrew:
    """Submits packs as jobs and waits for them; a context manager. `train` means what `training.train.train` does.

    settings: the launcher's, for the engine; poll_seconds: between two looks at the queue and the store; resubmit: how
    often a pack whose job died (killed, out of time) is submitted again before its runs are recorded as failed. A
    preemption or a lost node never counts there, and a job that got further than the last one does not. nodes: tasks of
    a job.
    """

    def __init__(
        self, name: str, settings: Mapping[str, Any], sweep: str, *, nodes: int = 1, quiet: bool = False
    ) -> None:
        self.settings, self.nodes, self.quiet = dict(settings), nodes, quiet
        self.poll, self.resubmit = self.settings.pop("poll_seconds"), self.settings.pop("resubmit")
        self.name, self.sweep = name, sweep
        self._inbox: queue.SimpleQueue[Watch] = queue.SimpleQueue()
        self._waiting: list[Watch] = []
        self._watched: list[Watch] = []
        self._stop = threading.Event()
        self._engine: Engine | None = None
        self._refused = False  # jobs, when it was asked last

    def __enter__(self) -> JobCrew:
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=10)  # it may wait for a slow controller; nothing of it is lost
        if self._engine is not None:
            self._engine.close()

    def say(self, text: str) -> None:
        if not self.quiet:
            say(text, error=True)  # a live display shows it above its bars

    def map(self, one: Callable[[Pack], list[Record]], packs: Sequence[Pack]) -> Iterator[list[Record]]:
        with ThreadPoolExecutor(max(1, min(len(packs), MAX_WAITING_PACKS))) as threads:
            try:
                yield from map_in_order(threads, one, packs)
            except BaseException:
                self._stop.set()  # nobody waits any more; jobs that were submitted go on
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    __call__ = map  # as an executor without a `train` of its own is called

    def train(
        self, pack: Pack, store: Store, listener: Listener, *, keep: Collection[str], **options: Any
    ) -> list[Record]:
        """Wait until a job has trained the pack, and return its records. options: what else the job's `train` is
        told."""
        watch = Watch(pack, Store(store.root.resolve()), listener, keep, options)
        self._inbox.put(watch)
        while not self._stop.is_set():
            if wait([watch.result], timeout=5).done:  # what it raises may itself be a TimeoutError, a file system's
                return watch.result.result()
        raise LauncherStopped

    def _loop(self) -> None:
        """Talk to the engine and to the listeners, in the one thread that does."""
        began = 0.0
        while not self._stop.wait(0.1):
            fresh = self._take_arrivals()
            if not fresh and time.monotonic() - began < self.poll:
                continue
            began = time.monotonic()
            self._waiting = sorted(self._waiting + fresh, key=lambda w: [int(n) for n in w.pack.id[1:].split(".")])
            try:
                self._place()
                self._look()
            except BaseException as e:  # told to those who wait: their threads are the ones that are heard
                self._give_up(e)
        self._waiting += self._take_arrivals()
        self._give_up(LauncherStopped())

    def _give_up(self, error: BaseException) -> None:
        for watch in (*self._waiting, *self._watched):
            resolve(watch, error=error)
        self._waiting, self._watched = [], []

    def _take_arrivals(self) -> list[Watch]:
        """Return new packs, all that come at about the same time: they become one array."""
        found: list[Watch] = []
        while not self._inbox.empty():
            found.append(self._inbox.get())
            if self._inbox.empty():
                time.sleep(0.1)
        return found

    def _place(self) -> None:
        """Give every waiting pack a job: the one it has already, from whichever launcher, or a new one."""
        if not self._waiting:
            return
        store = self._waiting[0].store
        if self._engine is None:
            self._engine = make_engine(self.name, self.settings, jobs_folder(store) / "log", self.sweep)
        with store.locked():  # of two launchers on one sweep, one submits and the other finds it
            noted = {w.pack.id: job_entry(store, w.pack.id) for w in self._waiting}
            alive = self._engine.alive([str(e["job"]) for e in noted.values() if e.get("engine") == self.name])
            if alive is None:
                return
            fresh = [w for w in self._waiting if not self._has_job(w, noted[w.pack.id], alive)]
            if there := [str(w.job) for w in self._waiting if w.job is not None]:
                self.say(f"{store.root.name}: {len(there)} packs have jobs already, {_job_names(there)}")
            if self._engine.room is not None:
                fresh = fresh[: max(0, self._engine.room - len(self._watched))]
            if fresh:
                self._submit(store, fresh)
        self._waiting = [w for w in self._waiting if w.job is None and not w.result.done()]

    def _has_job(self, watch: Watch, noted: Mapping[str, Any], alive: set[str]) -> bool:
        """Whether a pack needs no new job: it has one, or one that nobody waited for has ended already."""
        job = str(noted.get("job"))
        if noted.get("engine") == self.name and job in alive:
            watch.job, watch.tries = job, max(watch.tries, int(noted.get("tries", 1)))
            self._watched.append(watch)
            return True
        told, again = job_end(watch.store, watch.pack.id, job), runs_to_replace(watch)
        if told.get("kind") in ("mix", "memory"):
            close(watch, told)
        elif not again and all(watch.store.read(i) for i in watch.pack.run_ids):
            close(watch, {"kind": "done"})
        return watch.result.done()

    def _submit(self, store: Store, fresh: Sequence[Watch]) -> None:
        assert self._engine is not None
        cpus = self.settings.get("cpus_per_task")
        made = [PackJob(str(store.root), w.pack.id, w.pack.prune, runs_to_replace(w), w.options, cpus) for w in fresh]
        try:
            ids = self._engine.submit(made)
        except Busy as e:
            if not self._refused:  # said once
                self.say(f"{store.root.name}: {self.name} takes no jobs now ({e}); asked again until it does")
            self._refused = True
            return
        self._refused = False
        for watch, job in zip(fresh, ids, strict=True):
            watch.job, watch.tries, watch.missed = job, watch.tries + 1, 0
            step = checkpoints.last_step(store.root, watch.pack.id) or 0
            note_job(store, watch.pack.id, engine=self.name, job=job, tries=watch.tries, step=step)
            self._watched.append(watch)
        self.say(f"{store.root.name}: {len(fresh)} packs submitted, {self.name} job {_job_names(w.job for w in fresh)}")

    def _look(self) -> None:
        if not self._watched:
            return
        assert self._engine is not None
        alive = self._engine.alive([str(w.job) for w in self._watched])
        for watch in list(self._watched):
            try:
                pass_on_rows(watch)
                if told := job_end(watch.store, watch.pack.id, str(watch.job)):
                    close(watch, told)
            except OSError:  # of a file system that may be itself again at the next look
                watch.missed += 1
                if watch.missed >= MISSES_UNTIL_LOST:
                    raise
                continue
            if told:
                watch.missed += not watch.result.done()
                if watch.missed >= MISSES_UNTIL_LOST:
                    self._handle_death(watch, Death(f"{self.name} job {watch.job} ended and left no record"))
            elif alive is not None and watch.job not in alive:
                watch.missed += 1
                if watch.missed >= MISSES_UNTIL_DEAD:
                    self._handle_death(watch, self._engine.death(str(watch.job)))
            else:
                watch.missed = 0
        self._watched = [w for w in self._watched if w.job is not None and not w.result.done()]

    def _handle_death(self, watch: Watch, death: Death) -> None:
        """Submit the pack of a job that left no word of its end again, in halves if it was too large, or record it as
        failed."""
        watch.store.leases.tidy(watch.pack.id)  # it may have held the pack
        cause = death.cause or leave_reason(watch.store, watch.pack.id, str(watch.job))
        begun = job_entry(watch.store, watch.pack.id).get("step", 0)
        step, why = checkpoints.last_step(watch.store.root, watch.pack.id) or 0, death.reason
        if cause == TIME_LIMIT:
            why += f"; hydra.launcher.timeout_min is its limit, it went from step {begun} to {step}"
        if cause == PREEMPTED or step > begun:
            watch.tries -= 1
        if death.memory and len(watch.pack.runs) > 1:
            resolve(watch, error=OutOfMemory(f"{watch.pack.id}: {death.reason}"))
        elif death.again and watch.tries <= self.resubmit:
            self.say(f"{watch.pack.id}: {why}; submitted again")
            watch.job = None
            self._waiting.append(watch)
        else:
            why = f"{why}; sweep.retry_failed=true trains it again"
            again = runs_to_replace(watch)
            kept = [i for i in watch.pack.run_ids if i not in again and watch.store.read(i)]
            for run in watch.pack.runs:
                if run.run_id not in kept:
                    watch.store.write(failed_record(run, why, ""))
            close(watch, {"kind": "done"})


def _job_names(made: Iterable[str | None]) -> str:
    """Return the names of jobs in a few words, an array once."""
    ids = sorted({str(job).split("_")[0] for job in made})
    return ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")


class LauncherStopped(Exception):
    """The launcher ends; its jobs do not."""
