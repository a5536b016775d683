"""What a sweep shows while it runs, and what a dry run prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from lorabench import prepare as prep
from lorabench.memory import estimate
from lorabench.plan import SlicePlan
from lorabench.prepare import Pack
from lorabench.records import Record


class Progress:
    """Live bars on a terminal; one line a pack elsewhere. Time left comes from the steps done so far."""

    def __init__(self, console: Console, packs: Sequence[Pack], *, enabled: bool) -> None:
        self.console, self.packs = console, packs
        self.live = enabled and console.is_terminal
        self.verbose = enabled
        self.bars = Bars(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=console, transient=True, disable=not self.live,
        )  # fmt: skip
        self._start = time.monotonic()
        self._runs = sum(len(p.runs) for p in packs)
        self._done = 0.0

    def __enter__(self) -> Progress:
        if self.packs:
            self.bars.start()
            self._all = self.bars.add_task(f"{self._runs} runs in {len(self.packs)} packs", total=self._runs, left="")
        return self

    def __exit__(self, *args: Any) -> None:
        self.bars.stop()

    def step(self, pack: Pack) -> Callable[[int, int], None]:
        """A callback for the steps of one pack."""
        task = self.bars.add_task(f"  {pack.id}: {describe(pack)}", total=None, left="")
        began = time.monotonic()
        state = {"last": 0.0}

        def heard(step: int, total: int) -> None:
            self._done += (step - state["last"]) / total * len(pack.runs)
            state["last"] = step
            self.bars.update(task, completed=step, total=total)
            self.bars.update(self._all, completed=round(self._done, 1), left=self._left())
            if step >= total:
                self.bars.remove_task(task)
                if self.verbose and not self.live:
                    self.say(
                        f"{pack.id}: {describe(pack)}: {total} steps in {time.monotonic() - began:.0f} s{self._left(', ')}"
                    )

        return heard

    def _left(self, before: str = "") -> str:
        if not self._done or self._done >= self._runs - 1e-6:
            return ""
        seconds = (time.monotonic() - self._start) / self._done * (self._runs - self._done)
        return f"{before}about {seconds / 60:.0f} min left" if seconds > 90 else f"{before}about {seconds:.0f} s left"

    def done(self, records: Sequence[Record]) -> None:
        for r in records:
            if r.status in ("failed", "diverged"):
                self.say(f"{r.status}: {r.run_id}: {r.error}")

    def say(self, text: str) -> None:
        if self.verbose:
            self.console.print(text, highlight=False, markup=False)


def describe(pack: Pack) -> str:
    """A pack in a few words: what it holds."""
    labels = [r.method.label() for r in pack.runs]
    methods = "/".join(sorted({x["method"] for x in labels}))
    ranks = sorted({x["r"] for x in labels if x.get("r")})
    rank = f" r={','.join(map(str, ranks))}" if ranks else ""
    return f"{pack.runs[0].role} {methods}{rank} x {len(pack.runs)}"


def dry_run_table(packs: Sequence[Pack], jobs: Sequence[Any], plans: Mapping[str, SlicePlan]) -> Table:
    """Runs, packs, trainable parameters and estimated memory. Nothing was loaded, nothing written."""
    found = f"{len(jobs)} runs in {len(packs)} packs"
    table = Table(
        title=f"dry run: {found}", caption="memory is an upper estimate at full-length batches; nothing was written"
    )
    for name in ("pack", "run", "role", "cell", "lr", "seed", "trainable", "steps", "pack memory"):
        table.add_column(
            name, justify="right" if name in ("lr", "seed", "trainable", "steps", "pack memory") else "left"
        )
    cells = {j.run.run_id: j.label for j in jobs}
    for pack in packs:
        info = prep.layers(pack.runs[0])
        resolved = prep.resolve(pack.runs[0])
        size = estimate(info, [plans[i] for i in pack.run_ids], pack.runs[0], resolved.base_dtype)
        for n, run in enumerate(pack.runs):
            label = cells[run.run_id]
            name = " ".join(str(label[k]) for k in ("method", "r", "targets") if label.get(k) is not None)
            steps = prep.total_steps(run, len(prep.load_data(run.task).splits["train"]))
            table.add_row(
                pack.id if n == 0 else "", run.run_id, run.role, name, f"{run.optimizer.lr:g}", str(run.seed),
                f"{plans[run.run_id].trainable(info):,}", str(steps), f"{size / 2**30:.1f} GiB" if n == 0 else "",
                end_section=n == len(pack.runs) - 1,
            )  # fmt: skip
    return table
