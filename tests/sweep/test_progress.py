"""What a sweep says where there is no terminal: a line a pack and one a minute, with a time left that can be believed."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fixtures.runs import make_base, make_data, make_run
from lorabench.config.runs import Pack
from lorabench.sweep import progress as terminal


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


@pytest.fixture
def packs(tmp_path: Path) -> list[Pack]:
    run = make_run(make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv", rows=60))
    return [Pack("p0", (run,)), Pack("p1", (run,))]


def said(clock: Clock, packs: list[Pack], begun: int, seconds: float) -> list[str]:
    """The lines of the first of the packs, of 100 steps that goes on after step `begun`."""
    out = io.StringIO()
    with terminal.ProgressDisplay(Console(file=out, width=200), packs, enabled=True) as progress:
        heard = progress.step(packs[0], begun)
        for step in range(begun + 1, 101):
            clock.now += seconds
            heard(step, 100)
    return out.getvalue().splitlines()


def test_a_line_a_minute_and_one_at_the_end(clock: Clock, packs: list[Pack]) -> None:
    lines = said(clock, packs, 0, 1.5)
    assert [line.partition(" x 1: ")[2] for line in lines] == [
        "step 40 of 100 (all 2 runs: about 4 min left)", "step 80 of 100 (all 2 runs: about 3 min left)",
        "100 steps in 150 s (all 2 runs: about 2 min left)",
    ]  # fmt: skip


def test_a_pack_alone_has_the_sweeps_time(clock: Clock, packs: list[Pack]) -> None:
    lines = said(clock, packs[:1], 0, 1.5)
    assert [line.partition(" x 1: ")[2] for line in lines] == [
        "step 40 of 100, about 90 s left", "step 80 of 100, about 30 s left", "100 steps in 150 s",
    ]  # fmt: skip


def test_steps_from_before_a_kill_took_no_time_here(clock: Clock, packs: list[Pack]) -> None:
    lines = said(clock, packs, 90, 3.0)
    assert [line.partition(" x 1: ")[2] for line in lines] == ["steps 91 to 100 in 30 s (all 2 runs: about 5 min left)"]
