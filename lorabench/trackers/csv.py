"""One `history.csv` a run, beside its record: for spreadsheets and for plotting without a JSON reader."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabench.config.settings import TrackerConfig
from lorabench.store.records import Record, Store
from lorabench.trackers.contract import Row, Tracker


def build(settings: TrackerConfig, *, sweep: str, sweep_dir: Path) -> CsvTracker:
    """Return a tracker that writes into the run directories."""
    return CsvTracker(Store(sweep_dir))


class CsvTracker(Tracker):
    """Writes a column for each metric, `step` first, and a line for each row. A new metric rewrites the file, wider."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rows: dict[str, list[Row]] = {}
        self.columns: dict[str, list[str]] = {}

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        self.rows[run_id], self.columns[run_id] = [], ["step"]
        self.store.run_dir(run_id).mkdir(parents=True, exist_ok=True)
        self._write(run_id, [], "w")

    def log(self, run_id: str, row: Row) -> None:
        self.rows[run_id].append(row)
        new = [name for name in row if name not in self.columns[run_id]]
        if new:
            self.columns[run_id] += new
            self._write(run_id, self.rows[run_id], "w")
        else:
            self._write(run_id, [row], "a")

    def finish(self, run_id: str, record: Record) -> None:
        del self.rows[run_id], self.columns[run_id]

    def close(self) -> None:
        self.rows.clear()

    def _write(self, run_id: str, rows: list[Row], mode: str) -> None:
        with open(self.store.run_dir(run_id) / "history.csv", mode, encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, self.columns[run_id], lineterminator="\n")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)
