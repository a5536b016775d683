"""How the mirror's process ends: how long a sweep's end waits for W&B, and what is left over, by name."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from lorabench.leases import Lease
from lorabench.schema import ExistingWork
from lorabench.trackers.wandb_api import Away, Server
from lorabench.trackers.wandb_begun import SENDING, begun

if TYPE_CHECKING:
    from lorabench.trackers.wandb_mirror import Follower

PROMPT = 0.5  # seconds in which a server answers that is worth waiting for
QUESTIONS = 10  # that a server answers, about, until it has a run
ORPHAN = 2.0  # seconds after the sweep's process is gone


class Ending:
    """The process's last word, said once, by whichever thread comes first: W&B's client may hang in the other."""

    def __init__(
        self, follower: Follower, heard: queue.Queue[dict[str, Any] | None], tell: Callable[..., None]
    ) -> None:
        self.follower, self.heard, self.tell = follower, heard, tell
        self.lock = threading.Lock()
        self.lease: Lease | None = None

    def listen(self, lines: TextIO) -> None:
        """Hand on what the sweep says, until it closes or is gone; then see to it that this process ends."""
        for line in lines:
            self.heard.put(message := json.loads(line))
            if message["do"] == "close":
                alone = self.go_on_alone if message.get("alone") else None
                self(outlast(self.follower, message["wait"], message["most"], alone))
        self.heard.put(None)
        time.sleep(ORPHAN)
        self()

    def __call__(self, why: str = "") -> None:
        self.lock.acquire()  # for good
        try:
            self._hear_all()
            self.tell(left=self.follower.left, why=self.follower.why if self.follower.silences or not why else why)
        finally:
            if self.lease is not None:
                self.lease.release()
            os._exit(0)  # W&B's own exit hook would wait for a server that does not answer

    def go_on_alone(self) -> None:
        """The sweep's process need not wait: what is left is this one's, and nobody else sends it meanwhile."""
        store, left = self.follower.target.store, self.follower.left
        with suppress(OSError, ExistingWork):  # of a sweep that cannot be written any more
            self.lease = store.leases.take(SENDING)
            for run_id in list(self.follower.live):  # from here on they are this process's, and not left behind
                begun(store, run_id)
        runs = len(left) - left.count("the report")
        parts = [f"{runs} run{'s' * (runs != 1)}"] * bool(runs) + ["the report"] * (len(left) > runs)
        self.tell(rest=" and ".join(parts) or "the last values")

    def _hear_all(self) -> None:
        """Runs that the follower had no time to hear of are left over, too."""
        with suppress(queue.Empty):
            while True:
                if (message := self.heard.get_nowait()) is not None:
                    self.follower.hear(message)


def outlast(follower: Follower, wait: float, most: float, alone: Callable[[], None] | None = None) -> str:
    """Return when what is left has been waited for long enough, and why it is not done.

    wait: seconds for any server. most: seconds for one that answers so fast that what is left arrives by then; for another
    that would be in vain. alone: called once after `wait`, where this goes on for `most`.
    """
    start, why = time.monotonic(), ""
    server = follower.target.server
    time.sleep(max(0.0, wait - PROMPT) if server else wait)
    while not why and (rest := start + most - time.monotonic()) > 0:
        if server:
            why = late(server, min(PROMPT, rest / (QUESTIONS * max(1, len(follower.left)))))
        if alone and not why:
            alone()
            alone = None
        time.sleep(0.0 if why else min(rest, PROMPT))
    return why or f"not done {most:.0f} s after the end"


def late(server: Server, limit: float) -> str:
    """Why a server is not worth waiting for; "" where it answers within `limit` seconds. Takes `PROMPT` seconds at most."""
    said: list[str] = []
    enough = threading.Event()
    over = time.monotonic() + PROMPT

    def ask() -> None:
        while not enough.is_set() and (start := time.monotonic()) < over:
            try:
                server.entity()
            except Away as e:
                said.append(str(e))
                break
            took = time.monotonic() - start
            said.append("" if took <= limit else f"{server.url} takes {took:.2g} s to answer, too long to wait for it")
            if not said[-1]:
                break
        enough.set()

    threading.Thread(target=ask, daemon=True).start()  # a thread: looking up a host's name knows no time limit
    enough.wait(PROMPT)
    return said[-1] if said else f"{server.url} does not answer in {PROMPT:g} s"
