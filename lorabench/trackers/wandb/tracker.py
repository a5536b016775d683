"""Weights & Biases: one W&B run a slice, grouped by sweep. Offline unless there is a key to be online with.

The work is done by a process of its own (`wandb_mirror`) that reads the records: training never waits for W&B, and a
process can be ended where W&B's client would wait on.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorabench.config.settings import TrackerConfig
from lorabench.runtime import signals as stopping
from lorabench.runtime.files import atomic_write
from lorabench.store.records import Record, Store, dump_json
from lorabench.trackers.contract import Row, Tracker
from lorabench.trackers.wandb.api import api_key
from lorabench.trackers.wandb.runs import environment, method, tags
from lorabench.trackers.wandb.state import Agent, begun, left_behind, note_agent

SHARE, MOST = 0.02, 60.0  # of a sweep's time that its end may wait for W&B, and seconds at most
PATIENCE = 600.0  # seconds that the mirror goes on alone after it at most, where the server can have all by then
IN_A_JOB = 10.0  # likewise, where all processes end with this one: the end waits that long
STOPPED = 2.0  # likewise, for a sweep that was told to stop
OPENING = 2.0  # seconds of a core that W&B's client takes before it sends anything: the mirror's work like all other
SAID = 1.0  # seconds after which a wait is announced
GRACE = 5.0  # more seconds for the mirror's process to end by itself
TARGET = ".wandb/target.json"  # in the sweep's directory: the project it went to, for `lorabench.sync`
MESSAGES = 100_000  # that may wait for the mirror's process; a message starts or ends a run


_left: list[subprocess.Popen[str]] = []  # processes that go on: nobody waits for them
_running: dict[
    tuple[Path, str, TrackerConfig], WandbTracker
] = {}  # one process for all phases of a sweep and its report


def build(settings: TrackerConfig, *, sweep: str, sweep_dir: Path) -> WandbTracker:
    key = (sweep_dir.resolve(), sweep, settings)
    if key not in _running or _running[key].process.poll() is not None or _running[key].rest is not None:
        _running[key] = WandbTracker(settings, sweep, Store(sweep_dir))
    return _running[key]


class WandbTracker(Tracker):
    """Tells the mirror's process which runs start and end. Offline, W&B's files lie in `<run dir>/wandb`.

    `close` waits for nothing: what is left is sent while the sweep goes on to its next phase or its report, and `leave`,
    when this process ends, gives it a little time; then the mirror's process goes on alone where the server is worth it.
    """

    def __init__(self, settings: TrackerConfig, sweep: str, store: Store) -> None:
        self.store, self.began = store, time.monotonic()
        self.live: set[str] = set()
        self.stopped = False  # in the middle of training
        self.agent = agent = Agent.here()  # of W&B Sweeps: its run is the first that starts here
        where = {"project": settings.project, "entity": settings.entity}
        where |= {key: own for key in where if (own := getattr(agent, key, None))}
        found = mode(settings.mode)
        if found != "disabled":
            atomic_write(store.root / TARGET, dump_json(where))
        given = {
            "dir": str(store.root.resolve()), "sweep": sweep, **where, "mode": found, "artifacts": settings.artifacts,
            "agent": asdict(agent) if agent else None, "opening": 0.0 if agent else OPENING,
        }  # fmt: skip
        home = str(Path(__file__).resolve().parents[3])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorabench.trackers.wandb.mirror", json.dumps(given)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment() | {"PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
        )  # fmt: skip
        self.outbox: queue.Queue[str] = queue.Queue(MESSAGES)
        self.result: dict[str, Any] | None = None
        self.rest: str | None = None  # what its process goes on to send without this one
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._write, self._read)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.leave)
        for record in left_behind(store) if found != "disabled" else ():
            begun(store, record.run_id)
            about = {"config": record.config, "method": method(record.config), "tags": tags(record.config)}
            self._send(do="start", run=record.run_id, **about)
            self._send(do="finish", run=record.run_id)

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        self.live.add(run_id)
        if self.agent:
            note_agent(self.store, run_id, self.agent)
            self.agent = None
        begun(self.store, run_id)
        self._send(do="start", run=run_id, config=config, method=method, tags=tags)

    def log(self, run_id: str, row: Row) -> None:
        """The row stands in the run's history, where the mirror reads it."""

    def finish(self, run_id: str, record: Record) -> None:
        self.live.discard(run_id)
        self._send(do="finish", run=run_id)

    def report(self, report_dir: Path, tables: Mapping[str, Any]) -> None:
        self._send(do="report", dir=str(report_dir.resolve()), tables=tables)

    def close(self) -> None:
        """Runs without a record were stopped; their W&B runs go on when the sweep does."""
        self.stopped = self.stopped or bool(self.live)
        self.live.clear()
        self._send(do="rest")
        if multiprocessing.parent_process() is not None:  # such a process ends without its exit hooks
            self.leave()

    def leave(self) -> None:
        """Wait for what is still to be sent, a little; then end the process and say what is not at W&B."""
        atexit.unregister(self.leave)
        hurry, job = self.stopped or stopping.is_stopping(), bound()
        share = SHARE * (time.monotonic() - self.began)
        wait = min(STOPPED if hurry else MOST, share)
        most = STOPPED if hurry else max(wait, IN_A_JOB) if job else max(wait, PATIENCE)
        self._send(do="close", wait=wait, most=most, alone=not (hurry or job))
        why = "the mirror's process died"
        mine = (most if hurry or job else wait) + GRACE  # then it has ended, or said that it goes on alone
        over = time.monotonic() + mine
        try:
            if not self._ended(min(SAID, most)):
                print("tracker wandb: waiting for W&B", file=sys.stderr)
                if not self._ended(max(0.0, over - time.monotonic())):
                    why = f"not done {mine:.0f} s after the end"
        except (KeyboardInterrupt, SystemExit):
            why = "the wait was broken off"
            if multiprocessing.parent_process() is not None:  # else this is the end anyway
                raise
        finally:
            if self.rest is None:
                self.process.kill()
                self.process.wait()
            else:
                _left.append(self.process)
        self.outbox.put_nowait("")
        for thread in self.threads if self.rest is None else ():
            thread.join(1.0)
        again = f"python -m lorabench.sync {self.store.root} sends what is missing"
        if self.rest is not None:
            print(f"tracker wandb: still sent in the background: {self.rest}; {again}", file=sys.stderr)
            return
        result = self.result or {"left": ["some runs"], "why": why}
        if left := result["left"]:
            who = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            print(
                f"tracker wandb: not at W&B: {who} ({result['why']}); the records are complete; {again}",
                file=sys.stderr,
            )

    def _ended(self, wait: float) -> bool:
        """Whether the mirror's process ends within so many seconds, or says that it goes on alone."""
        over = time.monotonic() + wait
        while self.rest is None:
            try:
                self.process.wait(max(0.0, min(0.05, over - time.monotonic())))
                return True
            except subprocess.TimeoutExpired:
                if time.monotonic() >= over:
                    return False
        return True

    def _send(self, **message: Any) -> None:
        self.outbox.put_nowait(json.dumps(message, default=str) + "\n")

    def _write(self) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        with suppress(OSError), stdin:  # it has ended, and says why; closing writes what is left, too
            while line := self.outbox.get():
                stdin.write(line)
                stdin.flush()

    def _read(self) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        with stdout:
            for line in stdout:
                said = json.loads(line)
                if "say" in said:
                    print(f"tracker wandb: {said['say']}", file=sys.stderr)
                elif "rest" in said:
                    self.rest = said["rest"]
                else:
                    self.result = said


def bound() -> bool:
    """Whether what this process has started must end with it: it is a worker, a job of a cluster, or an agent's run, which
    W&B takes for over when the process is."""
    return multiprocessing.parent_process() is not None or "SLURM_JOB_ID" in os.environ or Agent.here() is not None


def mode(asked: str) -> str:
    """W&B's mode: as asked; for `auto` what WANDB_MODE says, else online when there is a key, else offline."""
    found = asked if asked != "auto" else os.environ.get("WANDB_MODE") or ("online" if api_key() else "offline")
    return {"run": "online", "shared": "online", "dryrun": "offline"}.get(found, found)
