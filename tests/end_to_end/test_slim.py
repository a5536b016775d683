"""`lorabench.slim`: a copy without weights says the same, and takes less room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorabench import slim
from lorabench.config.errors import ExistingWork
from lorabench.store import arrays as columns
from lorabench.store.integrity import damaged_files
from lorabench.store.records import Record, Store

N = 400
CONFIG = {"method": {"name": "lora"}, "optimizer": {"lr": 1e-3}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three runs on one test set; the second has columns of its own kind."""
    store, rng = Store(tmp_path / "s"), np.random.default_rng(0)
    example, label = rng.integers(0, 2**48, N).astype(np.uint64), rng.integers(0, 3, N).astype(np.uint8)
    for k in range(3):
        run_id = f"{k:012d}"
        store.append_history(run_id, [{"step": 1, "train/loss": 1.0 + k}])
        own = {"loss": rng.random(N).astype(np.float32)}
        own |= {"judged": np.array(["good", "bad"] * (N // 2))} if k == 1 else {}
        store.write_arrays(run_id, "test", {"example": example, **own, "label": label, "weight": np.ones(N)})
        store.write(Record(run_id, "confirm", "completed", {**CONFIG, "seed": k}))
    store.write_manifest({"schema": 1, "name": "s"})
    (store.run_dir("0" * 12) / "adapter").mkdir()
    (store.run_dir("0" * 12) / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 10000)
    (store.root / "analysis").mkdir()
    (store.root / "analysis" / "costs.json").write_text("{}")
    begun = Store(store.root).make_run_dir("9" * 12)
    (begun / "history.jsonl").write_text('{"step": 1}\n')
    return store.root


def size(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*.npz"))


def test_a_copy_holds_the_same_records_and_results_in_less_room(sweep: Path, tmp_path: Path) -> None:
    assert slim.main([str(sweep), str(tmp_path / "kept")]) == 0
    ours, copy = Store(sweep), Store(tmp_path / "kept")
    copy.check_foreign()
    assert copy.run_ids() == ours.run_ids()[:3] and damaged_files(copy, copy.run_ids()) == {}
    for run_id in copy.run_ids():
        assert copy.read(run_id) == ours.read(run_id) and copy.history(run_id) == ours.history(run_id)
        had, has = ours.arrays(run_id, "test"), copy.arrays(run_id, "test")
        assert had is not None and has is not None and list(had) == list(has)
        assert all(had[key].dtype == has[key].dtype and np.array_equal(had[key], has[key]) for key in had)
    assert not list(copy.root.rglob("adapter*")) and (copy.root / "analysis/costs.json").is_file()
    assert size(copy.root) < 0.7 * size(sweep)


def test_of_training_rows_every_nth_is_kept_and_of_evaluations_all(sweep: Path, tmp_path: Path) -> None:
    store, run_id = Store(sweep), "0" * 12
    rows = [{"step": n, "train/loss": 1.0 / n, "lr": 1e-3} for n in range(2, 26)]
    rows.insert(14, {"step": 15, "val/loss": 0.5})
    store.append_history(run_id, rows)
    assert slim.main([str(sweep), str(tmp_path / "kept"), "--every", "10"]) == 0
    copy = Store(tmp_path / "kept")
    assert [(r["step"], "val/loss" in r) for r in copy.history(run_id)] == [
        (10, False),
        (15, True),
        (20, False),
        (25, False),
    ]
    assert all(row in store.history(run_id) for row in copy.history(run_id))
    assert len(copy.history("1".zfill(12))) == 1 and damaged_files(copy, copy.run_ids()) == {}


def test_no_training_row_in_zero(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slim.main([str(sweep), str(tmp_path / "kept"), "--every", "0"]) == 2
    assert "--every" in capsys.readouterr().err and not (tmp_path / "kept").exists()


def test_a_copy_of_a_copy_is_the_same(sweep: Path, tmp_path: Path) -> None:
    slim.slim(sweep, tmp_path / "kept")
    slim.slim(tmp_path / "kept", tmp_path / "again")
    for run_id in Store(tmp_path / "again").run_ids():
        ours, has = (Store(tmp_path / name).arrays(run_id, "test") for name in ("s", "again"))
        assert ours is not None and has is not None and all(np.array_equal(ours[key], has[key]) for key in ours)


@pytest.mark.parametrize("harm", ["gone", "torn", "other"])
def test_results_whose_shared_part_is_harmed_are_lost_and_not_others(sweep: Path, tmp_path: Path, harm: str) -> None:
    slim.slim(sweep, tmp_path / "kept")
    copy = Store(tmp_path / "kept")
    path = copy.root / columns.SHARED_FILE
    if harm == "gone":
        path.unlink()
    elif harm == "torn":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        with np.load(path) as data:
            path.write_bytes(columns.pack_columns({key: data[key][::-1] for key in data.files}))
    assert damaged_files(copy, copy.run_ids()) == dict.fromkeys(copy.run_ids(), "test.npz")
    with pytest.raises(ExistingWork, match="test.npz"):
        copy.arrays("0" * 12, "test")


def test_bad_input_is_named_and_nothing_is_left(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    wrong = [
        (tmp_path / "none", out, "sweep="), (sweep, tmp_path / "full", "out="), (sweep, sweep / "runs" / "x", "out="),
    ]  # fmt: skip
    for source, target, said in wrong:
        assert slim.main([str(source), str(target)]) == 2
        assert said in capsys.readouterr().err
    (sweep / "runs" / ("0" * 12) / "test.npz").write_bytes(b"PK")
    assert slim.main([str(sweep), str(out)]) == 2
    assert "test.npz" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_one_run_with_results_shares_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.write_manifest({"schema": 1, "name": "s", "cells": [], "runs": {}, "packs": []})
    store.write(
        Record("0" * 12, "confirm", "completed", {"method": {"name": "lora"}, "optimizer": {"lr": 1e-3}, "seed": 0})
    )
    store.write_arrays("0" * 12, "test", {"example": np.arange(3), "loss": np.ones(3, np.float32)})
    assert slim.main([str(store.root), str(tmp_path / "copy")]) == 0
    assert not (tmp_path / "copy" / columns.SHARED_FILE).exists()
    held = Store(tmp_path / "copy").arrays("0" * 12, "test")
    assert held is not None and held["example"].tolist() == [0, 1, 2]
