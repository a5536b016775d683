"""The store: atomic, append-only, and honest about files that are not its own."""

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lorabench.config.errors import ExistingWork, Unwritable
from lorabench.runtime.files import atomic_write
from lorabench.store.records import Record, Store, dump_json

ID = "0123456789ab"


def record(run_id=ID, **changes):
    base = {
        "run_id": run_id,
        "role": "tune",
        "status": "completed",
        "config": {"method": {"name": "lora", "r": 4}, "optimizer": {"lr": 1e-3}, "seed": 0},
    }
    return Record(**{**base, "metrics": {"val/loss": 0.5, "primary": "accuracy"}, **changes})


def test_a_record_comes_back_as_it_was_written(tmp_path):
    store = Store(tmp_path)
    store.write(record())
    assert store.read(ID) == record()
    assert store.run_ids() == [ID]


def test_the_same_record_is_the_same_bytes(tmp_path):
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    a.write(record(config={"x": 1, "y": 2}))
    b.write(record(config={"y": 2, "x": 1}))
    assert (a.run_dir(ID) / "run.json").read_bytes() == (b.run_dir(ID) / "run.json").read_bytes()


def test_nothing_but_the_record_is_left_after_a_write(tmp_path):
    Store(tmp_path).write(record())
    assert sorted(os.listdir(tmp_path / "runs" / ID)) == ["run.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    atomic_write(path, "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_file_system_that_cannot_sync_directories_is_written_to(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle, also=()):
        if stat.S_ISDIR(os.fstat(handle).st_mode) or also:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    monkeypatch.setattr(os, "fsync", lambda handle: fsync(handle, also=[1]))
    with pytest.raises(Unwritable):  # bytes that may not be there are another thing
        atomic_write(tmp_path / "file", "other")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": 1}', "\x00\xff"])
def test_a_torn_or_foreign_record_counts_as_none(tmp_path, text):
    store = Store(tmp_path)
    store.run_dir(ID).mkdir(parents=True)
    (store.run_dir(ID) / "run.json").write_text(text)
    assert store.read(ID) is None


def test_history_appends_and_drops_a_torn_last_line(tmp_path):
    store = Store(tmp_path)
    store.append_history(ID, [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": float("nan")}])
    store.append_history(ID, [{"step": 3, "val/loss": 0.5}])
    with open(store.run_dir(ID) / "history.jsonl", "a") as f:
        f.write('{"step": 4, "tr')
    assert [r["step"] for r in store.history(ID)] == [1, 2, 3]
    assert store.history(ID)[1]["train/loss"] is None


def test_per_example_arrays_come_back(tmp_path):
    store = Store(tmp_path)
    store.write_arrays(
        ID, "test", {"example": np.arange(3, dtype=np.uint64), "correct": np.array([1, 0, 1], dtype=np.uint8)}
    )
    got = store.arrays(ID, "test")
    assert got is not None
    assert got["correct"].tolist() == [1, 0, 1]
    assert store.arrays(ID, "other") is None


def test_other_softwares_files_are_refused_by_name(tmp_path):
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(ExistingWork, match=r"sweep\.dir=.*thesis\.docx"):
        Store(tmp_path).check_foreign()


def test_an_empty_or_a_sweeps_own_directory_is_accepted(tmp_path):
    Store(tmp_path / "absent").check_foreign()
    Store(tmp_path).check_foreign()
    Store(tmp_path).write(record())
    Store(tmp_path).write_manifest({"schema": 1})
    for name in ("notes.txt", "slurm-123.out"):
        (tmp_path / name).write_text("mine")
    Store(tmp_path).check_foreign()


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}'])
def test_a_manifest_that_is_not_ours_is_an_error_with_the_key(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ExistingWork, match=r"sweep\.dir="):
        Store(tmp_path).manifest()


def test_json_never_holds_nan():
    assert json.loads(dump_json({"a": float("inf"), "b": [np.float32("nan"), np.int64(3)]})) == {
        "a": None,
        "b": [None, 3],
    }


def test_the_lock_holds_between_processes_and_dies_with_its_holder(tmp_path):
    code = """
    import os, sys
    from lorabench.store.records import Store
    with Store(sys.argv[1]).locked():
        print("held", flush=True)
        sys.stdin.readline()
        os._exit(9)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waiting = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        holder.communicate("\n")
    assert waiting.communicate("\n", timeout=20)[0] == "held\n"


def test_a_record_edited_by_hand_is_noticed_and_one_without_a_checksum_is_valid(tmp_path):
    store = Store(tmp_path)
    store.write(record())
    path = store.run_dir(ID) / "run.json"
    assert store.read(ID) == record() and not store.edited
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data, indent=7))  # the same values, written otherwise
    assert store.read(ID) and not store.edited
    data["metrics"]["val/accuracy"] = 0.99
    path.write_text(json.dumps(data))
    assert store.read(ID) and store.edited == {ID}
    del data["provenance"]["record_sha256"]
    path.write_text(json.dumps(data))
    assert store.read(ID) and not store.edited


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "3",
        '{"loss": 1}',
        '{"step": "x"}',
        '{"step": 1, "a": {}}',
        '{"step": 1, "a": 1e999}',
        "[" * 100000,
        '{"step": ' + "9" * 5000 + "}",
        '{"step": -1}',
        '{"step": true, "a": [1]}',
    ],
)
def test_a_history_ends_at_a_hostile_row(tmp_path, line):
    store = Store(tmp_path)
    store.append_history(ID, [{"step": 1, "val/loss": 0.5}])
    with open(store.run_dir(ID) / "history.jsonl", "a") as f:
        f.write(line + '\n{"step": 2}\n')
    assert store.history(ID) == [{"step": 1, "val/loss": 0.5}]
