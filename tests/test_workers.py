"""Who has which device and how many threads: the same for a pack whenever it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorabench import workers
from lorabench.prepare import Pack
from tiny import make_base, make_data, make_run


class Idle:
    """A worker without a process."""

    def __init__(self, index: int, shares: int, device: str) -> None:
        self.own = index, shares, device

    def stop(self) -> None:
        pass


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the workers that begin, on five cores."""
    found: list[int] = []
    monkeypatch.setattr(workers, "_Worker", Idle)
    monkeypatch.setattr(workers, "_cores", lambda: [0, 1, 2, 3, 4])
    monkeypatch.setattr(workers.messages, "belong_to_parent", lambda: None)
    monkeypatch.setattr(workers.torch, "set_num_threads", found.append)
    monkeypatch.setattr(workers.os, "sched_setaffinity", lambda pid, cores: None)
    return found


@pytest.mark.parametrize("asked", [2, 3, 7])
def test_a_pack_has_as_many_threads_whichever_worker_it_meets_and_however_many_are_left(
    threads: list[int], tmp_path: Path, asked: int
) -> None:
    """Else one that goes on after a kill, as the last of several, would be refused or come out otherwise."""
    run = make_run(make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv", rows=60))
    for left in (8, 1):
        crew = workers.workers_for([Pack(f"p{i}", (run,)) for i in range(left)], asked)
        assert crew is not None
        with crew:
            assert len(crew._all) == min(asked, left)
            for worker in crew._all:
                workers._begin(*worker.own, channel=None)
    assert set(threads) == {max(1, 5 // asked)}


def test_one_process_trains_here(tmp_path: Path) -> None:
    run = make_run(make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv", rows=60))
    assert workers.workers_for([Pack("p0", (run,)), Pack("p1", (run,))], 1) is None


def test_more_workers_than_devices_share_them(threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that found no device of its own would train on the CPU."""
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    seen: list[Any] = []
    with workers.Workers(4, "cuda") as crew:
        for worker in crew._all:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
            workers._begin(*worker.own, channel=None)
            seen.append(workers.os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "6", "4", "6"]
