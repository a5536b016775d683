"""W&B against a loopback server: what arrives is what was recorded, through outages, resumes and later syncs."""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.wandb_server import KEY, Bucket, WandbServer, silence
from lorabench import sync
from lorabench.config.settings import TrackerConfig
from lorabench.store.records import Record, Store
from lorabench.trackers import make_tracker
from lorabench.trackers.wandb import mirror, report, runs
from lorabench.trackers.wandb import tracker as parent
from lorabench.trackers.wandb.mirror import Follower
from lorabench.trackers.wandb.server import Server, ServerUnavailable, api_key
from lorabench.trackers.wandb.state import SENDING, abandoned_runs, mark_pending

RUNS = ("0123456789ab", "ba9876543210", "aaaabbbbcccc")
CONFIG: dict[str, Any] = {
    "method": {"name": "lora", "r": 8, "alpha": 16.5, "target_modules": ["query"]},
    "optimizer": {"lr": 1e-3},
    "seed": 3,
    "model": {"name": "minilm"},
    "task": {"name": "tweets"},
    "role": "confirm",
}
ROWS = [{"step": s, "train/loss": 1 / s, "lr": 0.1} for s in range(1, 21)]
ROWS[10:10] = [{"step": 10, "val/loss": 0.8, "val/accuracy": 0.71}]
STEPS = list(range(1, 21))


@pytest.fixture(scope="session")
def _server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        if "wandb" in sys.modules:
            import wandb

            wandb.teardown()


@pytest.fixture
def server(_server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WandbServer:
    """Running, empty, and what every client here talks to: nothing leaves the machine."""
    _server.start()
    _server.reset()
    for key, value in {
        **runs.QUIET,
        "WANDB_BASE_URL": _server.url,
        "WANDB_API_KEY": KEY,
        "NETRC": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(key, value)
    return _server


@pytest.fixture
def store(sweep_dir: Path) -> Store:
    return Store(sweep_dir)


def record(run_id: str, status: str = "completed", **changes: Any) -> Record:
    metrics = {"val/accuracy": 0.74, "test/accuracy": 0.73, "primary": "accuracy", "best_step": 10}
    resources = {"train_seconds": 2.5, "trainable_parameters": 4096}
    return Record(run_id, "confirm", status, CONFIG, metrics, resources, **changes)


def to(server: WandbServer | None, store: Store, **changes: Any) -> runs.Target:
    client = Server(server.url, KEY, "lorabench", None, timeout=20) if server else None
    return runs.Target(store, "my sweep", "lorabench", None, client, "online" if server else "offline", **changes)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process runs are opened when they begin, however short they are."""
    monkeypatch.setattr(mirror, "MIN_AGE", 0.0)
    monkeypatch.setattr(parent, "OPENING", 0.0)


def follow(target: runs.Target, *run_ids: str, said: list[str] | None = None) -> Follower:
    follower = Follower(target, (said if said is not None else []).append)
    for run_id in run_ids:
        follower.hear({"do": "start", "run": run_id, "config": CONFIG, "method": "lora", "tags": ["minilm", "tweets"]})
    return follower


def end(follower: Follower, *run_ids: str, **changes: Any) -> None:
    for run_id in run_ids:
        follower.target.store.write(record(run_id, **changes))
        follower.hear({"do": "finish", "run": run_id})


def turns(follower: Follower, until: Callable[[], bool]) -> None:
    """Turn until it is so; an outage's pause is skipped."""
    for _ in range(60):
        follower.resume_at = 0.0
        follower.turn()
        if until():
            return
        time.sleep(0.2)
    raise AssertionError((follower.why, follower.live))


def until(it_is_so: Callable[[], bool]) -> None:
    for _ in range(900):
        if it_is_so():
            return
        time.sleep(0.1)
    raise AssertionError("not within 90 s")


def bucket(server: WandbServer, run_id: str, sweep: str = "my sweep") -> Bucket:
    return server.runs[f"me/lorabench/{runs.wandb_id(sweep, run_id)}"]


def arrived(server: WandbServer, run_id: str, rows: list[dict[str, Any]] = ROWS, sweep: str = "my sweep") -> Bucket:
    """The run, after checking that its history is the records': no gap, nothing twice, no line written over."""
    run, want = bucket(server, run_id, sweep), runs.history_steps(rows)
    assert run.steps == [step for step, _ in want] and not run.faults
    for step, values in want:
        row = next(r for r in run.history if r["_step"] == step)
        assert {k: row[k] for k in values} == values
    return run


def test_several_live_runs_arrive_as_recorded(server: WandbServer, store: Store) -> None:
    follower = follow(to(server, store), *RUNS)
    for k in range(0, len(ROWS), 4):  # interleaved, as a pack writes them
        for run_id in RUNS:
            store.append_history(run_id, ROWS[k : k + 4])
        follower.turn()
    end(follower, RUNS[0])
    end(follower, RUNS[1], status="diverged", error="the loss was not finite")
    end(follower, RUNS[2], status="failed", error="no more")
    turns(follower, lambda: follower.idle)
    assert not follower.why
    for run_id in RUNS:
        run = arrived(server, run_id)
        assert run.fields["groupName"] == "my sweep" and run.fields["jobType"] == "lora"
        assert run.fields["tags"] == ["minilm", "tweets"]
        assert run.fields["displayName"] == "lora r=8 alpha=16.5 lr=0.001 seed=3"
        assert {key: run.config[key]["value"] for key in CONFIG} == CONFIG
        assert run.history[9]["val/accuracy"] == 0.71 and run.history[9]["train/loss"] == 0.1  # one row a step
        assert run.summary["val/accuracy"] == 0.74 and run.summary["test/accuracy"] == 0.73  # the record's
        assert run.summary["resources/trainable_parameters"] == 4096 and run.summary["run_id"] == run_id
        assert run.sent == 20
    ends = [(bucket(server, i).exit_code, bucket(server, i).summary["status"]) for i in RUNS]
    assert ends == [(0, "completed"), (0, "diverged"), (1, "failed")]
    assert bucket(server, RUNS[1]).summary["error"] == "the loss was not finite"
    assert not {name for i in RUNS for name in bucket(server, i).files} - {"wandb-summary.json", "config.yaml"}


def test_a_server_that_is_down_at_the_start_gets_everything_later(server: WandbServer, store: Store) -> None:
    said: list[str] = []
    server.stop()
    follower = follow(to(server, store), *RUNS[:2], said=said)
    for run_id in RUNS[:2]:
        store.append_history(run_id, ROWS)
    follower.turn()
    follower.turn()  # in its pause: asks nothing
    assert follower.silences == 1 and len(follower.live) == 2
    assert len(said) == 1 and "does not answer" in said[0] and "Connection refused" in said[0]
    end(follower, *RUNS[:2])
    server.start()
    turns(follower, lambda: follower.idle)
    assert [arrived(server, i).summary["status"] for i in RUNS[:2]] == ["completed"] * 2
    assert len(said) == 1


def test_an_outage_leaves_no_gap_and_nothing_twice(server: WandbServer, store: Store) -> None:
    follower = follow(to(server, store), *RUNS[:2])
    for run_id in RUNS[:2]:
        store.append_history(run_id, ROWS[:8])
    follower.turn()
    turns(follower, lambda: bool(bucket(server, RUNS[0]).history))  # the first rows are there
    server.stop()
    for run_id in RUNS[:2]:
        store.append_history(run_id, ROWS[8:])
    follower.turn()
    end(follower, *RUNS[:2])
    follower.turn()
    assert follower.silences and len(follower.live) == 2  # kept, not ended
    server.start()
    turns(follower, lambda: follower.idle)
    for run_id in RUNS[:2]:
        assert arrived(server, run_id).exit_code == 0


@pytest.mark.parametrize(("status", "words"), [(401, "the key is refused"), (500, "the server failed")])
def test_a_server_that_refuses_costs_nothing_but_the_mirror(
    status: int, words: str, server: WandbServer, store: Store
) -> None:
    said: list[str] = []
    server.refuse = status
    follower = follow(to(server, store), RUNS[0], said=said)
    store.append_history(RUNS[0], ROWS)
    end(follower, RUNS[0])
    for _ in range(3):
        follower.resume_at = 0.0
        follower.turn()
    assert len(said) == 1 and words in said[0] and KEY not in said[0]
    assert follower.silences == 3 and not server.runs
    server.refuse = 0
    turns(follower, lambda: follower.idle)
    arrived(server, RUNS[0])


def test_a_slow_server_gets_all_of_it(server: WandbServer, store: Store) -> None:
    server.delay = 0.25
    follower = follow(to(server, store), RUNS[0])
    store.append_history(RUNS[0], ROWS)
    end(follower, RUNS[0])
    turns(follower, lambda: follower.idle)
    assert arrived(server, RUNS[0]).sent == 20 and not follower.why


def test_rows_that_were_refused_are_missed_and_sent_again(
    server: WandbServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's client reports no failure when it gives up on a stream; the server's own count does."""
    monkeypatch.setattr(runs, "FINISH_TIMEOUT", 0.5)
    monkeypatch.setattr(runs, "ARRIVAL_PAUSES", (0.0,))
    follower = follow(to(server, store), RUNS[0])
    store.append_history(RUNS[0], ROWS)
    server.refuse_streams = True
    end(follower, RUNS[0])
    follower.turn()
    assert follower.silences == 1 and "has 0 of 20 history rows" in follower.why
    server.refuse_streams = False
    monkeypatch.setattr(runs, "FINISH_TIMEOUT", 30.0)
    turns(follower, lambda: follower.idle)
    assert bucket(server, RUNS[0]).steps == STEPS


def test_a_run_resumed_from_a_checkpoint_goes_on_where_the_server_is(server: WandbServer, store: Store) -> None:
    """Rows above the checkpoint come again: what the server has is not sent twice."""
    first = follow(to(server, store), RUNS[0])
    store.append_history(RUNS[0], ROWS[:14])
    first.turn()
    first.live[RUNS[0]].wandb_run.finish(exit_code=1)  # what is left of a killed process reaches the server
    assert bucket(server, RUNS[0]).steps == list(range(1, 13))  # step 13 was not complete
    store.reset_history(RUNS[0])
    store.append_history(RUNS[0], ROWS[:6])
    again = follow(to(server, store), RUNS[0])
    again.turn()
    store.append_history(RUNS[0], ROWS[6:])
    again.turn()
    end(again, RUNS[0])
    turns(again, lambda: again.idle)
    run = arrived(server, RUNS[0])
    assert run.sent == 20 and run.exit_code == 0


def test_a_pack_that_starts_again_in_one_process_goes_on(server: WandbServer, store: Store) -> None:
    """Too little memory: the pack trains in halves, from the start, with the W&B runs open already."""
    follower = follow(to(server, store), RUNS[0])
    store.append_history(RUNS[0], ROWS[:10])
    follower.turn()
    store.reset_history(RUNS[0])
    follower.hear({"do": "start", "run": RUNS[0], "config": CONFIG, "method": "lora", "tags": ["minilm"]})
    store.append_history(RUNS[0], ROWS[:3])
    follower.turn()
    store.append_history(RUNS[0], ROWS[3:])
    end(follower, RUNS[0])
    turns(follower, lambda: follower.idle)
    assert arrived(server, RUNS[0]).sent == 20


def test_a_run_that_failed_once_and_then_completed_says_so(server: WandbServer, store: Store) -> None:
    for status, error in (("failed", "no memory"), ("completed", None)):
        follower = follow(to(server, store), RUNS[0])
        store.reset_history(RUNS[0])
        store.append_history(RUNS[0], ROWS)
        end(follower, RUNS[0], status=status, error=error)
        turns(follower, lambda f=follower: f.idle)  # type: ignore[misc]
    run = arrived(server, RUNS[0])
    assert run.summary["status"] == "completed" and "error" not in run.summary


def test_an_adapter_is_an_artifact_if_asked(server: WandbServer, store: Store) -> None:
    folder = store.run_dir(RUNS[0]) / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    follower = follow(to(server, store, artifacts=True), RUNS[0])
    store.append_history(RUNS[0], ROWS)
    end(follower, RUNS[0])
    turns(follower, lambda: follower.idle)
    (artifact,) = server.artifacts.values()
    assert artifact["state"] == "COMMITTED" and artifact["files"]["adapter_config.json"] == b'{"r": 8}'
    assert bucket(server, RUNS[0]).summary["adapter"] == f"adapter-{runs.wandb_id('my sweep', RUNS[0])}"
    assert runs.missing(to(server, store, artifacts=True), record(RUNS[0])).is_nothing and len(server.artifacts) == 1


# -- the whole tracker, with its process -----------------------------------------------------------------------------


def track(store: Store, *run_ids: str, sweep: str = "my sweep", **settings: Any) -> Any:
    tracker = make_tracker(TrackerConfig(name="wandb", **settings), sweep=sweep, sweep_dir=store.root)
    assert tracker is not None
    for run_id in run_ids:
        tracker.start(run_id, CONFIG, method="lora", tags=["minilm"])
    for row in ROWS:
        for run_id in run_ids:
            store.append_history(run_id, [row])
            tracker.log(run_id, row)
    for run_id in run_ids:
        store.write(record(run_id))
        tracker.finish(run_id, record(run_id))
    return tracker


def leave(tracker: Any) -> None:
    """As at the end of a sweep and of its process."""
    with patient():
        tracker.close()
        tracker.tracker.leave()


@contextmanager
def patient() -> Iterator[None]:
    """An end has time enough for a machine that does other things, too, and does not announce that it waits."""
    with pytest.MonkeyPatch.context() as m:
        for name, value in {
            "MAX_WAIT": 90.0,
            "MAX_WAIT_STOPPED": 90.0,
            "WAIT_SHARE": math.inf,
            "ANNOUNCE_AFTER": math.inf,
        }.items():
            m.setattr(parent, name, value)
        yield


def test_the_tracker_sends_and_no_key_is_left_anywhere(
    server: WandbServer, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = track(store, *RUNS[:2])
    argv = Path(f"/proc/{tracker.tracker.process.pid}/cmdline")
    assert not argv.is_file() or KEY.encode() not in argv.read_bytes()
    leave(tracker)
    assert "".join(capsys.readouterr()) == ""
    for run_id in RUNS[:2]:
        arrived(server, run_id)
    assert any(server.keys)  # it was used
    offline = track(store, RUNS[2], mode="offline")
    leave(offline)
    said = capsys.readouterr().err
    assert said.startswith("tracker wandb: offline (as asked): nothing was sent; ") and said.count("\n") == 1
    assert f"python -m lorabench.sync {store.root} sends" in said
    assert list(store.run_dir(RUNS[2]).glob("wandb/offline-run-*/*.wandb"))
    assert runs.wandb_id("my sweep", RUNS[2]) not in {r.name for r in server.runs.values()}
    files = [p for p in store.root.rglob("*") if p.is_file()]
    assert len(files) > 10 and not [p for p in files if KEY.encode() in p.read_bytes()]


@pytest.mark.parametrize("kind", ["down", "refusing", "slow", "absent"])
def test_a_bad_server_is_not_waited_for_and_a_sync_sends_the_rest(
    kind: str, server: WandbServer, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten minutes would do even for a slow server. That runs are left shows that nothing waited."""
    monkeypatch.setattr(parent, "WAIT_SHARE", 0.0)
    with ExitStack() as stack:
        if kind == "down":
            server.stop()
        elif kind == "refusing":
            server.refuse = 500
        elif kind == "slow":
            server.delay = 1.0
        else:
            monkeypatch.setenv("WANDB_BASE_URL", stack.enter_context(silence()))
        tracker = track(store, *RUNS, sweep=store.root.name)
        process = tracker.tracker.process
        until(lambda: kind != "slow" or bool(server.runs))  # the first of its runs is begun
        tracker.close()
        tracker.tracker.leave()
    assert process.poll() is not None
    *before, last = [line for line in capsys.readouterr().err.splitlines() if "waiting for W&B" not in line]
    assert len(before) <= 1 and all("tried again" in line for line in before)
    assert re.search(r"not at W&B: (\w{12}(, )?){3} \(http://127\.0\.0\.1:", last)  # every run by name, and why
    why = {"down": "Connection refused", "refusing": "HTTP 500", "slow": "does not answer", "absent": "does not answer"}
    assert why[kind] in last and f"python -m lorabench.sync {store.root} sends what is missing" in last
    assert [r.status for r in store.records()] == ["completed"] * 3
    server.start()
    until(lambda: not (server.connections or wandb_core(process.pid)))  # what was under way is over
    server.delay, server.refuse = 0.0, 0
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    assert sync.main([str(store.root)]) == 0
    for run_id in RUNS:
        assert arrived(server, run_id, sweep=store.root.name).summary["status"] == "completed"
    capsys.readouterr()
    assert sync.main([str(store.root)]) == 0
    assert "3 of 3 ended runs are there; 0 history rows to send" in capsys.readouterr().out


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror's process hears nothing and says nothing."""
    begin, code = subprocess.Popen, "import time; time.sleep(3600)"
    monkeypatch.setattr(parent.subprocess, "Popen", lambda argv, **how: begin([sys.executable, "-c", code], **how))


@pytest.mark.usefixtures("hanging")
def test_a_wait_that_is_broken_off_ends_the_mirrors_process(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parent, "START_UP", 3600.0)
    tracker = track(store, RUNS[0]).tracker
    before = signal.signal(signal.SIGALRM, ctrl_c)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        tracker.leave()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tracker.process.poll() is not None
    assert f"not at W&B: {RUNS[0]} (the wait was broken off)" in capsys.readouterr().err


def wandb_core(parent: int) -> bool:
    """Whether the process that W&B's client began for this parent is there; False where that cannot be told."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"--pid\0%d\0" % parent in path.read_bytes():
                return True
    return False


def test_what_is_left_goes_on_alone_where_the_server_answers(
    server: WandbServer, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parent, "WAIT_SHARE", 0.0)
    monkeypatch.setattr(parent, "START_UP", 90.0)
    server.delay = 0.25
    tracker = track(store, *RUNS)
    process = tracker.tracker.process
    tracker.close()
    tracker.tracker.leave()
    said = capsys.readouterr().err
    assert f"still sent in the background: 3 runs; python -m lorabench.sync {store.root} sends what is missing" in said
    holder = store.leases.holder(SENDING)
    assert holder and holder.pid == process.pid and not list(abandoned_runs(store))  # nobody else sends them meanwhile
    server.delay = 0.0
    process.wait(90)
    assert store.leases.holder(SENDING) is None
    for run_id in RUNS:
        arrived(server, run_id)


def test_an_end_does_not_wait_for_what_goes_on_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """import json, sys, time
while json.loads(sys.stdin.readline())["do"] != "close": pass
print(json.dumps({"alone": True}), flush=True)
time.sleep(3600)"""
    begin = subprocess.Popen
    monkeypatch.setattr(parent.subprocess, "Popen", lambda argv, **how: begin([sys.executable, "-c", code], **how))
    for name, value in {"ANNOUNCE_AFTER": math.inf, "START_UP": 600.0}.items():
        monkeypatch.setattr(parent, name, value)
    first = track(store, *RUNS).tracker
    first.close()
    first.leave()
    said = capsys.readouterr().err
    assert f"still sent in the background: 3 runs; python -m lorabench.sync {store.root} sends what is missing" in said
    assert first.process.poll() is None
    second = track(store, *RUNS).tracker  # the next sweep of this process has one of its own
    assert second is not first
    for tracker in (first, second):
        tracker.process.kill()
        tracker.process.wait()
    second.leave()


def test_a_sync_waits_for_what_still_sends(
    server: WandbServer, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(store, *RUNS)
    code = f"""import time; from pathlib import Path; from lorabench.store.records import Store
from lorabench.trackers.wandb.state import SENDING
lease = Store(Path({str(store.root)!r})).leases.take(SENDING)
print("on", flush=True)
time.sleep(1)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "on\n"
        assert sync.main([str(store.root)]) == 0
        assert store.leases.holder(SENDING) is None
        assert f"waiting for process {other.pid} on" in capsys.readouterr().err


def test_a_mirror_rests_while_a_sweep_trains_and_hurries_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half second it looks, for a second of CPU. It first rests for what the client's start costs."""
    clock, busy, turns = [0.0], [0.0], list[float]()

    class Heard:
        def get(self, timeout: float) -> dict[str, Any]:
            clock[0] += timeout
            if clock[0] == 20.0:
                return {"do": "close"}
            raise queue.Empty

        def empty(self) -> bool:
            return True

    class Busy:
        silences, resume_at = 0, 0.0

        @property
        def idle(self) -> bool:
            return len(turns) == 6

        def turn(self) -> None:
            busy[0] += 1.0
            turns.append(clock[0])

    fake = SimpleNamespace(monotonic=lambda: clock[0], process_time=lambda: busy[0])
    monkeypatch.setattr(mirror, "time", fake)
    mirror.serve(Busy(), Heard())  # type: ignore[arg-type]
    assert turns == [0.5, 10.5, 20.0, 20.5, 21.0, 21.5]
    clock[0], busy[0] = 0.0, 0.0
    turns.clear()
    mirror.serve(Busy(), Heard(), opening=0.7)  # type: ignore[arg-type]
    assert turns == [14.0, 20.0, 20.5, 21.0, 21.5, 22.0]


def test_a_run_that_is_over_soon_is_sent_whole(
    server: WandbServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "MIN_AGE", math.inf)
    follower = follow(to(server, store), *RUNS)
    for run_id in RUNS:
        store.append_history(run_id, ROWS)
    follower.turn()
    assert not server.runs
    end(follower, *RUNS)
    turns(follower, lambda: follower.idle)
    for run_id in RUNS:
        arrived(server, run_id)


@pytest.mark.usefixtures("hanging")
def test_runs_that_nobody_had_time_for_are_named_too(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WAIT_SHARE", "START_UP"):
        monkeypatch.setattr(parent, name, 0.0)
    tracker = track(store, *RUNS).tracker
    tracker.leave()
    assert tracker.process.poll() is not None
    assert f"not at W&B: {', '.join(RUNS)} (not done 0 s after the end)" in capsys.readouterr().err


def test_phases_of_a_sweep_share_one_process(server: WandbServer, store: Store) -> None:
    """Tuning ends, confirmation begins: no wait between them, and what tuning left is sent meanwhile."""
    tuned = track(store, RUNS[0])
    tuned.start(RUNS[1], CONFIG, method="lora", tags=[])  # stopped: it has no record
    tuned.close()
    confirmed = track(store, RUNS[2])
    assert confirmed.tracker.process is tuned.tracker.process
    leave(confirmed)
    arrived(server, RUNS[0])
    arrived(server, RUNS[2])


def test_what_a_killed_launcher_had_not_sent_the_next_one_sends(server: WandbServer, store: Store) -> None:
    """Runs ended whose mirror died with its launcher. Nothing trains them again."""
    finished(store, *RUNS[:2])
    for run_id, start in zip(RUNS, ("1", None), strict=False):  # of a process that is no more, of this one
        mark_pending(store, run_id)
        path = store.root / ".wandb/begun" / run_id
        path.write_text(json.dumps(json.loads(path.read_text()) | ({"start": start} if start else {})))
    half = to(server, store)
    run = half.open(RUNS[0], CONFIG, method="lora", tags=[])
    runs.log(run, runs.history_steps(ROWS)[:7])
    run.finish()
    bucket(server, RUNS[0]).exit_code = None
    tracker = track(store, RUNS[2])
    until(lambda: [run.state for run in server.runs.values()] == ["finished"] * 2)
    leave(tracker)
    for run_id in (RUNS[0], RUNS[2]):
        assert arrived(server, run_id).sent == 20 and bucket(server, run_id).state == "finished"
    assert len(server.runs) == 2 and [p.name for p in (store.root / ".wandb/begun").iterdir()] == [RUNS[1]]


def test_online_without_a_key_is_said_once(
    server: WandbServer, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    leave(track(store, *RUNS, mode="online"))
    said = capsys.readouterr().err
    assert said.count("set WANDB_API_KEY") == 1 and said.count("\n") == 1
    assert not server.operations


@pytest.mark.slow
def test_a_killed_sweep_leaves_nothing_running_and_its_runs_go_on(server: WandbServer, store: Store) -> None:
    """SIGKILL in the middle: the mirror's process ends by itself, the next one continues the runs."""
    code = f"""
import sys, time, os, signal
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]!r}
from test_wandb import *
parent.OPENING = 0.0
store = Store(Path({str(store.root)!r}))
tracker = make_tracker(TrackerConfig(name="wandb"), sweep="my sweep", sweep_dir=store.root)
tracker.start(RUNS[0], CONFIG, method="lora", tags=["minilm"])
print(tracker.tracker.process.pid, flush=True)
store.append_history(RUNS[0], ROWS[:14])
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as sweep:
        assert sweep.stdout
        child = int(sweep.stdout.readline())
        for _ in range(600):  # a run that is young is not opened yet
            if server.runs and bucket(server, RUNS[0]).history:
                break
            time.sleep(0.1)
        sweep.kill()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
    store.reset_history(RUNS[0])
    leave(track(store, RUNS[0]))
    arrived(server, RUNS[0])


@pytest.fixture
def sweep(cli: Callable[..., tuple[int, str]], tmp_path: Path) -> Callable[..., str]:
    """A real sweep of two tuning and four confirmation runs on a tiny base; returns what it said."""
    from fixtures.runs import make_base, make_data
    from lorabench.trackers.wandb.tracker import running

    base, data = make_base(tmp_path / "base", "bert"), make_data(tmp_path / "data.csv")

    def run(*more: str) -> str:
        code, out = cli(
            "-m",
            "method.r=1,4",
            "sweep.confirm_seeds=[7,8]",
            "sweep.name=s",
            "model=hf",
            f"model.source={base}",
            "model.name=tiny",
            "task=text_file",
            f"task.file={data}",
            "task.max_length=32",
            "trainer.max_steps=6",
            "trainer.batch_size=4",
            "trainer.precision=64",
            "trainer.accelerator=cpu",
            *more,
        )
        with patient():
            for tracker in running.values():
                if tracker.process.poll() is None:
                    tracker.leave()
        assert code == 0, out
        return out

    return run


@pytest.mark.slow
def test_a_sweep_its_report_and_its_verdicts_arrive_and_no_key_is_written(
    server: WandbServer, sweep: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = sweep("tracker=wandb", "tracker.artifacts=true")
    out += "".join(capsys.readouterr())
    assert "tracker wandb" not in out and KEY not in out
    store = Store("sweeps/s")
    records = store.records()
    assert len(records) == 6
    for one in records:
        run = bucket(server, one.run_id, "s")
        assert run.steps == [step for step, _ in runs.history_steps(store.history(one.run_id))] and not run.faults
        assert run.fields["groupName"] == "s" and run.fields["tags"] == ["tiny", "text file", one.role]
        assert run.summary["val/loss"] == one.metrics["val/loss"] and run.summary["status"] == "completed"
        assert ("test/accuracy" in run.summary) == (one.role == "confirm")
        assert run.summary["verdict/cell"] in {c["id"] for c in store.manifest()["cells"]}
    adapters = {a["artifactCollectionName"] for a in server.artifacts.values() if a["state"] == "COMMITTED"}
    assert {f"adapter-{runs.wandb_id('s', r.run_id)}" for r in records} <= adapters
    assert "report/answer" in bucket(server, "report", "s").summary
    written = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path / "base")]
    assert len(written) > 50 and not [p for p in written if KEY.encode() in p.read_bytes()]


@pytest.mark.slow
def test_a_sweep_without_its_server_is_the_same_sweep(
    server: WandbServer, sweep: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    server.stop()
    said = sweep("tracker=wandb") + "".join(capsys.readouterr())
    assert "does not answer" in said and "python -m lorabench.sync sweeps/s sends what is missing" in said
    assert [r.status for r in Store("sweeps/s").records()] == ["completed"] * 6
    server.start()
    assert sync.main(["sweeps/s"]) == 0
    assert "6 runs brought up to date; report sent" in capsys.readouterr().out
    assert sync.main(["sweeps/s"]) == 0
    assert "6 of 6 ended runs are there; 0 history rows to send" in capsys.readouterr().out


# -- sync ------------------------------------------------------------------------------------------------------------


def finished(store: Store, *run_ids: str) -> Store:
    for run_id in run_ids:
        store.append_history(run_id, ROWS)
        store.write(record(run_id))
    store.write_manifest({"schema": 1, "name": store.root.name, "cells": [], "runs": {}, "packs": []})
    return store


def sent(server: WandbServer) -> int:
    return server.operations["file_stream"] + server.operations["UpsertBucket"]


def test_sync_sends_from_the_records_alone_and_once(
    server: WandbServer, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(store, *RUNS)
    assert sync.main([str(store.root), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 are not; 60 history rows to send" in said and "nothing was sent" in said
    assert not server.runs
    assert sync.main([str(store.root)]) == 0
    assert "sent 60 history rows; 3 runs brought up to date" in capsys.readouterr().out
    for run_id in RUNS:
        run = bucket(server, run_id, "test")
        assert run.steps == STEPS and not run.faults and run.sent == 20
        assert run.fields["groupName"] == "test" and run.fields["jobType"] == "lora"
        assert run.fields["tags"] == ["minilm", "tweets", "confirm"]
        assert run.summary["test/accuracy"] == 0.73 and run.exit_code == 0
    before = sent(server)
    for run_id in RUNS:
        shutil.rmtree(store.run_dir(run_id) / "wandb")
    assert sync.main([str(store.root)]) == 0
    assert "3 of 3 ended runs are there; 0 history rows" in capsys.readouterr().out
    assert sent(server) == before


def test_sync_fills_what_is_missing_and_nothing_else(
    server: WandbServer, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(store, *RUNS)
    assert sync.main([str(store.root)]) == 0
    capsys.readouterr()
    cut, holed, bare = (bucket(server, i, "test") for i in RUNS)
    del cut.history[12:]
    del holed.history[5:9]
    del bare.summary["test/accuracy"]
    for run in (cut, holed, bare):
        run.sent = 0
    assert sync.main([str(store.root)]) == 0
    said = capsys.readouterr().out
    assert "2 lack part of their history, 1 lack values of their summary; 23 history rows to send" in said
    assert [run.sent for run in (cut, holed, bare)] == [8, 15, 0]
    for run in (cut, holed, bare):
        assert run.steps == STEPS and not run.faults and run.summary["test/accuracy"] == 0.73


def test_a_sync_sends_nothing_that_a_mirror_has_sent_meanwhile(server: WandbServer, store: Store) -> None:
    finished(store, RUNS[0])
    target = sync.target(store.root, project=None, entity=None, artifacts=False)
    lacks = sync.missing(target, store.records(), {})
    runs.send(target, lacks[0])
    assert sync.send(target, lacks) == (0, [])
    assert arrived(server, RUNS[0], sweep="test").sent == 20


def test_sync_ends_what_is_there_and_not_over(
    server: WandbServer, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sender killed after the last row leaves a crashed run, one that was tried again a failed run."""
    finished(store, *RUNS)
    store.write(record(RUNS[2], status="failed"))
    assert sync.main([str(store.root)]) == 0
    capsys.readouterr()
    crashed, failed, sound = (bucket(server, i, "test") for i in RUNS)
    assert (crashed.state, failed.state, sound.state) == ("finished", "finished", "failed")
    crashed.exit_code, failed.exit_code = None, 1
    assert sync.main([str(store.root)]) == 0
    assert "2 are not over; 0 history rows to send" in capsys.readouterr().out
    assert (crashed.state, failed.state, sound.state) == ("finished", "finished", "failed")
    for run in (crashed, failed, sound):
        assert run.steps == STEPS and not run.faults and run.sent == 20
    assert sync.main([str(store.root)]) == 0
    assert "3 of 3 ended runs are there; 0 history rows" in capsys.readouterr().out


def test_a_run_that_an_agent_of_a_wandb_sweep_started_is_the_agents(
    server: WandbServer,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """W&B's client takes an agent's id and project for whatever it opens. A later sync finds the run by that id."""
    agent = {"WANDB_SWEEP_ID": "sw7", "WANDB_RUN_ID": "abc123", "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team"}
    params = tmp_path / "config.yaml"
    params.write_text("wandb_version: 1\nmethod.r:\n  value: 8\n")
    for key, value in {**agent, "WANDB_SWEEP_PARAM_PATH": str(params)}.items():
        monkeypatch.setenv(key, value)
    leave(track(store, *RUNS[:2]))
    assert capsys.readouterr().err == ""
    for key in (*agent, "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.delenv(key)
    first, second = server.runs["team/theirs/abc123"], server.runs[f"team/theirs/{runs.wandb_id('my sweep', RUNS[1])}"]
    assert len(server.runs) == 2 and first.fields["sweep"] == "sw7" and "sweep" not in second.fields
    for run in (first, second):
        assert run.steps == STEPS and not run.faults and run.state == "finished"
    assert first.summary["run_id"] == RUNS[0] and first.summary["val/accuracy"] == 0.74
    Path(store.root).rename(tmp_path / "my sweep")
    assert sync.main([str(tmp_path / "my sweep")]) == 0
    assert "; 0 history rows to send" in capsys.readouterr().out
    assert len(server.runs) == 2 and first.sent == second.sent == 20


def test_sync_says_what_did_not_arrive(
    server: WandbServer, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FINISH_TIMEOUT", 0.5)
    monkeypatch.setattr(runs, "ARRIVAL_PAUSES", (0.0,))
    finished(store, RUNS[0])
    server.refuse_streams = True
    assert sync.main([str(store.root)]) == 1
    assert f"not sent: {RUNS[0]}: ServerUnavailable: {server.url} has 0 of 20 history rows" in capsys.readouterr().err


def test_sync_refuses_in_one_line(
    server: WandbServer,
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(path: Path) -> str:
        assert sync.main([str(path)]) == 2
        out = capsys.readouterr()
        assert out.out == "" and out.err.count("\n") == 1 and KEY not in out.err
        return out.err

    assert "a directory that `python -m lorabench` wrote" in refusal(tmp_path)
    assert "a directory that" in refusal(tmp_path / "nowhere")
    finished(store, RUNS[0])
    server.refuse = 401
    assert "the key is refused (HTTP 401)" in refusal(store.root)
    server.stop()
    assert "does not answer: Connection refused" in refusal(store.root)
    monkeypatch.delenv("WANDB_API_KEY")
    assert "set WANDB_API_KEY, or run `wandb login`" in refusal(store.root)
    assert not server.operations


def test_sync_goes_where_the_tracker_went(server: WandbServer, store: Store) -> None:
    finished(store, RUNS[0])
    (store.root / ".wandb").mkdir()
    (store.root / ".wandb/target.json").write_text(json.dumps({"project": "other", "entity": "team"}))
    assert sync.main([str(store.root)]) == 0
    assert list(server.runs) == [f"team/other/{runs.wandb_id('test', RUNS[0])}"]


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """A report's folder: a page and one figure."""
    from PIL import Image

    folder = tmp_path / "reports" / "test"
    (folder / "figures").mkdir(parents=True)
    (folder / "report.html").write_text("<p>the answer</p>")
    Image.new("RGB", (4, 4)).save(folder / "figures" / "rank.png")
    return folder


def test_one_run_a_sweep_carries_the_report_and_runs_get_verdicts(
    server: WandbServer, store: Store, rendered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fixtures.sweeps import RANK_SWEEP, build
    from lorabench.report.summary import tracker_summary

    build(store.root, RANK_SWEEP[1:3], examples=200)
    one = store.records()[0]
    runs.send(to(server, store), runs.missing(to(server, store), one))
    tables = tracker_summary(store.root)
    follower = follow(to(server, store))
    follower.hear({"do": "report", "dir": str(rendered), "tables": json.loads(json.dumps(tables))})
    turns(follower, lambda: follower.idle)
    assert not follower.why, follower.why
    run = bucket(server, "report")
    assert run.fields["groupName"] == "my sweep" and run.fields["jobType"] == "report" and run.exit_code == 0
    assert run.summary["report/confirmed"] is True and "LoRA" in run.summary["report/answer"]
    table = next(json.loads(v) for k, v in run.files.items() if k.startswith("media/table/comparison"))
    assert table["columns"] == tables["comparison"]["columns"] and len(table["data"]) == 2
    assert any(b"the answer" in v for k, v in run.files.items() if k.startswith("media/html/report"))
    assert any(k.startswith("media/images/figures/rank") for k in run.files)
    summary = bucket(server, one.run_id).summary
    assert summary["verdict/direction"] in ("reference", "better", "worse", "not resolved")
    assert summary["verdict/reference"] == "lora-r16-a16-all-linear" and summary["val/loss"] == one.metrics["val/loss"]
    before = sent(server)
    assert report.send(to(server, store), rendered, tables) is False
    assert sent(server) == before
    (rendered / "report.html").write_text("<p>another answer</p>")
    assert report.send(to(server, store), rendered, tables) is True
    assert run.steps == [0, 1] and not run.faults


def test_the_report_is_kept_offline_too(server: WandbServer, store: Store, rendered: Path) -> None:
    tables = {"comparison": {"columns": ["method"], "rows": [["LoRA"]]}, "verdicts": {}, "summary": {"report/cells": 1}}
    for _ in range(2):  # a new one takes the old one's place
        assert report.send(to(None, store), rendered, tables)
    assert len(list(store.root.glob(".wandb/wandb/offline-run-*/*.wandb"))) == 1
    assert not server.operations


# -- pure ------------------------------------------------------------------------------------------------------------


def test_steps_are_one_row_each_of_finite_values() -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": None}, {"step": 2, "b": float("nan"), "c": 3}, {"step": 3, "a": 4}]
    assert runs.history_steps(rows) == [(2, {"a": 1.0, "c": 3}), (3, {"a": 4})]


def test_an_answer_that_is_none_of_w_and_b_is_an_error_with_its_reason(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Server(server.url, KEY, "p", None)
    server.refuse = 404
    with pytest.raises(ServerUnavailable, match="the server failed \\(HTTP 404\\)"):
        client.entity()
    server.refuse = 0
    monkeypatch.setattr(server, "answer", lambda name, v: ["a page"])
    with pytest.raises(ServerUnavailable, match="an answer that is none of W&B"):
        client.entity()
    monkeypatch.setattr(server, "answer", lambda name, v: {"viewer": None})
    with pytest.raises(ServerUnavailable, match="does not know this key"):
        client.entity()


@pytest.mark.parametrize("kind", ["hangs", "fails"])
def test_a_server_that_is_there_and_answers_no_question_is_given_up_in_time(
    kind: str, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's client would try again for long."""

    def no_answer(name: str, variables: dict[str, Any]) -> None:
        if kind == "fails":
            raise RuntimeError("the connection ends without an answer")
        over.wait(30.0)

    over = threading.Event()
    monkeypatch.setattr(server, "answer", no_answer)
    began = time.monotonic()
    try:
        with pytest.raises(ServerUnavailable, match="no answer in 0.5 s"):
            Server(server.url, KEY, "p", None, timeout=0.5).entity()
    finally:
        over.set()
    assert time.monotonic() - began < 10.0  # of which W&B's service process takes most to start


def test_the_key_is_the_servers_own(server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert api_key() is None
    (tmp_path / "netrc").write_text("machine somewhere.else login user password other\n")
    assert api_key() is None
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert api_key() == KEY
    assert os.environ["WANDB_BASE_URL"] == server.url


def test_looking_for_a_key_starts_no_process_of_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A launcher asks where a key of `wandb login` would be for; W&B's service would stay beside it to its end."""
    (tmp_path / "netrc").write_text(f"machine wandb.example login user password {KEY}\n")
    settings = tmp_path / ".config/wandb/settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example\n")
    for name, value in {**runs.QUIET, "NETRC": str(tmp_path / "netrc"), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    code = "from lorabench.trackers.wandb.server import api_key; print(api_key(), flush=True); input()"
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline().strip() == KEY
        assert not wandb_core(process.pid)
        process.stdin.write("\n")
    assert process.returncode == 0


# -- the workspace ---------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo / "sweeps"))
    import wandb_workspace

    return wandb_workspace


def test_workspace_panels_name_what_is_written(workspace: Any, repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of the reference sweep's records, histories and figures."""
    from lorabench.report.summary import tracker_summary

    store = Store(repo / "sweeps/ref_rank_sweep")
    verdicts = tracker_summary(store.root)["verdicts"]
    configs: set[str] = set()
    values: set[str] = set()
    rows: set[str] = set()
    for one in store.records():
        configs |= {f"{k}.{x}" for k, v in one.config.items() if isinstance(v, dict) for x in v}
        values |= set(runs.summary(one, verdicts.get(one.run_id)))
        rows |= {key for _, values_at in runs.history_steps(store.history(one.run_id)) for key in values_at}
    figures = {f"figures/{p.stem}" for p in (repo / "reports/ref_rank_sweep/figures").glob("*.png")}
    assert workspace.main(["ref_rank_sweep", "--entity", "me", "--print"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert list(sections) == ["Answer", "Rank", "Rate", "Alpha", "Cost"]
    for panel in (p for panels in sections.values() for p in panels):
        if panel["kind"] == "media":
            assert set(panel["keys"]) <= figures | {"report"}
        elif panel["kind"] == "lines":
            assert panel["y"] in rows and panel["by"] in configs
        else:
            x = panel["x"]
            assert x.removeprefix("summary:") in values if x.startswith("summary:") else x in configs
            assert panel["y"] in values
    assert not [p for p in sections["Rate"] if "test/" in json.dumps(p)]


def test_workspace_without_its_package_is_a_message(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert workspace.main(["s", "--entity", "me"]) == 2
    assert "pip install wandb-workspaces" in capsys.readouterr().err


def test_workspace_is_saved_with_its_panels(server: WandbServer, workspace: Any) -> None:
    pytest.importorskip("wandb_workspaces")
    assert workspace.main(["s", "--entity", "me"]) == 0
    (view,) = server.views
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == ["Answer", "Rank", "Rate", "Alpha", "Cost"]
    assert sections[1]["panels"][0]["config"]["xAxis"] == "config:method.value.r"
