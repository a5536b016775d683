"""Weights & Biases: one W&B run a slice, grouped by sweep. Offline unless there is a key to be online with.

A process of its own (`lorabench.trackers.wandb.mirror`) reads the records and talks to W&B. Training never waits for
W&B, and a process can be ended where W&B's client would wait on.
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
from lorabench.runtime import signals
from lorabench.runtime.files import atomic_write
from lorabench.runtime.terminal import say
from lorabench.store.records import Record, Store, dump_json
from lorabench.trackers.contract import Row, Tracker
from lorabench.trackers.wandb.runs import client_environment, method_name, run_tags
from lorabench.trackers.wandb.server import api_key
from lorabench.trackers.wandb.state import REPORT, Agent, abandoned_runs, is_pending, mark_pending, write_agent_id

WAIT_SHARE, MAX_WAIT = 0.02, 60.0  # of a sweep's time that its end waits for W&B, and seconds at most
MIN_WAIT_IN_JOB = 10.0  # seconds that the end of a job waits at least: the mirror's process ends with it
MAX_WAIT_STOPPED = 2.0  # seconds that a sweep which was told to stop waits
START_UP = 5.0  # more seconds in which a mirror that may go on alone says so; it may still be starting
ANNOUNCE_AFTER = 1.0  # seconds after which a wait is announced
OPENING = 2.0  # seconds of a core that W&B's client takes before it sends anything
MAX_MESSAGES = 100_000  # that may wait for the mirror's process; a message starts or ends a run
TARGET_FILE = ".wandb/target.json"  # in the sweep's directory: the project it went to, for `lorabench.sync`

_left_alone: list[subprocess.Popen[str]] = []  # mirrors that go on; one that is forgotten would be warned of
running: dict[tuple[Path, str, TrackerConfig], WandbTracker] = {}  # one for all phases of a sweep and its report


def build(settings: TrackerConfig, *, sweep: str, sweep_dir: Path) -> WandbTracker:
    """Return the sweep's tracker in this process. A new one is made where its mirror has ended or goes on alone."""
    key = (sweep_dir.resolve(), sweep, settings)
    if key not in running or running[key].process.poll() is not None or running[key].may_go_on:
        running[key] = WandbTracker(settings, sweep, Store(sweep_dir))
    return running[key]


class WandbTracker(Tracker):
    """Tells the mirror's process which runs start and end. Offline, W&B's files lie in `<run dir>/wandb`.

    `close` waits for nothing: what is left is sent while the sweep goes on to its next phase or its report. When this
    process ends, `leave` waits a little. Then the mirror goes on alone, or is ended and what is left is named.
    """

    def __init__(self, settings: TrackerConfig, sweep: str, store: Store) -> None:
        self.store, self.began = store, time.monotonic()
        self.live: set[str] = set()
        self.to_arrive: dict[str, None] = {}  # runs that have ended here, in order, and the report
        self.stopped = False  # in the middle of training
        self.may_go_on, self.why = False, ""  # what the mirror has said
        self.mode = resolve_mode(settings.mode)
        self.agent = Agent.from_environment()  # its run is the first that starts here
        self.process = self._start_mirror(settings, sweep)
        self.outbox: queue.Queue[str] = queue.Queue(MAX_MESSAGES)
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._write, self._read)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.leave)
        for record in abandoned_runs(store) if self.mode != "disabled" else ():
            config = record.config
            self._begin(record.run_id, config, method_name(config), run_tags(config))
            self._finish(record.run_id)

    def _start_mirror(self, settings: TrackerConfig, sweep: str) -> subprocess.Popen[str]:
        agent, mode = self.agent, self.mode
        project = (agent and agent.project) or settings.project
        entity = (agent and agent.entity) or settings.entity
        where = {"project": project, "entity": entity}
        if mode != "disabled":
            atomic_write(self.store.root / TARGET_FILE, dump_json(where))
        mirror_settings = {
            **where,
            "dir": str(self.store.root.resolve()),
            "sweep": sweep,
            "mode": mode,
            "artifacts": settings.artifacts,
            "agent": asdict(agent) if agent else None,
            "opening": 0.0 if agent else OPENING,
        }
        home = str(Path(__file__).resolve().parents[3])
        python_path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-m", "lorabench.trackers.wandb.mirror", json.dumps(mirror_settings)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=client_environment() | {"PYTHONPATH": python_path},
            start_new_session=True,
        )

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        self.live.add(run_id)
        if self.agent:
            write_agent_id(self.store, run_id, self.agent)
            self.agent = None
        self._begin(run_id, config, method, tags)

    def log(self, run_id: str, row: Row) -> None:
        """Do nothing: the row stands in the run's history, where the mirror reads it."""

    def finish(self, run_id: str, record: Record) -> None:
        self.live.discard(run_id)
        self._finish(run_id)

    def report(self, report_dir: Path, tables: Mapping[str, Any]) -> None:
        mark_pending(self.store, REPORT)
        self.to_arrive[REPORT] = None
        self._send(do="report", dir=str(report_dir.resolve()), tables=tables)

    def close(self) -> None:
        self.stopped = self.stopped or bool(self.live)  # runs without a record
        self.live.clear()
        self._send(do="rest")
        if multiprocessing.parent_process() is not None:  # such a process ends without its exit hooks
            self.leave()

    def leave(self) -> None:
        """Wait a little for what is still to be sent. Then the mirror goes on alone, or ends and what is left is
        printed."""
        atexit.unregister(self.leave)
        stopped, in_job = self.stopped or signals.is_stopping(), ends_with_its_parent()
        wait = min(MAX_WAIT, max(WAIT_SHARE * (time.monotonic() - self.began), MIN_WAIT_IN_JOB if in_job else 0.0))
        wait = MAX_WAIT_STOPPED if stopped else wait
        alone = not (stopped or in_job)
        self._send(do="close", alone=alone)
        going_on, unfinished = False, f"not done {wait:.0f} s after the end"
        try:
            going_on = self._wait_for_mirror(wait, alone=alone)
        except (KeyboardInterrupt, SystemExit):
            unfinished = "the wait was broken off"
            if multiprocessing.parent_process() is not None:  # else this is the end anyway
                raise
        finally:
            if self.process.poll() is not None:
                unfinished = "the mirror's process died"
            if going_on:
                _left_alone.append(self.process)
            else:
                self.process.kill()
                self.process.wait()
            self.outbox.put_nowait("")  # closes its stdin
        for thread in () if going_on else self.threads:
            thread.join(1.0)
        self._print_left(going_on, unfinished)

    def _wait_for_mirror(self, wait: float, *, alone: bool) -> bool:
        """Wait until the mirror's process ends, `wait` seconds at most. Return whether it goes on alone after that."""
        began, announced = time.monotonic(), False
        while True:
            try:
                self.process.wait(0.05)
                return False
            except subprocess.TimeoutExpired:
                waited = time.monotonic() - began
            if waited >= wait and (self.may_go_on or not alone or waited >= wait + START_UP):
                return self.may_go_on
            if waited >= ANNOUNCE_AFTER and not announced:
                announced = True
                say("tracker wandb: waiting for W&B", error=True)

    def _print_left(self, going_on: bool, unfinished: str) -> None:
        if self.mode == "offline" and self.to_arrive:
            why = "as asked" if api_key() else "there is no WANDB_API_KEY and no `wandb login`"
            sync = f"once there is one, python -m lorabench.sync {self.store.root} sends the sweep from its records"
            print(f"tracker wandb: offline ({why}): nothing was sent; {sync}", file=sys.stderr)
        left = [name for name in self.to_arrive if is_pending(self.store, name)]
        runs = [name for name in left if name != REPORT]
        again = f"python -m lorabench.sync {self.store.root} sends what is missing"
        if going_on:
            counts = [f"{len(runs)} run{'s' * (len(runs) != 1)}"] * bool(runs) + ["the report"] * (REPORT in left)
            what = " and ".join(counts) or "the last values"
            say(f"tracker wandb: still sent in the background: {what}; {again}", error=True)
        elif left:
            names = [*runs, *(["the report"] if REPORT in left else [])]
            who = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            why = self.why or unfinished
            say(f"tracker wandb: not at W&B: {who} ({why}); the records are complete; {again}", error=True)

    def _begin(self, run_id: str, config: Mapping[str, Any], method: str, tags: list[str]) -> None:
        mark_pending(self.store, run_id)
        self._send(do="start", run=run_id, config=config, method=method, tags=tags)

    def _finish(self, run_id: str) -> None:
        self.to_arrive[run_id] = None
        self._send(do="finish", run=run_id)

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
                message = json.loads(line)
                if "say" in message:
                    say(f"tracker wandb: {message['say']}", error=True)
                elif "alone" in message:
                    self.may_go_on = True
                else:
                    self.why = message["why"]


def ends_with_its_parent() -> bool:
    """Return whether what this process starts must end with it.

    That is so in a worker, in a job of a cluster, and in an agent's run, which W&B takes for over when the process is.
    """
    in_worker = multiprocessing.parent_process() is not None
    return in_worker or "SLURM_JOB_ID" in os.environ or Agent.from_environment() is not None


def resolve_mode(asked: str) -> str:
    """Return W&B's mode. For `auto` it is that of WANDB_MODE, else online with a key and offline without one."""
    mode = asked if asked != "auto" else os.environ.get("WANDB_MODE") or ("online" if api_key() else "offline")
    return {"run": "online", "shared": "online", "dryrun": "offline"}.get(mode, mode)
