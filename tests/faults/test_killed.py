"""Launchers that die or are stopped, alone and beside others: what comes out in the end is the undisturbed sweep."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorabench.store.records import Store


def begun(folder: Path) -> list[Path]:
    """Runs that are training: a history and no record yet."""
    found = folder.glob("sweeps/s/runs/*/history.jsonl")
    return [p for p in found if not (p.parent / "run.json").exists()]


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_random_kills(fault, launcher, undisturbed, tmp_path, kills):
    """SIGKILL at random"""
    times, folder = random.Random(kills), tmp_path / "0"
    start = time.monotonic()
    assert launcher(folder=tmp_path / "whole").wait()[0] == 0
    whole = time.monotonic() - start
    while fault.tried < kills:
        victim = launcher(folder=folder)
        if victim.ended(times.uniform(0, 0.6 * whole)):  # all is done: on with the next sweep
            assert victim.wait()[0] == 0
            fault.compare(undisturbed, folder / "sweeps/s")
            folder = tmp_path / str(int(folder.name) + 1)
        else:
            victim.kill()
            fault.tried += 1
    assert launcher(folder=folder).wait()[0] == 0
    fault.compare(undisturbed, folder / "sweeps/s")


def test_stopped_with_a_grace_period(fault, launcher, undisturbed, tmp_path):
    """SIGTERM with a grace period"""
    victim = launcher()
    victim.until(lambda: begun(tmp_path))
    victim.signal(signal.SIGTERM)
    assert victim.ended(60), "the grace period is over"
    code, out = victim.wait()
    assert code in (143, -signal.SIGTERM), out
    fault.tried += 1
    assert not list(tmp_path.glob("sweeps/s/locks/p*/*")) or code < 0, "it let go of what it held"
    assert launcher().wait()[0] == 0
    fault.compare(undisturbed, tmp_path / "sweeps/s")


def test_killed_between_a_packs_last_record_and_its_lease(fault, launcher, undisturbed, tmp_path):
    """SIGKILL between the last record and the lease"""
    root = tmp_path / "0/sweeps/s"
    shutil.copytree(undisturbed, root)
    code = f"import os; from pathlib import Path; from lorabench.runtime.leases import Leases; Leases(Path({str(root / 'locks')!r})).take('p0'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9 and list(
        (root / "locks/p0").iterdir()
    )
    fault.tried += 1
    assert launcher(folder=tmp_path / "0").wait()[0] == 0
    fault.compare(undisturbed, root)


@pytest.mark.parametrize("stops", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_random_stops(fault, launcher, undisturbed, tmp_path, stops):
    """SIGTERM at random"""
    times, folder = random.Random(stops), tmp_path / "0"
    start = time.monotonic()
    assert launcher("sweep.measure_solo=true", folder=tmp_path / "whole").wait()[0] == 0
    whole = time.monotonic() - start
    while fault.tried < stops:
        victim = launcher("sweep.measure_solo=true", folder=folder)
        victim.ended(times.uniform(0, 0.8 * whole))
        store = Store(folder / "sweeps/s")
        left = 6 - len(store.records())
        victim.signal(signal.SIGTERM)
        assert victim.ended(60), "the grace period is over"
        code, out = victim.wait()
        assert code == 143 or (code == 0 and left < 2) or not out, f"{code}, with {left} runs left: {out}"
        fault.tried += 1
        if code == 0:  # all is done: on with the next sweep
            fault.compare(undisturbed, folder / "sweeps/s")
            folder = tmp_path / str(int(folder.name) + 1)
    assert launcher(folder=folder).wait()[0] == 0
    fault.compare(undisturbed, folder / "sweeps/s")


OUTSIDE = {
    "preparation": "lorabench.training.preparation:load_data:1",
    "loading the second pack's base": "lorabench.training.preparation:load_base:2",
    "the second pack's records": "lorabench.training.train:make_records:2",
    "the report": "lorabench.report:render:1",
}


@pytest.mark.parametrize("where", OUTSIDE.values(), ids=OUTSIDE)
def test_stopped_outside_training(fault, launcher, undisturbed, tmp_path, where):
    """SIGTERM outside training"""
    victim = launcher("report.enabled=true", lingers=where, small_report=True)
    victim.until((tmp_path / "lingers").exists)
    store = Store(tmp_path / "sweeps/s")
    before = {i: store.stamp(i) for i in store.run_ids() if store.stamp(i)}
    victim.signal(signal.SIGTERM)
    assert victim.ended(60), "the grace period is over"
    code, out = victim.wait()
    assert code == 143, out
    assert "stopped; the same command goes on from here" in out
    fault.tried += 1
    assert not list(tmp_path.glob("sweeps/s/locks/*/*")) and not list(tmp_path.glob("reports/.locks/*/*"))
    assert launcher().wait()[0] == 0
    assert {i: store.stamp(i) for i in before} == before
    fault.compare(undisturbed, store.root)


@pytest.mark.parametrize("count", [2, 4])
def test_launchers_side_by_side(fault, launcher, undisturbed, tmp_path, count):
    """launchers at once"""
    log = tmp_path / "starts"
    report = ["report.enabled=true", "sweep.measure_solo=true"]
    crowd = [launcher(*report, count=str(log), small_report=True) for _ in range(count)]
    ends = [one.wait() for one in crowd]
    fault.tried += count
    assert [code for code, _ in ends] == [0] * count, ends
    fault.compare(undisturbed, tmp_path / "sweeps/s", starts=log)
    assert all("solo" in cell for cell in Store(tmp_path / "sweeps/s").manifest()["cells"])
    assert sorted(p.name for p in (tmp_path / "reports").iterdir()) == ["s"]
    assert (tmp_path / "reports/s/report.html").is_file()


def test_one_of_two_launchers_is_killed(fault, launcher, undisturbed, tmp_path):
    """one of two launchers killed, the other goes on"""
    victim = launcher()
    victim.until(lambda: begun(tmp_path))
    other = launcher()
    victim.kill()
    fault.tried += 1
    assert other.wait()[0] == 0
    fault.compare(undisturbed, tmp_path / "sweeps/s")


def test_who_was_suspended_writes_nothing_once_it_is_taken_for_dead(fault, launcher, undisturbed, tmp_path):
    """a launcher on another machine suspended, its lease taken"""
    asleep = launcher(out_of_sight=True)
    asleep.until(lambda: begun(tmp_path))
    asleep.signal(signal.SIGSTOP)
    code, out = launcher(impatient=0.5).wait()
    assert code == 0, out
    fault.tried += 1
    store = Store(tmp_path / "sweeps/s")
    before = {i: store.stamp(i) for i in store.run_ids()}
    asleep.signal(signal.SIGCONT)
    code, out = asleep.wait()
    assert code == 0, out
    assert {i: store.stamp(i) for i in store.run_ids()} == before
    fault.compare(undisturbed, store.root)


def test_the_clock_is_moved_back(fault, launcher, undisturbed, tmp_path):
    """the clock moved back a day after a launcher died, in sight and out of sight"""
    for troubles in ({}, {"out_of_sight": True}):
        folder = tmp_path / str(len(troubles))
        victim = launcher(folder=folder, **troubles)
        victim.until(lambda folder=folder: begun(folder))
        victim.kill()
        tomorrow = time.time() + 86400
        for path in folder.glob("sweeps/s/**/*"):
            os.utime(path, (tomorrow, tomorrow))
        code, out = launcher(folder=folder, clock=86400, impatient=0.5).wait()
        assert code == 0, out
        fault.tried += 1
        fault.compare(undisturbed, folder / "sweeps/s")


@pytest.mark.slow
def test_a_worker_is_killed(fault, launcher, undisturbed, tmp_path):
    """a worker killed under sweep.workers=2"""
    parent = launcher("sweep.workers=2")
    parent.until(lambda: begun(tmp_path))
    children = [int(p) for f in Path(f"/proc/{parent.pid}/task").glob("*/children") for p in f.read_text().split()]
    busy = max(
        children, key=lambda p: sum(map(int, Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[11:13]))
    )
    os.kill(busy, signal.SIGKILL)
    code, out = parent.wait()
    fault.tried += 1
    if code:  # it died before its first checkpoint: its pack is failed, and says how it trains again
        assert code == 1 and "its worker process died" in out and "sweep.retry_failed=true" in out
        code, out = launcher("sweep.retry_failed=true").wait()
    assert code == 0, out
    fault.compare(undisturbed, tmp_path / "sweeps/s")
