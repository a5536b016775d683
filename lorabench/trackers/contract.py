"""What a mirror of the records is: it hears of each run as it starts, moves and ends, and gives nothing back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lorabench.store.records import Record

Row = Mapping[str, Any]  # {"step": 10, "train/loss": 0.9, "lr": 0.001}


class Tracker(Protocol):
    """Several runs may be live at once: a pack has K. Each method may raise; `Mirror` stands between it and training.

    A tracker may also have `report(report_dir, tables)`: it then hears of the sweep's report once that is rendered.
    """

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None: ...

    def log(self, run_id: str, row: Row) -> None: ...

    def finish(self, run_id: str, record: Record) -> None: ...

    def close(self) -> None: ...


class Mirror:
    """A tracker that cannot fail a run: its first error is reported, and it is off for that run from then on.

    The tracker is built at the first run, so that a missing package is an error of the mirror, too. history: a run's rows on
    disk. Of a run that goes on from a checkpoint those were heard by a process that is gone; they are told first, and once.
    """

    def __init__(
        self, name: str, build: Callable[[], Tracker], history: Callable[[str], Sequence[Row]] = lambda run_id: ()
    ) -> None:
        self.name, self.build, self.history = name, build, history
        self.told: dict[str, set[tuple[Any, ...]]] = {}
        self.tracker: Tracker | None = None
        self.live: set[str] = set()
        self.lost: set[str] = set()

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        def begin() -> None:
            self.tracker = self.tracker or self.build()
            self.tracker.start(run_id, config, method=method, tags=tags)
            rows = self.history(run_id)
            self.told[run_id] = {_which(row) for row in rows}
            for row in rows:
                self.tracker.log(run_id, row)

        self.lost.discard(run_id)  # a run that starts again gets another chance
        self.live.add(run_id)
        self._try(run_id, begin)

    def log(self, run_id: str, row: Row) -> None:
        if run_id in self.live and self.tracker and _which(row) not in self.told.get(run_id, ()):
            self._try(run_id, self.tracker.log, run_id, row)

    def finish(self, run_id: str, record: Record) -> None:
        if run_id in self.live and self.tracker:
            self._try(run_id, self.tracker.finish, run_id, record)
        self.live.discard(run_id)
        self.told.pop(run_id, None)

    def report(self, report_dir: Path, tables: Mapping[str, Any]) -> None:
        """The sweep's rendered report and `report.mirrored`; trackers without such a method hear nothing."""

        def show() -> None:
            self.tracker = self.tracker or self.build()
            if hasattr(self.tracker, "report"):
                self.tracker.report(report_dir, tables)

        self._try("report", show)

    def close(self) -> None:
        if self.tracker is not None:
            self._try("close", self.tracker.close)
        self.live.clear()
        if len(self.lost) > 1:
            self._say(f"off for {len(self.lost)} runs in all")

    def _try(self, run_id: str, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception as e:
            self.live.discard(run_id)
            if not self.lost:  # said once: a server that is down would say the same for every run
                text = f"{type(e).__name__}: {' '.join(str(e).split())}; the records are complete without it"
                self._say(text if run_id in ("close", "report") else f"off for run {run_id}: {text}")
            self.lost.add(run_id)

    def _say(self, text: str) -> None:
        print(f"tracker {self.name}: {text}", file=sys.stderr)


def _which(row: Row) -> tuple[Any, ...]:
    """What tells a row of a history from the others: its step, and what was measured there."""
    return (row.get("step"), *sorted(row))
