"""What a sweep shows while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from lorabench.config.runs import Pack
from lorabench.results.data_notes import data_caveats, reach_caveat
from lorabench.runtime.terminal import make_console
from lorabench.store.records import Record
from lorabench.training import preparation

SECONDS_BETWEEN_LINES = 60.0  # seconds between the lines of a pack where there are no bars


class ProgressDisplay:
    """Live bars on a terminal; elsewhere a line a pack, and one a minute. Time left comes from the steps done here so
    far."""

    def __init__(self, console: Console, packs: Sequence[Pack], *, enabled: bool) -> None:
        self.console, self.packs = console, packs
        self.live = enabled and console.is_terminal
        self.verbose = enabled
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            disable=not self.live,
        )
        self._start = time.monotonic()
        self._runs = sum(len(p.runs) for p in packs)
        self._done = 0.0  # runs' worth of steps
        self._before = 0.0  # likewise, of packs that go on from a checkpoint: they took no time here

    def __enter__(self) -> ProgressDisplay:
        if self.packs:
            self.bars.start()
            self._all = self.bars.add_task(f"{self._runs} runs in {len(self.packs)} packs", total=self._runs, left="")
        return self

    def __exit__(self, *args: Any) -> None:
        self.bars.stop()

    def step(self, pack: Pack, begun: int = 0) -> Callable[[int, int], None]:
        """Return a callback for the steps of one pack. begun: steps done before, where it goes on from a checkpoint."""
        began = time.monotonic()
        state: dict[str, float] = {"said": began}
        bar: list[TaskID] = []  # a pack that waits for its job shows none yet

        def heard(step: int, total: int) -> None:
            task = bar[0] if bar else self.bars.add_task(f"  {pack.id}: {describe(pack)}", total=None, left="")
            bar[:] = [task]
            share = len(pack.runs) / total
            if "last" not in state:
                state["last"] = begun
                self._done += state["last"] * share
                self._before += state["last"] * share
            self._done += (step - state["last"]) * share
            state["last"] = step
            self.bars.update(task, completed=step, total=total)
            self.bars.update(self._all, completed=round(self._done, 1), left=self._left())
            if step >= total:
                self.bars.remove_task(task)
                if self.verbose and not self.live:
                    did = f"steps {begun + 1} to {total}" if begun else f"{total} steps"
                    took = time.monotonic() - began
                    self.say(f"{pack.id}: {describe(pack)}: {did} in {took:.0f} s{self._left_of_all()}")
            elif self.verbose and not self.live and time.monotonic() - state["said"] >= SECONDS_BETWEEN_LINES:
                state["said"] = time.monotonic()
                self.say(f"{pack.id}: {describe(pack)}: step {step} of {total}{self._left_of_all()}")

        return heard

    def _left_of_all(self) -> str:
        left = self._left()
        return f" (all {self._runs} runs: {left})" if left and len(self.packs) > 1 else f", {left}" if left else ""

    def _left(self) -> str:
        here = self._done - self._before
        if here <= 0 or self._done >= self._runs - 1e-6:
            return ""
        seconds = (time.monotonic() - self._start) / here * (self._runs - self._done)
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"

    def done(self, records: Sequence[Record]) -> None:
        for r in records:
            if r.status in ("failed", "diverged"):
                self.say(f"{r.status}: {r.run_id}: {r.error}")
        if dropped := sum(r.status == "pruned" for r in records):
            self.say(f"pruned: {dropped} of {len(records)} runs of a pack, their rates out of the race in their cells")

    def say(self, text: str) -> None:
        if self.verbose:
            say(self.console, text)


def say(console: Console, text: str) -> None:
    """Print one event, wrapped by a terminal alone; a log gets it on one line, whatever line breaks it holds."""
    text = text if console.is_terminal else " ".join(text.split("\n"))
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def describe(pack: Pack) -> str:
    """Return in a few words what a pack holds."""
    labels = [r.method.label() for r in pack.runs]
    methods = "/".join(sorted({x["method"] for x in labels}))
    ranks = sorted({x["r"] for x in labels if x.get("r")})
    rank = f" r={','.join(map(str, ranks))}" if ranks else ""
    return f"{pack.runs[0].role} {methods}{rank} x {len(pack.runs)}"


@contextmanager
def announce_slow(text: str, *, after: float = 3.0, console: Console | None = None) -> Iterator[None]:
    """Say what goes on where it takes longer than `after` seconds: large data sets are read and tokenised for
    minutes."""
    timer = threading.Timer(after, say, (console or make_console(stderr=True), text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_told: set[str] = set()  # a sweep goes through its phases in one process, and says this once


def data_notices(jobs: Sequence[Any]) -> list[str]:
    """Return lines that say what of the jobs' data is left out or cut, and of their bases what is new, kept or out of reach.

    Each line comes once a process.
    """
    found: dict[str, None] = {}
    for job in jobs:
        prepared = preparation.prepare(job.run)
        notes = {**prepared.data.notes, **prepared.encoded.notes}
        found |= dict.fromkeys(f"{job.run.task.name}: {line}" for line in data_caveats(notes))
        line = reach_caveat(prepared.info.beyond_adapters, prepared.info.parameters)
        if line and hasattr(job.run.method, "target_modules"):
            found[f"{job.run.model.name}: {line}"] = None
        found |= dict.fromkeys(f"{job.run.model.name}: {line}" for line in prepared.info.notes)
    new = [line for line in found if line not in _told]
    _told.update(new)
    return new
