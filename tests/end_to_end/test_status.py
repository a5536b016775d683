"""Where a sweep is, read from its files: every listed run counts once, whatever state it is in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from lorabench.runtime.leases import Holder
from lorabench.status import main, read
from lorabench.store.records import Record, Store

CONFIG = {"method": {"name": "lora"}, "optimizer": {"lr": 1e-3}, "seed": 0, "trainer": {"max_steps": 40}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Eight runs: two completed, one of each other end, one running (in p0, held by this process), one cut, one waiting."""
    store = Store(tmp_path / "s")
    ids = [f"{i:012x}" for i in range(8)]
    runs = {i: {"role": "tune", "lr": 1e-3, "seed": 0, "config": CONFIG} for i in ids}
    runs[ids[0]]["role"] = "confirm"
    packs = [{"id": "p0", "runs": ids[5:6]}, {"id": "p1", "runs": ids[6:7]}, {"id": "p2", "runs": ids[7:]}]
    store.write_manifest({"schema": 1, "name": "s", "cells": [], "runs": runs, "packs": packs})
    for i, status in zip(ids, ("completed", "completed", "diverged", "pruned", "failed"), strict=False):
        resources = {"pack_seconds": 60.0, "pack_size": 6} if status == "completed" else {}
        error = "ValueError: no\nmore" if status == "failed" else None
        store.write(Record(i, "tune", status, CONFIG, resources=resources, error=error))
    for i in ids[5:7]:
        store.append_history(i, [{"step": 10, "train/loss": 1.0}])
    old = time.time() - 3600
    for i in ids[5:7]:  # what is held runs, however long its next row takes
        os.utime(store.run_dir(i) / "history.jsonl", (old, old))
    lease = store.leases.take("p0")
    assert lease
    with lease:
        yield store


def test_every_run_is_counted_once(store: Store) -> None:
    status = read(store.root)
    assert status.counts == {
        "completed": 2, "diverged": 1, "pruned": 1, "failed": 1, "running": 1, "cut": 1, "waiting": 1
    }  # fmt: skip
    assert sum(status.counts.values()) == status.listed == 8
    assert status.seconds_left == pytest.approx(10 * (3 - 10 / 40))


def test_a_failed_run_that_trains_again_is_running(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record says `failed` until the new one is there; what trains along beside it and keeps its record does not run."""
    failed, manifest = f"{4:012x}", store.manifest()
    store.append_history(failed, [{"step": 10, "train/loss": 1.0}])
    moment = time.time() - 60
    os.utime(store.run_dir(failed) / "history.jsonl", (moment, moment))
    store.write_manifest(manifest | {"packs": [{"id": "p0", "runs": [failed, f"{5:012x}"]}, *manifest["packs"][1:]]})
    assert (read(store.root).counts["failed"], read(store.root).counts["running"]) == (1, 1)
    os.utime(store.run_dir(failed) / "history.jsonl", (moment + 120, moment + 120))
    status = read(store.root)
    assert (status.counts["failed"], status.counts["running"], status.left) == (0, 2, 4)
    assert sum(status.counts.values()) == status.listed
    assert main([str(store.root)]) == 0 and "no reason" not in capsys.readouterr().out


def test_packs_side_by_side_take_less_time(store: Store) -> None:
    lease = store.leases.take("p1")
    assert lease
    with lease:
        assert read(store.root).seconds_left == pytest.approx(10 * (3 - 20 / 40) / 2)


def test_what_is_printed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(store.root)]) == 1
    out = capsys.readouterr().out
    assert "5 of 8 runs have ended (7 tune, 1 confirm)" in out
    assert "failed: ValueError: no\n" in out and "sweep.retry_failed=true" in out
    assert f"running, step 10 of 40, by process {os.getpid()} on {platform.node()} for 0 s" in out
    assert "cut at step 10 of 40, 60 min ago: the sweep's own command trains it again" in out
    assert "time left: about 28 s" in out


def test_a_pack_with_a_checkpoint_says_where_it_goes_on(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The cut run's history ends at step 10, its pack's checkpoint is of step 12; a waiting run of that pack has begun too."""
    manifest = store.manifest()
    runs = [f"{i:012x}" for i in (6, 7)]
    where = store.root / "checkpoints/p3"
    where.mkdir(parents=True)
    for step in (8, 12):
        path = where / f"{step:08d}-{'0' * 64}.safetensors"
        path.touch()
        os.utime(path, (time.time() - 1800,) * 2)
    store.write_manifest(manifest | {"packs": [*manifest["packs"][:1], {"id": "p3", "runs": runs}]})
    assert read(store.root).counts["cut"] == 2
    main([str(store.root)])
    out = capsys.readouterr().out
    assert f"{runs[0]}, {runs[1]} cut at step 12 of 40, 30 min ago: the sweep's own command goes on from step 12" in out


def test_before_the_first_end_and_after_the_last(store: Store) -> None:
    done = [r for r in store.records() if r.status == "completed"]
    manifest = store.manifest()
    store.write_manifest(manifest | {"runs": {r.run_id: manifest["runs"][r.run_id] for r in done}})
    assert read(store.root).seconds_left == 0
    store.write_manifest(manifest | {"runs": {"0" * 11 + "7": manifest["runs"]["0" * 11 + "7"]}})
    assert read(store.root).seconds_left is None


def test_live_ends_when_all_have_ended(store: Store) -> None:
    manifest = store.manifest()
    store.write_manifest(manifest | {"runs": {"0" * 12: manifest["runs"]["0" * 12]}})
    assert main([str(store.root), "--live"]) == 0


def test_adopted_runs_have_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody planned them: there is no sweep.json."""
    store = Store(tmp_path / "mine")
    for k, status in enumerate(("completed", "completed", "failed")):
        store.write(Record(f"{k:012x}", "confirm", status, CONFIG))
    assert main([str(store.root)]) == 1
    assert "mine: 3 of 3 runs have ended (0 tune, 3 confirm): 2 completed, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("made", ["nothing", "folder", "file"])
def test_what_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], made: str) -> None:
    path = tmp_path / "x"
    if made == "folder":
        path.mkdir()
    elif made == "file":
        path.write_text("")
    assert main([str(path)]) == 2
    assert "error: sweep dir=" in capsys.readouterr().err


HOLD = """
import sys, time
from pathlib import Path
from lorabench.runtime.leases import Leases
with Leases(Path(sys.argv[1])).take("p1"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_holder_that_is_killed_no_longer_runs(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A process takes the cut run's pack: it runs, by whom and where; killed, the run is cut again, a moment later."""
    command = [sys.executable, "-c", HOLD, str(store.leases.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            counts = read(store.root).counts
            assert (counts["running"], counts["cut"]) == (2, 0)
            main([str(store.root)])
            assert f"by process {holder.pid} on {platform.node()} for " in capsys.readouterr().out
        finally:
            holder.kill()
    lease = list((store.leases.folder / "p1").iterdir())
    counts = read(store.root).counts
    assert (counts["running"], counts["cut"]) == (1, 1)
    main([str(store.root)])
    assert f"ago (process {holder.pid} on {platform.node()} is gone): the sweep's" in capsys.readouterr().out
    assert list((store.leases.folder / "p1").iterdir()) == lease, "looking changes nothing"


def test_a_pack_that_is_held_and_has_written_nothing_is_being_prepared(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = store.leases.take("p2")
    assert lease
    with lease:
        assert read(store.root).counts["running"] == 2
        main([str(store.root)])
        assert f"{7:012x} running, being prepared, by process {os.getpid()}" in capsys.readouterr().out
    assert read(store.root).counts["waiting"] == 1


@pytest.mark.parametrize(("silent", "running"), [(0, 2), (3600, 1)])
def test_a_holder_on_another_machine_counts_by_its_last_sign(store: Store, silent: float, running: int) -> None:
    nest = store.leases.folder / "p1"
    nest.mkdir()
    (nest / "token").write_text(json.dumps(asdict(Holder("far\x1b[2J", 1, "another boot", "1"))))
    moment = time.time() - silent
    os.utime(nest / "token", (moment, moment))
    assert read(store.root).counts["running"] == running


@pytest.mark.parametrize(("age", "running"), [(0, 2), (3600, 1)])
def test_a_job_of_a_cluster_outlives_its_launcher(
    store: Store, capsys: pytest.CaptureFixture[str], age: float, running: int
) -> None:
    """Nobody holds the lease: what the job writes is the only sign of it."""
    from lorabench.clusters import job

    job.note_job(store, "p1", engine="slurm", job="17\x1b", tries=1)
    moment = time.time() - age
    os.utime(store.run_dir(f"{6:012x}") / "history.jsonl", (moment, moment))
    assert read(store.root).counts["running"] == running
    main([str(store.root)])
    out = capsys.readouterr().out
    gone = "(slurm job 17 is gone, or waits in its queue)"  # a requeued one does: files do not tell
    assert ("by slurm job 17\n" if running == 2 else gone) in out and "\x1b" not in out


def test_a_job_that_has_written_nothing_yet_holds_its_pack(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    from lorabench.clusters import job

    job.note_job(store, "p2", engine="slurm", job="18", tries=1)
    assert read(store.root).counts["waiting"] == 1
    lease = store.leases.take("p2")
    assert lease
    with lease:
        main([str(store.root)])
        assert f"{7:012x} running, being prepared, by slurm job 18" in capsys.readouterr().out
