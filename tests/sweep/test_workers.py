"""Who has which device and how many threads: the same for a pack whenever it trains."""

from __future__ import annotations

import gc
import queue
import signal
import weakref
from pathlib import Path
from threading import Barrier, Event, main_thread
from typing import Any

import pytest

from fixtures.runs import make_base, make_data, make_run
from lorabench.config.errors import ExistingWork
from lorabench.config.runs import Pack
from lorabench.sweep import workers
from lorabench.training.module import PackModule


class Idle:
    """A worker without a process."""

    def __init__(self, index: int, shares: int, device: str) -> None:
        self.own = index, shares, device

    def stop(self) -> None:
        pass

    terminate = stop


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the workers that begin, on five cores."""
    found: list[int] = []
    monkeypatch.setattr(workers, "_Worker", Idle)
    monkeypatch.setattr(workers, "_cores", lambda: [0, 1, 2, 3, 4])
    monkeypatch.setattr(workers.protocol, "die_with_parent", lambda: None)
    monkeypatch.setattr(workers.torch, "set_num_threads", found.append)
    monkeypatch.setattr(workers.os, "sched_setaffinity", lambda pid, cores: None)
    return found


def packs_of(root: Path, *ids: str) -> list[Pack]:
    run = make_run(make_base(root / "bert", "bert"), make_data(root / "data.csv", rows=60))
    return [Pack(i, (run,)) for i in ids]


@pytest.mark.parametrize("asked", [2, 3, 7])
def test_a_pack_has_as_many_threads_whichever_worker_it_meets_and_however_many_are_left(
    threads: list[int], tmp_path: Path, asked: int
) -> None:
    """Else one that goes on after a kill, as the last of several, would be refused or come out otherwise."""
    packs = packs_of(tmp_path, *(f"p{i}" for i in range(8)))
    for planned in (packs, packs[:1]):
        assert workers.share_count(planned, asked) == asked
    crew = workers.make_workers(packs, asked)
    assert crew is not None
    with crew:
        assert len(crew._all) == asked
        for worker in crew._all:
            workers._begin(*worker.own, channel=None)
    assert workers.make_workers(packs[-1:], asked) is None
    with workers.worker_threads(asked):  # the last one, in this process
        pass
    assert threads == [max(1, 5 // asked)] * (asked + 1) + [1]


def test_by_itself_a_lone_pack_has_all_cores_and_its_halves_too(
    threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CORES_PER_WORKER", 2)
    one, other, *halves = packs_of(tmp_path, "p0", "p1", "p0.0", "p0.1")
    assert [workers.share_count(packs, None) for packs in ([one, other], [one], halves)] == [2, 1, 1]
    with workers.worker_threads(1):
        assert not threads
    assert not threads


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


def test_a_worker_that_waits_holds_nothing_of_its_last_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer, its module and its data refer to each other in circles: gigabytes under `full`, while others train."""
    made: list[weakref.ref[Any]] = []
    begin = PackModule.__init__

    def noted(self: PackModule, *args: Any, **kwargs: Any) -> None:
        made.append(weakref.ref(self))
        begin(self, *args, **kwargs)

    monkeypatch.setattr(PackModule, "__init__", noted)
    monkeypatch.setattr(workers, "_channel", queue.Queue())
    run = make_run(make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv"), **{"trainer.max_steps": 2})
    gc.disable()  # what goes away does not by chance
    try:
        how, records = workers._train("p0", [run.to_dict()], False, str(tmp_path / "sweep"), None, [], False)
    finally:
        gc.enable()
    assert (how, [r["status"] for r in records]) == ("records", ["completed"])
    assert made and not any(ref() for ref in made)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("met", ["while it waits", "while it shows records", "never, but a pack was refused"])
def test_ctrl_c_ends_the_workers_and_not_only_who_waits_for_them(request: pytest.FixtureRequest, met: str) -> None:
    told: list[bool] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background leaves it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    shown, both = Event(), Barrier(2)

    def one(pack: Any) -> list[Any]:
        both.wait(20)
        if pack == "p1":
            shown.wait(0 if met.startswith("never") else 20)
            if met == "while it waits":
                signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
            told.append(crew._ending.wait(20))
        elif met.startswith("never"):
            raise ExistingWork("sweep.dir", "s", "another")
        return []

    def show(records: list[Any]) -> None:
        shown.set()
        if met == "while it shows records":
            raise KeyboardInterrupt

    def run() -> None:
        nonlocal crew
        with workers.Workers(2, "cpu") as crew:
            for records in crew.map(one, ["p0", "p1"]):  # type: ignore[list-item]
                show(records)

    crew: Any = None
    with pytest.raises((KeyboardInterrupt, ExistingWork)):
        run()
    assert told == [True]


def test_bad_input_found_in_a_worker_is_said_as_such() -> None:
    import pickle

    from lorabench.config.errors import ConfigError

    for error in (ConfigError("task.file", 3, "a file"), ExistingWork("sweep.dir", "x", "another")):
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), back.key, back.value) == (type(error), str(error), error.key, error.value)
