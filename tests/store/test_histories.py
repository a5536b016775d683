"""A history of any length is held in bounded memory, and what rarely happens in it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabench.store import integrity, records
from lorabench.store.records import Store, thin_rows

ID = "0123456789ab"
CONFIG = {"method": {"name": "lora", "r": 4}, "optimizer": {"lr": 1e-3}, "seed": 0}


def test_a_long_history_is_thinned_and_its_evaluations_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_HISTORY_ROWS", 100)
    store = Store(tmp_path)
    rows = [{"step": i, "train/loss": 1.0, **({"val/loss": 2.0} if i % 100 == 0 else {})} for i in range(1000)]
    store.append_history(ID, rows[:100])
    assert store.history(ID) == rows[:100] and not store.is_thinned(ID)
    store.append_history(ID, rows[100:])
    kept = store.history(ID)
    assert store.is_thinned(ID) and 50 <= len(kept) <= 100
    assert [row for row in kept if "val/loss" in row] == [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in kept] == sorted(row["step"] for row in kept)
    assert list(store.history_rows(ID)) == rows


def test_no_more_rows_than_asked_for_are_ever_held() -> None:
    def rows():
        for i in range(10_000):
            yield {"step": i, "val/loss": 1.0}

    assert len(thin_rows(rows(), 64)) <= 64


def test_a_torn_row_is_found_in_any_part_of_a_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "LINES_AT_ONCE", 3)
    store = Store(tmp_path)
    store.write(records.Record(ID, "tune", "completed", CONFIG))
    store.append_history(ID, [{"step": i} for i in range(9)])
    assert integrity.damaged_files(store, [ID]) == {}
    with open(store.run_dir(ID) / records.HISTORY, "a") as f:
        f.write('{"step": ')
    assert integrity.damaged_files(store, [ID]) == {ID: records.HISTORY}
