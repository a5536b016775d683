"""What a tracker is, and `Mirror`, which stands between a tracker and training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabench.runtime.terminal import say
from lorabench.store.records import Record

Row = Mapping[str, Any]  # one row of a history: {"step": 10, "train/loss": 0.9, "lr": 0.001}


class Tracker(ABC):
    """A mirror of the records in another tool. It hears of each run as it starts, moves and ends.

    A pack trains K runs at once, so several are live at the same time. Every method may raise: `Mirror` prints the
    error and goes on without the tracker.

    To add a tracker `mlflow`, write three things:

    1. `lorabench/trackers/mlflow.py`, which imports its client inside functions only::

        def build(settings: TrackerConfig, *, sweep: str, sweep_dir: Path) -> Tracker:
            return MlflowTracker(Store(sweep_dir))

        class MlflowTracker(Tracker):
            ...  # start, log, finish, close, and report where the tool can show one

    2. `conf/tracker/mlflow.yaml` with `name: mlflow`.
    3. `mlflow` among the choices of `TrackerConfig.name` in `lorabench/config/settings.py`.
    """

    @abstractmethod
    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        """Begin a run. A run that has begun before starts its history again.

        config: the run's settings, nested as in its record. method: its name, such as "lora". tags: model, task, role.
        """

    @abstractmethod
    def log(self, run_id: str, row: Row) -> None:
        """Take one row of the history of a run that is live. Several rows may have the same step."""

    @abstractmethod
    def finish(self, run_id: str, record: Record) -> None:
        """End a run whose record has been written, whatever its status."""

    def report(self, report_dir: Path, tables: Mapping[str, Any]) -> None:
        """Show the sweep's report; by default nothing is shown.

        report_dir: the rendered report. tables: what `lorabench.report.summary.tracker_summary` returns.
        """

    def close(self) -> None:
        """Close what is open: a phase of the sweep has ended or was stopped. Runs without a record were stopped."""


class Mirror:
    """A tracker that cannot fail a run. After its first error it is off for that run; the first error is printed.

    build: makes the tracker when the first run starts, so that a missing package is an error of the mirror too.
    history: a run's rows on disk. A run that goes on from a checkpoint has rows that an earlier process logged; the
    tracker gets them first, and each row once.
    """

    def __init__(
        self, name: str, build: Callable[[], Tracker], history: Callable[[str], Sequence[Row]] = lambda run_id: ()
    ) -> None:
        self.name, self.build, self.history = name, build, history
        self.tracker: Tracker | None = None
        self.live: set[str] = set()
        self.failed: set[str] = set()
        self.from_disk: dict[str, set[tuple[Any, ...]]] = {}  # keys of the rows that came from disk, by run

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        """Begin a run, and log the rows that it has on disk. A run that starts again gets another chance."""

        def begin() -> None:
            tracker = self._built()
            tracker.start(run_id, config, method=method, tags=tags)
            rows = self.history(run_id)
            self.from_disk[run_id] = {_row_key(row) for row in rows}
            for row in rows:
                tracker.log(run_id, row)

        self.failed.discard(run_id)
        self.live.add(run_id)
        self._try(run_id, begin)

    def log(self, run_id: str, row: Row) -> None:
        """Log a row, unless the run is off or its row came from disk."""
        if run_id in self.live and self.tracker and _row_key(row) not in self.from_disk.get(run_id, ()):
            self._try(run_id, self.tracker.log, run_id, row)

    def finish(self, run_id: str, record: Record) -> None:
        """End a run, unless it is off."""
        if run_id in self.live and self.tracker:
            self._try(run_id, self.tracker.finish, run_id, record)
        self.live.discard(run_id)
        self.from_disk.pop(run_id, None)

    def report(self, report_dir: Path, tables: Mapping[str, Any]) -> None:
        """Show the sweep's report where the tracker can."""
        self._try("report", lambda: self._built().report(report_dir, tables))

    def close(self) -> None:
        """Close the tracker, and print for how many runs it was off."""
        if self.tracker is not None:
            self._try("close", self.tracker.close)
        self.live.clear()
        if len(self.failed) > 1:
            self._print(f"off for {len(self.failed)} runs in all")

    def _built(self) -> Tracker:
        self.tracker = self.tracker or self.build()
        return self.tracker

    def _try(self, run_id: str, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception as e:
            self.live.discard(run_id)
            if not self.failed:  # a server that is down would give the same error for every run
                text = f"{type(e).__name__}: {' '.join(str(e).split())}; the records are complete without it"
                self._print(text if run_id in ("close", "report") else f"off for run {run_id}: {text}")
            self.failed.add(run_id)

    def _print(self, text: str) -> None:
        say(f"tracker {self.name}: {text}", error=True)


def _row_key(row: Row) -> tuple[Any, ...]:
    """Return what identifies a row within its history: its step and the names that were measured there."""
    return (row.get("step"), *sorted(row))
