"""One pack on several devices of this machine: a process each, started here and not by Lightning.

Lightning's own launcher runs the command line again in each process, and so the whole multirun; these run one pack.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch

from lorabench import messages, replicas
from lorabench.config import RunConfig
from lorabench.prepare import Pack, device_count
from lorabench.records import Record, Store
from lorabench.train import Listener
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
        return messages.died(pack, store, listener, keep, str(e))


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
        calls = {name: getattr(self.listener, name) for name in messages.EVENTS}
        while True:
            try:
                message = self.channel.get(timeout=0.1)
            except queue.Empty:
                dead = [p.exitcode for p in self.processes if p.exitcode]
                if dead:
                    raise _Died(f"a process of the pack died (exit code {dead[0]})") from None
                continue
            if message[0] not in calls:
                return messages.result(message)
            messages.heard(calls, message)


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
    messages.belong_to_parent()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
    }  # fmt: skip
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    replicas.join(rank, world)
    pack = Pack(pack_id, tuple(RunConfig.from_dict(r) for r in runs), prune=prune)
    store, listener = Store(*root), messages.telling(channel) if rank == 0 else Listener()
    end = messages.ended(lambda: train_alone(pack, store, listener, keep=keep, accept_drift=accept_drift))
    if rank == 0 or end[0] != "records":
        channel.put(end)
    channel.close()
    channel.join_thread()
    with suppress(KeyboardInterrupt):
        signal.pause()  # the parent ends all of them at once: a process that leaves early would break the group's last word
