"""Where a sweep is, read from its files: every listed run counts once, whatever state it is in."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lorabench.records import Record, Store
from lorabench.status import main, read


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Eight runs: two completed, one of each other end, one running, one cut, one waiting."""
    store = Store(tmp_path / "s")
    ids = [f"{i:012x}" for i in range(8)]
    config = {"method": {"name": "lora"}, "optimizer": {"lr": 1e-3}, "seed": 0, "trainer": {"max_steps": 40}}
    runs = {i: {"role": "tune", "lr": 1e-3, "seed": 0, "config": config} for i in ids}
    runs[ids[0]]["role"] = "confirm"
    store.write_manifest({"schema": 1, "name": "s", "cells": [], "runs": runs, "packs": []})
    for i, status in zip(ids, ("completed", "completed", "diverged", "pruned", "failed"), strict=False):
        resources = {"pack_seconds": 60.0, "pack_size": 6} if status == "completed" else {}
        error = "ValueError: no\nmore" if status == "failed" else None
        store.write(Record(i, "tune", status, config, resources=resources, error=error))
    for i in ids[5:7]:
        store.append_history(i, [{"step": 10, "train/loss": 1.0}])
    old = time.time() - 3600
    os.utime(store.run_dir(ids[6]) / "history.jsonl", (old, old))
    return store


def test_every_run_is_counted_once(store: Store) -> None:
    status = read(store.root)
    assert status.counts == {
        "completed": 2, "diverged": 1, "pruned": 1, "failed": 1, "running": 1, "cut": 1, "waiting": 1
    }  # fmt: skip
    assert sum(status.counts.values()) == status.listed == 8
    assert status.seconds_left == pytest.approx(10 * (3 - 10 / 40))


def test_what_is_printed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(store.root)]) == 1
    out = capsys.readouterr().out
    assert "5 of 8 runs have ended (7 tune, 1 confirm)" in out
    assert "failed: ValueError: no\n" in out and "sweep.retry_failed=true" in out
    assert "running, step 10 of 40" in out and "cut at step 10 of 40, 60 min ago" in out
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
    store.write_manifest(manifest | {"packs": [{"id": "p3", "runs": runs}]})
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


@pytest.mark.parametrize("made", ["nothing", "folder", "file"])
def test_what_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], made: str) -> None:
    path = tmp_path / "x"
    if made == "folder":
        path.mkdir()
    elif made == "file":
        path.write_text("")
    assert main([str(path)]) == 2
    assert "error: sweep dir=" in capsys.readouterr().err
