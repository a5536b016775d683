"""One pack on several devices: a process each, started here and not by Lightning.

Lightning's own launcher runs the command line again in each process, and so the whole multirun; these run one pack.
Where a pack has several nodes, each of them starts its own processes, and somebody else has started this one on each
(`Node`).
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from lorabench.config.runs import Pack, RunConfig
from lorabench.runtime import signals
from lorabench.store.records import Record, Store
from lorabench.sweep import protocol
from lorabench.training import distributed
from lorabench.training.precision import device_count
from lorabench.training.train import Listener
from lorabench.training.train import train as train_alone


@dataclass(frozen=True)
class Node:
    """This machine's place among those of a pack. address, port: where the first one's first process waits for all
    others; over: whether another node has said how the pack ended."""

    index: int
    address: str
    port: int
    over: Callable[[], bool]


def train(
    pack: Pack,
    store: Store,
    listener: Listener | None = None,
    *,
    keep: Collection[str] = (),
    accept_drift: bool = False,
    node: Node | None = None,
) -> list[Record]:
    """`train.train`, in as many processes as `trainer.devices` asks for; the first of them writes the records.

    Raises `distributed.ProcessLost` when one of them died: nothing is recorded. SIGTERM is handed on: all leave at one
    step, with a checkpoint. node: where `trainer.num_nodes` is more than one. Of those, all but the first return no
    records.
    """
    world = device_count(pack.runs[0].trainer)
    if world == 1:
        return train_alone(pack, store, listener, keep=keep, accept_drift=accept_drift)
    listener, node = listener or Listener(), node or Node(0, "127.0.0.1", free_port(), lambda: False)
    kind, value = message = _Group(pack, store, listener, keep, accept_drift, node).end()
    if kind != "failed":
        return protocol.unpack_result(message)
    if node.index:
        raise RuntimeError(value[0]["error"])  # its task ends, and all others of the job with it
    return protocol.write_records([Record(**r) for r in value], store, listener, keep)


class _Group:
    """The processes of one pack on this machine."""

    def __init__(
        self, pack: Pack, store: Store, listener: Listener, keep: Collection[str], accept_drift: bool, node: Node
    ) -> None:
        self.listener, self.over = listener, node.over
        context = multiprocessing.get_context("spawn")
        self.channel: Any = context.Queue()
        trainer = pack.runs[0].trainer
        world = device_count(trainer)
        here = world // trainer.num_nodes
        runs, meet = [run.to_dict() for run in pack.runs], (node.index, node.address, node.port)
        root = (str(store.root), str(store.lease) if store.lease else None)
        told = (here, world, meet, pack.id, runs, pack.prune, root, list(keep), accept_drift, self.channel)
        self.processes = [context.Process(target=_rank, args=(local, *told), daemon=True) for local in range(here)]

    def end(self) -> protocol.Message:
        """Wait for the end and return what the first process to end says of it.

        Raises `ProcessLost` when one died, and `SystemExit` at SIGTERM.
        """
        with signals.defer_stop() as stopped:
            try:
                # They inherit the mask: a handler, Lightning's own too, would break what they do together
                # (`signals.watch_for_sigterm`).
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
                try:
                    for process in self.processes:
                        process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                return self._listen(stopped)
            finally:
                for process in self.processes:
                    process.kill()  # all of them are done, or one is gone and the others wait for it
                    process.join()

    def _listen(self, stopped: Callable[[], bool]) -> protocol.Message:
        calls = {name: getattr(self.listener, name) for name in protocol.EVENTS}
        up: list[int] = []
        calls["up"] = up.append
        told = False
        while True:
            if stopped() and not told:
                if len(up) < len(self.processes):
                    return "stopped", (signals.EXIT_CODE,)
                for process in self.processes:
                    process.terminate()
                told = True
            try:
                message = self.channel.get(timeout=0.1)
            except queue.Empty:
                message = "silence", ()
            dead = [p.exitcode for p in self.processes if p.exitcode]
            if dead and message[0] in ("silence", "gone"):
                raise distributed.ProcessLost(f"a process of the pack died (exit code {dead[0]})")
            if message[0] in calls:
                protocol.dispatch(calls, message)
            elif message[0] != "silence":
                return message
            elif self.over():
                return "records", []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(
    local: int,
    here: int,
    world: int,
    meet: tuple[int, str, int],
    pack_id: str,
    runs: list[dict[str, Any]],
    prune: bool,
    root: tuple[str, str | None],
    keep: list[str],
    accept_drift: bool,
    channel: Any,
) -> None:
    """Join the group in one of its processes, and train; the first process says what happens."""
    protocol.die_with_parent()
    signals.watch_for_sigterm(lambda: channel.put(("stopped", (signals.EXIT_CODE,))))
    channel.put(("up", (local,)))
    node, address, port = meet
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(local),
        "NODE_RANK": str(node),
    }
    if world == here:
        distributed.stay_on_loopback()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    rank = node * here + local
    distributed.join(rank, world)
    pack = Pack(pack_id, tuple(RunConfig.from_dict(r) for r in runs), prune=prune)
    store, listener = Store(*root), protocol.QueueListener(channel) if rank == 0 else Listener()
    end = protocol.run_and_report(lambda: train_alone(pack, store, listener, keep=keep, accept_drift=accept_drift))
    if rank and end[0] == "records":
        end = ("failed", end[1])  # what the first does not know of: it writes what it has trained itself
    if end[0] != "failed" or end[1]:
        channel.put(end)
    with suppress(KeyboardInterrupt):
        signal.pause()  # the parent ends all of them at once: a process that leaves early would break the group's last word
