"""What counts as torn among the files of a run that has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabench.store.integrity import damaged_files
from lorabench.store.records import Record, Store

RUN = "0" * 12
CONFIG = {"method": {"name": "lora"}, "optimizer": {"lr": 1e-3}, "seed": 0}


@pytest.mark.parametrize(
    ("history", "torn"),
    [
        ('{"step": 1}\n{"step": 2}\n', False),
        ("", False),
        ('{"step": 1}\n{"st', True),
        ('{"step": 1}\n\n{"step": 2}\n', True),
        ('{"step": 1\n"lr": 2}\n', True),  # a row with a hole; together the two lines would be one
        ('{"step": 1}\n[2]\n', True),
        ('{"step": 1},\n{"step": 2}\n', True),
        ("]\n[", True),
        ("\0\0\0\0", True),
    ],
)
def test_a_history_is_whole_where_every_line_is_a_row(tmp_path: Path, history: str, torn: bool) -> None:
    store = Store(tmp_path)
    store.write(Record(RUN, "tune", "completed", CONFIG))
    assert damaged_files(store, [RUN]) == {}
    (store.run_dir(RUN) / "history.jsonl").write_text(history)
    assert damaged_files(store, [RUN]) == ({RUN: "history.jsonl"} if torn else {})
