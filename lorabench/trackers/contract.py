"""What a mirror of the records is: it hears of each run as it starts, moves and ends, and gives nothing back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lorabench.records import Record

Row = Mapping[str, Any]  # {"step": 10, "train/loss": 0.9, "lr": 0.001}


class Tracker(Protocol):
    """Several runs may be live at once: a pack has K. Each method may raise; `Mirror` stands between it and training."""

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None: ...

    def log(self, run_id: str, row: Row) -> None: ...

    def finish(self, run_id: str, record: Record) -> None: ...

    def close(self) -> None: ...


class Mirror:
    """A tracker that cannot fail a run: its first error is reported, and it is off for that run from then on.

    The tracker is built at the first run, so that a missing package is an error of the mirror, too.
    """

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        self.name, self.build = name, build
        self.tracker: Tracker | None = None
        self.live: set[str] = set()
        self.lost: set[str] = set()

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        def begin() -> None:
            self.tracker = self.tracker or self.build()
            self.tracker.start(run_id, config, method=method, tags=tags)

        self.lost.discard(run_id)  # a run that starts again gets another chance
        self.live.add(run_id)
        self._try(run_id, begin)

    def log(self, run_id: str, row: Row) -> None:
        if run_id in self.live and self.tracker:
            self._try(run_id, self.tracker.log, run_id, row)

    def finish(self, run_id: str, record: Record) -> None:
        if run_id in self.live and self.tracker:
            self._try(run_id, self.tracker.finish, run_id, record)
        self.live.discard(run_id)

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
                text = " ".join(str(e).split())
                self._say(f"off for run {run_id}: {type(e).__name__}: {text}; the records are complete without it")
            self.lost.add(run_id)

    def _say(self, text: str) -> None:
        print(f"tracker {self.name}: {text}", file=sys.stderr)
