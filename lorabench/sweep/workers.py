"""Packs side by side: one process a GPU, or a group of CPU cores each.

A worker trains a pack as this process would and sends back what there is to show. It dies with its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from threading import Event, Lock, current_thread, main_thread
from typing import Any, Protocol, runtime_checkable

import torch

from lorabench.config.runs import Pack, RunConfig
from lorabench.runtime.memory import release_memory
from lorabench.runtime.signals import map_in_order
from lorabench.store import checkpoints
from lorabench.store.records import Record, Store
from lorabench.sweep import protocol
from lorabench.training.precision import device_count, resolve
from lorabench.training.train import Listener, train

CORES_PER_WORKER = 8  # cores a CPU worker: more threads than that have little to do in one part


def worker_count(asked: int | None, device: str, packs: int) -> int:
    """Return how many processes train so many packs.

    asked: None is one a GPU where there are several, and on a CPU one for every `CORES_PER_WORKER` cores.
    """
    if asked is None:
        if device == "cuda":
            asked = torch.cuda.device_count()
        else:
            asked = len(_cores()) // CORES_PER_WORKER if device == "cpu" else 1
    return max(1, min(asked, packs))


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@runtime_checkable
class Crew(Protocol):
    """Who trains packs elsewhere; a context manager. `train` means what `training.train.train` does, `map` what `map`
    does."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *args: Any) -> None: ...
    def map(self, one: Callable[[Pack], list[Record]], packs: Sequence[Pack]) -> Iterable[list[Record]]: ...
    def train(
        self, pack: Pack, store: Store, listener: Listener, *, keep: Collection[str], accept_drift: bool = False
    ) -> list[Record]: ...


class Workers:
    """Processes that train packs; use as a context. `train` has the meaning of `train.train`, `map` that of `map`.

    A pack whose worker died goes on from its last checkpoint in a new one, as long as each worker gets further than the
    one before. SIGTERM and Ctrl-C are handed on: each worker writes a checkpoint and leaves. shares: how many the CPU's
    cores are meant for; where fewer packs are left each has as many threads as before, and so the same numbers.
    """

    def __init__(self, count: int, device: str, shares: int | None = None) -> None:
        self.count, self.device, self.shares = count, device, shares or count
        self._free: queue.Queue[_Worker] = queue.Queue()
        self._lock = Lock()
        self._ending = Event()

    def __enter__(self) -> Workers:
        devices = max(1, torch.cuda.device_count()) if self.device == "cuda" else self.count
        self._all = [_Worker(i % devices, self.shares, self.device) for i in range(self.count)]
        for worker in self._all:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(self.count)
        self._before = signal.getsignal(signal.SIGTERM)
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, self._end)
        return self

    def _end(self, *args: Any) -> None:
        self._ending.set()
        for worker in self._all:
            worker.terminate()

    def __exit__(self, *args: Any) -> None:
        self._end()  # Ctrl-C is heard here alone, wherever it was met: the workers write their checkpoints
        self._threads.shutdown(cancel_futures=True)
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, self._before)
        for worker in self._all:
            worker.stop()

    def map(self, one: Callable[[Pack], list[Record]], packs: Sequence[Pack]) -> Iterator[list[Record]]:
        return map_in_order(self._threads, one, packs)

    def train(
        self, pack: Pack, store: Store, listener: Listener, *, keep: Collection[str], accept_drift: bool = False
    ) -> list[Record]:
        worker = self._free.get()
        heard = self._serialized_calls(listener)
        try:
            while not self._ending.is_set():
                began = checkpoints.last_step(store.root, pack.id) or 0
                try:
                    return worker.train(pack, store, heard, keep, accept_drift, self._ending)
                except BrokenProcessPool:
                    if self._ending.is_set():
                        break
                    worker.restart()
                    if (checkpoints.last_step(store.root, pack.id) or 0) <= began:
                        return protocol.record_death(
                            pack, store, listener, keep, "its worker process died (killed, or out of memory)"
                        )
            raise SystemExit(143)
        finally:
            self._free.put(worker)

    def _serialized_calls(self, listener: Listener) -> dict[str, Callable[..., None]]:
        """Return the listener's calls by name; only one is made at a time."""

        def call(name: str) -> Callable[..., None]:
            def heard(*args: Any) -> None:
                with self._lock:
                    getattr(listener, name)(*args)

            return heard

        return {name: call(name) for name in protocol.EVENTS}


class _Worker:
    """One process, and the channel on which it says what happens."""

    def __init__(self, index: int, shares: int, device: str) -> None:
        self.own = index, shares, device
        self.restart()

    def restart(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel = context.Queue()
        self.pool = ProcessPoolExecutor(1, context, _begin, (*self.own, self.channel))

    def terminate(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.terminate()

    def stop(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.kill()  # records are atomic; what it was at goes on from a checkpoint
        self.pool.shutdown(wait=False, cancel_futures=True)

    def train(
        self,
        pack: Pack,
        store: Store,
        heard: dict[str, Callable[..., None]],
        keep: Iterable[str],
        accept_drift: bool,
        ending: Event,
    ) -> list[Record]:
        runs = [run.to_dict() for run in pack.runs]
        lease = str(store.lease) if store.lease else None
        told = pack.id, runs, pack.prune, str(store.root), lease, list(keep), accept_drift
        future = self.pool.submit(_train, *told)
        while not (future.done() and self.channel.empty()):
            if ending.is_set():  # told again: when it was told first its process may not have been there
                self.terminate()
            with suppress(queue.Empty):
                protocol.dispatch(heard, self.channel.get(timeout=0.1))
        return protocol.unpack_result(future.result())


_channel: Any = None  # of this worker


def _begin(index: int, shares: int, device: str, channel: Any) -> None:
    """In the worker, before CUDA is looked at and before the first product: its device or cores, and its end with the
    parent's. All workers have as many threads: a pack may go on in any of them."""
    global _channel
    _channel = channel
    protocol.die_with_parent()
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    else:
        cores = _cores()
        own = cores[index * len(cores) // shares : (index + 1) * len(cores) // shares] or cores
        torch.set_num_threads(max(1, len(cores) // shares))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, own)


def _train(
    pack_id: str,
    runs: list[dict[str, Any]],
    prune: bool,
    root: str,
    lease: str | None,
    keep: list[str],
    accept_drift: bool,
) -> tuple[str, Any]:
    """In the worker: train a pack, and say how it ended. A worker that then waits holds no memory of it: the others'
    packs may need it."""
    pack = Pack(pack_id, tuple(RunConfig.from_dict(r) for r in runs), prune=prune)
    store, listener = Store(root, lease), protocol.QueueListener(_channel)
    try:
        return protocol.run_and_report(lambda: train(pack, store, listener, keep=keep, accept_drift=accept_drift))
    finally:
        release_memory()


def share_count(planned: Sequence[Pack], asked: int | None) -> int:
    """Into how many the cores or devices are cut, whichever of the planned packs are left to train: threads are part of
    a number, and a pack that goes on after a kill, as the last of several, must have those it was begun with. Halves of
    a pack that did not fit count as one. 1: a pack on several devices has processes of its own."""
    if not planned or any(device_count(pack.runs[0].trainer) > 1 for pack in planned):
        return 1
    packs = {pack.id.partition(".")[0] for pack in planned}
    return worker_count(asked, resolve(planned[0].runs[0]).device, asked or len(packs))


def make_workers(packs: Sequence[Pack], cut: int) -> Workers | None:
    """Return processes for packs side by side, or None where one is enough. cut: what `share_count` gives."""
    count = min(cut, len(packs))
    return Workers(count, resolve(packs[0].runs[0]).device, cut) if count > 1 else None


@contextmanager
def worker_threads(cut: int) -> Iterator[None]:
    """Give this process as many threads as a worker would have inside the block. cut: what `share_count` gives; 1
    changes nothing."""
    before = torch.get_num_threads()
    if cut > 1:
        torch.set_num_threads(max(1, len(_cores()) // cut))
    try:
        yield
    finally:
        if cut > 1:
            torch.set_num_threads(before)
