"""Files that cannot be written, cannot be read, or are not ours: said clearly, and the next start completes the sweep."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from troubles import cannot

from lorabench.store.records import Store


@pytest.mark.parametrize("kind", ["run.json", "history.jsonl", "test.npz", ".adapter.", "sweep.json", ".p0.", ".s."])
def test_the_disk_is_full(fault, launcher, undisturbed, tmp_path, kind):
    """no more room (a file size limit)"""
    report = ["report.enabled=true"] if kind == ".s." else []
    code, out = launcher(*report, full=kind, small_report=True).wait()
    fault.tried += 1
    assert code == 1, out
    assert "error: " in out and "File too large" in out and "the same command goes on from here" in out
    assert "Traceback" not in out
    assert not [r for r in Store(tmp_path / "sweeps/s").records() if r.status == "failed"], "no run's fault"
    code, out = launcher(*report, small_report=True).wait()
    assert code == 0, out
    fault.compare(undisturbed, tmp_path / "sweeps/s")
    if report:
        assert [p.name for p in (tmp_path / "reports").iterdir()] == ["s"]


def test_the_store_may_only_be_read(fault, launcher, undisturbed, tmp_path):
    """a read-only store"""
    if why := cannot(tmp_path):
        pytest.skip(why)
    (tmp_path / "sweeps").mkdir()
    for made in ("", "s"):
        (tmp_path / "sweeps" / made).mkdir(exist_ok=True)
        code, out = launcher(read_only=str(tmp_path / "sweeps")).wait()
        fault.tried += 1
        assert code == 2, out
        assert "error: sweep.dir=sweeps/s: a directory that can be written (Read-only file system)" in out
        assert [p.name for p in (tmp_path / "sweeps").glob("**/*")] == [made] * bool(made)
    assert launcher().wait()[0] == 0
    fault.compare(undisturbed, tmp_path / "sweeps/s")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_cannot_be_read_trains_again(fault, launcher, undisturbed, tmp_path):
    """torn and corrupt run.json, history.jsonl, test.npz"""
    root = tmp_path / "sweeps/s"
    shutil.copytree(undisturbed, root)
    store = Store(root)
    tune = [r.run_id for r in store.records() if r.role == "tune"]
    confirm = [r.run_id for r in store.records() if r.role == "confirm"]
    cut(root / "runs" / tune[0] / "run.json")
    cut(root / "runs" / tune[1] / "history.jsonl")
    (root / "runs" / tune[2] / "run.json").write_bytes((root / "runs" / tune[3] / "run.json").read_bytes())
    cut(root / "runs" / confirm[0] / "test.npz")
    (root / "runs" / confirm[1] / "run.json").write_bytes(b"\xff\x00" * 50)
    fault.tried += 5
    kept = store.stamp(tune[3])
    code, out = launcher().wait()
    assert code == 0, out
    said = " ".join(out.split())
    for run_id, name in zip((*tune[:3], *confirm), ("run.json", "history.jsonl", "run.json", "test.npz", "run.json")):
        assert f"{run_id}: {name} cannot be read; the run trains again" in said
    assert store.stamp(tune[3]) == kept
    fault.compare(undisturbed, root)


def test_a_manifest_that_cannot_be_read_is_refused_and_made_anew_once_it_is_moved_away(
    fault, launcher, undisturbed, tmp_path
):
    """torn and corrupt sweep.json"""
    root = tmp_path / "sweeps/s"
    shutil.copytree(undisturbed, root)
    whole = (root / "sweep.json").read_bytes()
    for raw in (whole[: len(whole) // 2], b"\xff\xfe" * 9):
        (root / "sweep.json").write_bytes(raw)
        code, out = launcher().wait()
        fault.tried += 1
        assert code == 2 and "its sweep.json is not valid JSON" in out and "moved away" in out, out
        assert (root / "sweep.json").read_bytes() == raw
    (root / "sweep.json").unlink()
    before = {i: Store(root).stamp(i) for i in Store(root).run_ids()}
    assert launcher().wait()[0] == 0
    assert {i: Store(root).stamp(i) for i in before} == before
    fault.compare(undisturbed, root)


def test_foreign_files_are_refused(fault, launcher, undisturbed, tmp_path):
    """files of other software, of another version, and links"""
    root = tmp_path / "sweeps/s"
    shutil.copytree(undisturbed, root)
    run = root / "runs" / Store(root).run_ids()[0]
    newer = json.dumps(json.loads((run / "run.json").read_text()) | {"schema": 9})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def refused(named: str) -> None:
        code, out = launcher().wait()
        fault.tried += 1
        assert code == 2 and named in out, out

    (root / "thesis.docx").write_text("mine")
    (root / "sweep.json").rename(tmp_path / "sweep.json")
    refused("thesis.docx")
    (tmp_path / "sweep.json").rename(root / "sweep.json")
    assert launcher().wait()[0] == 0  # beside a sweep it may stand
    assert (root / "thesis.docx").read_text() == "mine"
    (root / "thesis.docx").unlink()
    whole = (run / "run.json").read_text()
    (run / "run.json").write_text(newer)
    refused("a record of schema 1")
    assert (run / "run.json").read_text() == newer
    (run / "run.json").write_text(whole)
    shutil.rmtree(root / "locks")
    (root / "locks").symlink_to(elsewhere)
    refused("no symbolic link")
    (root / "locks").unlink()
    assert launcher().wait()[0] == 0
    assert not os.listdir(elsewhere)
    fault.compare(undisturbed, root)


def test_arrays_of_other_software_are_named(tmp_path):
    store = Store(tmp_path)
    store.write_arrays("0123456789ab", "test", {"loss": np.ones(3)})
    path = store.run_dir("0123456789ab") / "test.npz"
    for raw in (b"", b"PK\x03\x04", path.read_bytes()[:-30], b"\x93NUMPY\x01\x00" + b"x" * 99):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="test.npz"):
            store.arrays("0123456789ab", "test")
