"""One pack on several devices of this machine: a process each, started here and not by Lightning.

Lightning's own launcher runs the command line again in each process, and so the whole multirun; these run one pack.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from lorabench import replicas
from lorabench.config import RunConfig
from lorabench.leases import LeaseLost
from lorabench.outcome import failed
from lorabench.prepare import Pack, device_count
from lorabench.records import Record, Store
from lorabench.schema import ExistingWork, Unwritable
from lorabench.train import Listener, OutOfMemory, SlicesMix
from lorabench.train import train as train_alone


def train(
    pack: Pack,
    store: Store,
    listener: Listener | None = None,
    *,
    keep: Collection[str] = (),
    accept_drift: bool = False,
) -> list[Record]:
    """`train.train`, in as many processes as `trainer.devices` asks for; the first of them writes the records."""
    world = device_count(pack.runs[0].trainer)
    if world == 1:
        return train_alone(pack, store, listener, keep=keep, accept_drift=accept_drift)
    listener = listener or Listener()
    try:
        return _Group(pack, store, listener, keep, accept_drift, world).result()
    except _Died as e:
        records = [
            failed(run, f"{e}; sweep.retry_failed=true goes on from its last checkpoint", "") for run in pack.runs
        ]
    for record in records:
        if record.run_id not in keep:
            store.write(record)
        listener.finish(record)
    return records


class _Died(Exception):
    """A process of a group is gone; its text says how."""


class _Group:
    """The processes of one pack."""

    def __init__(
        self, pack: Pack, store: Store, listener: Listener, keep: Collection[str], accept_drift: bool, world: int
    ) -> None:
        self.listener = listener
        context = multiprocessing.get_context("spawn")
        self.channel: Any = context.Queue()
        runs, port = [run.to_dict() for run in pack.runs], _free_port()
        root = (str(store.root), str(store.lease) if store.lease else None)
        told = (world, port, pack.id, runs, pack.prune, root, list(keep), accept_drift, self.channel)
        self.processes = [context.Process(target=_rank, args=(rank, *told), daemon=True) for rank in range(world)]

    def result(self) -> list[Record]:
        """Raises what `train.train` raises, and `_Died` when one of the processes did."""
        for process in self.processes:
            process.start()
        try:
            return self._listen()
        finally:
            for process in self.processes:
                process.kill()  # all of them are done, or one is gone and the others wait for it
                process.join()

    def _listen(self) -> list[Record]:
        heard: dict[str, Callable[..., None]] = {
            name: getattr(self.listener, name) for name in ("step", "start", "rows", "finish")
        }
        while True:
            try:
                name, args = self.channel.get(timeout=0.1)
            except queue.Empty:
                dead = [p.exitcode for p in self.processes if p.exitcode]
                if dead:
                    raise _Died(f"a process of the pack died (exit code {dead[0]})") from None
                continue
            if name == "records":
                return [Record(**r) for r in args]
            if name == "mix":
                raise SlicesMix(*args)
            if name == "memory":
                raise OutOfMemory(args)
            if name == "drift":
                raise ExistingWork(*args)
            if name == "lost":
                raise LeaseLost(args)
            if name == "unwritable":
                raise Unwritable(*args)
            heard[name](*((RunConfig.from_dict(args[0]),) if name == "start" else args))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(
    rank: int, world: int, port: int, pack_id: str, runs: list[dict[str, Any]], prune: bool, root: tuple[str, str | None],
    keep: list[str],
    accept_drift: bool, channel: Any,
) -> None:  # fmt: skip
    """In a process of the group: join it, train, and as the first of it say what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the group
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with its parent
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
    }  # fmt: skip
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    replicas.join(rank, world)
    pack = Pack(pack_id, tuple(RunConfig.from_dict(r) for r in runs), prune=prune)
    listener = Listener(
        step=lambda step, total: channel.put(("step", (step, total))),
        start=lambda run: channel.put(("start", (run.to_dict(),))),
        rows=lambda run_id, rows: channel.put(("rows", (run_id, rows))),
        finish=lambda record: channel.put(("finish", (record,))),
    )
    try:
        records = train_alone(
            pack, Store(*root), listener if rank == 0 else Listener(), keep=keep, accept_drift=accept_drift
        )
    except SlicesMix as e:
        channel.put(("mix", (e.layer, e.reason)))
    except OutOfMemory as e:
        channel.put(("memory", str(e)))
    except ExistingWork as e:
        channel.put(("drift", (e.key, e.value, e.allowed)))
    except LeaseLost as e:
        channel.put(("lost", str(e)))
    except Unwritable as e:
        channel.put(("unwritable", (e.errno, e.strerror, e.filename)))
    else:
        if rank == 0:
            channel.put(("records", [asdict(r) for r in records]))
    channel.close()
    channel.join_thread()
    with suppress(KeyboardInterrupt):
        signal.pause()  # the parent ends all of them at once: a process that leaves early would break the group's last word
