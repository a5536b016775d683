"""The process that mirrors a sweep to W&B: it hears which runs live and reads the rest from their records.

A sweep never waits for W&B. What is not sent yet stands in the records, so a slow or absent server leaves no gap and no
queue grows. `WandbTracker` starts this process and writes one JSON message a line to its stdin:

    {"do": "start", "run", "config", "method", "tags"}    {"do": "finish", "run"}    {"do": "report", "dir", "tables"}
    {"do": "rest"}: a phase is over; runs without a record were stopped
    {"do": "close", "alone"}: no more will come; alone: this process may go on after the sweep's

It answers on stdout:

    {"say": a line for the terminal}    {"why": the reason why something is not sent}    {"alone": true}
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabench.config.errors import ExistingWork
from lorabench.runtime.leases import Lease
from lorabench.store.records import Record, Store
from lorabench.trackers.wandb import report as wandb_report
from lorabench.trackers.wandb import runs
from lorabench.trackers.wandb.server import Server, ServerUnavailable, api_key, base_url
from lorabench.trackers.wandb.state import REPORT, SENDING, Agent, mark_arrived, mark_pending

LOOK_EVERY = 0.5  # seconds between looks at the histories of live runs
CORE_SHARE, MAX_REST = 0.05, 10.0  # of a core while the sweep goes on, and the longest rest in seconds
MIN_AGE = 15.0  # seconds: a run that ends sooner is sent whole, which costs half of following it
PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds after a server's first, second, ... silence in a row
MAX_ERRORS = 3  # of W&B's client, after which a run is given up
END_PING_TIMEOUT = 0.5  # seconds in which a server must answer at the sweep's end to be worth waiting for
MAX_ALONE = 600.0  # seconds that this process goes on after the sweep's at most
ORPHAN_GRACE = 2.0  # seconds that it goes on where the sweep's process died

Tell = Callable[..., None]  # writes its keyword arguments to the sweep's process, as one message


@dataclass
class Live:
    """A run that is training, or that has ended and is not at the server yet."""

    run_id: str
    config: Mapping[str, Any]
    method: str
    tags: list[str]
    record: Record | None = None  # there once it has ended
    wandb_run: Any = None
    last_step: int = -1  # that was logged
    history_size: int = -1  # bytes, when it was last read
    errors: int = 0
    since: float = field(default_factory=time.monotonic)


@dataclass
class Follower:
    """Keeps W&B's runs at what the records say. say: prints one line on the sweep's terminal."""

    target: runs.Target
    say: Callable[[str], None]
    live: dict[str, Live] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    silences: int = 0  # of the server, in a row
    resume_at: float = 0.0
    why: str = ""  # the last reason why something was not sent

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take a message of the sweep's process."""
        kind, run_id = message["do"], message.get("run", "")
        if kind == "start":
            before = self.live.get(run_id)
            self.live[run_id] = fresh = Live(run_id, message["config"], message["method"], message["tags"])
            if before:  # a pack that starts again: the same run goes on, its rows come again
                fresh.wandb_run, fresh.last_step = before.wandb_run, before.last_step
        elif kind == "finish" and run_id in self.live:
            self.live[run_id].record = self.target.store.read(run_id)
        elif kind == "report":
            self.report = dict(message)
        elif kind == "rest":  # the W&B run of a stopped run goes on when the sweep does
            for stopped in [i for i, one in self.live.items() if one.record is None]:
                del self.live[stopped]

    def turn(self) -> None:
        """Look once at every run. A server that does not answer ends the turn and makes the next ones wait."""
        if time.monotonic() < self.resume_at:
            return
        try:
            for one in list(self.live.values()):
                self._try(one)
            if self.report and not self.live:
                wandb_report.send(self.target, Path(self.report["dir"]), self.report["tables"])
                self._arrive(REPORT)
            self.silences = 0
        except ServerUnavailable as e:
            if not self.silences:
                self.say(f"{e}; the records hold everything, tried again from time to time")
            self.why = str(e)
            self.resume_at = time.monotonic() + PAUSES[min(self.silences, len(PAUSES) - 1)]
            self.silences += 1
        except Exception as e:  # of the sweep's report: its runs are there
            self.why, self.report = f"{type(e).__name__}: {e}", None

    @property
    def idle(self) -> bool:
        return not self.live and self.report is None

    def _try(self, one: Live) -> None:
        try:
            self._advance(one)
        except ServerUnavailable:
            raise
        except Exception as e:
            one.errors, one.wandb_run = one.errors + 1, None
            self.why = " ".join(f"{type(e).__name__}: {e}".split())
            if one.errors >= MAX_ERRORS:
                del self.live[one.run_id]  # it stays pending
            elif self.target.server is not None:
                self.target.server.ping()  # raises where the server's silence is what the client reports

    def _advance(self, one: Live) -> None:
        """Open the run if it is not, log the steps that are complete, and end it once its record is there."""
        server = self.target.server
        if one.wandb_run is None and one.record is not None and server is not None:
            runs.send(self.target, runs.missing(self.target, one.record))  # cut off, or over before it was opened
            self._arrive(one.run_id)
            return
        if one.wandb_run is None and one.record is None and time.monotonic() < one.since + MIN_AGE:
            return
        if one.wandb_run is None:
            remote = server.run(self.target.wandb_id(one.run_id)) if server else None
            one.last_step, one.history_size = remote.last_step if remote else -1, -1
            one.wandb_run = self.target.open(one.run_id, one.config, method=one.method, tags=one.tags)
        self._log(one)
        if one.record is not None:
            if server is not None:
                server.ping()  # ending waits for the server
            wandb_run, one.wandb_run = one.wandb_run, None
            self.target.end(wandb_run, one.record)
            if server is not None:
                runs.check_arrived(self.target, one.record)
            self._arrive(one.run_id)

    def _arrive(self, run_id: str) -> None:
        if run_id == REPORT:
            self.report = None
        else:
            del self.live[run_id]
        mark_arrived(self.target.store, run_id)

    def _log(self, one: Live) -> None:
        """Log the steps that are complete. Several rows may share a step, until a later one begins or the run ends."""
        path = self.target.store.run_dir(one.run_id) / "history.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size == one.history_size and one.record is None:
            return
        one.history_size = size
        rows = runs.history_steps(self.target.store.history(one.run_id))
        new = [(step, values) for step, values in (rows if one.record else rows[:-1]) if step > one.last_step]
        runs.log(one.wandb_run, new)
        one.last_step = new[-1][0] if new else one.last_step


def serve(follower: Follower, messages: queue.Queue[dict[str, Any] | None], opening: float = 0.0) -> None:
    """Follow the runs until the sweep has closed and all is sent, or until the server is silent after that.

    Message None: the sweep's process died. opening: seconds of a core that starting W&B's client takes. The mirror
    rests for them before its first look, so that a sweep which is over soon is sent after its end.
    """
    closing, resumes = False, time.monotonic() + opening / CORE_SHARE
    while not (closing and (follower.idle or follower.silences)):
        try:
            while True:
                message = messages.get(timeout=LOOK_EVERY)
                if message is None:
                    return
                if message["do"] == "close":
                    closing, follower.resume_at = True, 0.0
                else:
                    follower.hear(message)
                if messages.empty():
                    break
        except queue.Empty:
            pass
        if closing or time.monotonic() >= resumes:
            before = time.process_time()
            follower.turn()
            took = time.process_time() - before
            resumes = time.monotonic() + min(MAX_REST, took * (1 / CORE_SHARE - 1))


class Listener:
    """Hands messages on to `serve` from a thread of its own, since W&B's client may hang in the main one.

    Ends this process where nobody waits for it any more.
    """

    def __init__(self, target: runs.Target, messages: queue.Queue[dict[str, Any] | None], tell: Tell) -> None:
        self.target, self.messages, self.tell = target, messages, tell
        self.lease: Lease | None = None

    def run(self, lines: Iterable[str]) -> None:
        """Read until the sweep's process closes its end, which it does last."""
        alone = False
        for line in lines:
            message = json.loads(line)
            if message["do"] == "start":
                mark_pending(self.target.store, message["run"])
            elif message["do"] == "close":
                self._check_server()
                if alone := message["alone"]:
                    self._go_on_alone()
            self.messages.put(message)
        if not alone:
            self.messages.put(None)
            time.sleep(ORPHAN_GRACE)
            self.exit()

    def exit(self, why: str = "") -> None:
        """End this process without W&B's exit hook, which would wait for a server that does not answer."""
        self.tell(why=why)
        if self.lease is not None:
            self.lease.release()
        os._exit(0)

    def _check_server(self) -> None:
        """End this process if the server does not answer now."""
        try:
            if self.target.server is not None:
                self.target.server.ping(END_PING_TIMEOUT)
        except ServerUnavailable as e:
            self.exit(str(e))

    def _go_on_alone(self) -> None:
        """Take the lease under which nobody else sends what is left, and limit how long this goes on."""
        with suppress(OSError, ExistingWork):  # of a sweep that cannot be written any more
            self.lease = self.target.store.leases.take(SENDING)
        timer = threading.Timer(MAX_ALONE, self.exit)
        timer.daemon = True
        timer.start()
        self.tell(alone=True)


def main() -> None:
    """Run the process. argv: {"dir", "sweep", "project", "entity", "mode", "artifacts", "agent", "opening"} as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's: it says when to end
    if hasattr(os, "nice"):
        os.nice(10)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print, W&B's own process among them, goes to stderr

    def tell(**message: Any) -> None:
        with suppress(OSError):  # nobody listens any more
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    settings = json.loads(sys.argv[1])
    try:
        follower = Follower(_target(settings), lambda text: tell(say=text))
        messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        listener = Listener(follower.target, messages, tell)
        threading.Thread(target=listener.run, args=(sys.stdin,), daemon=True).start()
        serve(follower, messages, settings["opening"])
        listener.exit(follower.why)
    except Exception as e:
        tell(why=f"{type(e).__name__}: {e}")
    os._exit(0)


def _target(settings: Mapping[str, Any]) -> runs.Target:
    server = None
    if settings["mode"] == "online":
        key = api_key()
        if key is None:
            raise ValueError("tracker.mode=online, and no key: set WANDB_API_KEY, or run `wandb login`")
        server = Server(base_url(), key, settings["project"], settings["entity"])
    return runs.Target(
        Store(Path(settings["dir"])),
        settings["sweep"],
        settings["project"],
        settings["entity"],
        server,
        settings["mode"],
        settings["artifacts"],
        Agent(**settings["agent"]) if settings["agent"] else None,
    )


if __name__ == "__main__":
    main()
