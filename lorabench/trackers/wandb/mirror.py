"""The process that mirrors a sweep to W&B: it hears which runs live and reads the rest from their records.

A sweep never waits for W&B: what is not sent yet stands in the records, so a slow or absent server leaves no gap, and no
queue grows. Started by `trackers.wandb`, which talks to it in lines of JSON.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lorabench.config.errors import ExistingWork
from lorabench.runtime.leases import Lease
from lorabench.store.records import Record, Store
from lorabench.trackers.wandb import report as wandb_report
from lorabench.trackers.wandb import runs as wb
from lorabench.trackers.wandb.api import Away, Server, api_key, base_url
from lorabench.trackers.wandb.state import SENDING, Agent, arrived, begun

LOOK = 0.5  # seconds between looks at the histories of live runs


DUTY, REST = 0.05, 10.0  # of a core that this takes while the sweep goes on, and the longest rest in seconds


YOUNG = 15.0  # seconds: a run that has ended by then is sent whole, which costs half of following it


PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)  # after a server's first, second, ... silence in a row


TRIES = 3  # at a run that W&B's client itself gives up on


@dataclass
class Live:
    """A run that is training, or that has ended and is not at the server yet."""

    run_id: str
    config: Mapping[str, Any]
    method: str
    tags: list[str]
    record: Record | None = None  # there once it has ended
    run: Any = None  # W&B's
    last: int = -1  # the last step logged
    size: int = -1  # of the history when it was last read
    errors: int = 0
    since: float = field(default_factory=time.monotonic)


@dataclass
class Follower:
    """Keeps W&B's runs at what the records say. say: one line for the sweep's terminal."""

    target: wb.Target
    say: Callable[[str], None]
    live: dict[str, Live] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    silences: int = 0
    resume_at: float = 0.0
    lost: list[str] = field(default_factory=list)
    why: str = ""

    def hear(self, message: Mapping[str, Any]) -> None:
        what, run_id = message["do"], message.get("run", "")
        if what == "start":
            before = self.live.get(run_id)
            self.live[run_id] = fresh = Live(run_id, message["config"], message["method"], message["tags"])
            if before:  # a pack that starts again: the same run goes on, its rows come again
                fresh.run, fresh.last = before.run, before.last
        elif what == "finish" and run_id in self.live:
            self.live[run_id].record = self.target.store.read(run_id)
        elif what == "report":
            self.report = dict(message)
        elif what == "rest":  # what has no record by now was stopped; its W&B run goes on when the sweep does
            for stopped in [i for i, one in self.live.items() if one.record is None]:
                del self.live[stopped]

    def turn(self) -> None:
        """One look at everything; a server that does not answer ends it, until its pause is over."""
        if time.monotonic() < self.resume_at:
            return
        try:
            for one in list(self.live.values()):
                self._try(one)
            if self.report and not self.live:
                wandb_report.bring(self.target, self.report)
                self.report = None
            self.silences = 0
        except Away as e:
            if not self.silences:
                self.say(f"{e}; the records hold everything, tried again from time to time")
            self.why = str(e)
            self.resume_at = time.monotonic() + PAUSES[min(self.silences, len(PAUSES) - 1)]
            self.silences += 1
        except Exception as e:  # of the sweep's report: its runs are there
            self.why, self.report = f"{type(e).__name__}: {e}", None
            self.lost.append("the report")

    @property
    def idle(self) -> bool:
        return not self.live and self.report is None

    @property
    def left(self) -> list[str]:
        """What is not at W&B, as far as this has heard."""
        return [*self.lost, *self.live, *(["the report"] if self.report else [])]

    def _try(self, one: Live) -> None:
        try:
            self._advance(one)
        except Away:
            raise
        except Exception as e:
            one.errors, one.run = one.errors + 1, None
            self.why = " ".join(f"{type(e).__name__}: {e}".split())
            if one.errors >= TRIES:
                del self.live[one.run_id]
                self.lost.append(one.run_id)
            elif self.target.server is not None:
                self.target.server.entity()  # raises Away where it is the server's silence that the client reports

    def _advance(self, one: Live) -> None:
        """Open the run if it is not, log the steps that are complete, end it once its record is there."""
        server, known = self.target.server, self.target.known(one.run_id)
        if one.run is None and one.record is not None and server is not None:
            wb.bring(self.target, one.record)  # it was cut off, or ended before it was opened
            self._arrived(one)
            return
        if one.run is None and one.record is None and time.monotonic() < one.since + YOUNG:
            return
        if one.run is None:
            has = server.run(known) if server else None
            one.last, one.size = has.last_step if has else -1, -1
            one.run = self.target.open(one.run_id, one.config, method=one.method, tags=one.tags)
        self._log(one)
        if one.record is not None:
            if server is not None:
                server.entity()  # ending waits for the server: first see whether it answers
            run, one.run = one.run, None
            self.target.end(run, one.record)
            if server is not None:
                want = wb.steps(self.target.store.history(one.run_id))
                wb.check(server, known, want, self.target.summary(one.record))
            self._arrived(one)

    def _arrived(self, one: Live) -> None:
        del self.live[one.run_id]
        arrived(self.target.store, one.run_id)

    def _log(self, one: Live) -> None:
        """A step is complete once a later one has begun, or the run has ended: train and validation rows share one."""
        path = self.target.store.run_dir(one.run_id) / "history.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size == one.size and one.record is None:
            return
        one.size = size
        found = wb.steps(self.target.store.history(one.run_id))
        new = [(step, values) for step, values in (found if one.record else found[:-1]) if step > one.last]
        wb.log(one.run, new)
        one.last = new[-1][0] if new else one.last


def serve(follower: Follower, heard: queue.Queue[dict[str, Any] | None], opening: float = 0.0) -> None:
    """Until told to close and done, or the server is silent then; or until the sweep's process is gone.

    opening: seconds of a core that are rested for before the first look, as `DUTY` says.
    """
    closing, resumes = False, time.monotonic() + opening / DUTY
    while not (closing and (follower.idle or follower.silences)):
        try:
            while True:
                message = heard.get(timeout=LOOK)
                if message is None:
                    return
                if message["do"] == "close":
                    closing, follower.resume_at = True, 0.0
                else:
                    follower.hear(message)
                if heard.empty():
                    break
        except queue.Empty:
            pass
        if closing or time.monotonic() >= resumes:
            before = time.process_time()
            follower.turn()
            took = time.process_time() - before
            resumes = time.monotonic() + min(REST, took * (1 / DUTY - 1))


def main() -> None:
    """argv: {"dir", "sweep", "project", "entity", "mode", "artifacts", "agent", "opening"} as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's: it says when to end
    if hasattr(os, "nice"):
        os.nice(10)
    out = os.fdopen(os.dup(1), "w")  # for us alone: what others print, and W&B's own process, get stderr
    os.dup2(2, 1)

    def tell(**what: Any) -> None:
        with suppress(OSError):  # nobody listens any more
            out.write(json.dumps(what) + "\n")
            out.flush()

    given = json.loads(sys.argv[1])
    try:
        follower = Follower(_target(given), lambda text: tell(say=text))
        heard: queue.Queue[dict[str, Any] | None] = queue.Queue()
        end = Ending(follower, heard, tell)
        threading.Thread(target=end.listen, args=(sys.stdin,), daemon=True).start()
        serve(follower, heard, given["opening"])
        end()
    except Exception as e:
        tell(left=["every run"], why=f"{type(e).__name__}: {e}")
    os._exit(0)


def _target(given: Mapping[str, Any]) -> wb.Target:
    server = None
    if given["mode"] == "online":
        key = api_key()
        if key is None:
            raise ValueError("tracker.mode=online, and no key: set WANDB_API_KEY, or run `wandb login`")
        server = Server(base_url(), key, given["project"], given["entity"])
    return wb.Target(
        Store(Path(given["dir"])), given["sweep"], given["project"], given["entity"], server, given["mode"],
        given["artifacts"], Agent(**given["agent"]) if given["agent"] else None,
    )  # fmt: skip


if __name__ == "__main__":
    main()


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
