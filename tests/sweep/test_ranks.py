"""One pack in two processes (gloo, CPU): the numbers of one process with the same global batch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.packs import assert_same, numbers, remains, two_slices
from fixtures.runs import make_base, make_data, make_run
from lorabench.config.errors import ConfigError
from lorabench.config.runs import Pack
from lorabench.store import checkpoints
from lorabench.store.records import Record, Store
from lorabench.sweep.ranks import free_port, train
from lorabench.training import distributed
from lorabench.training.precision import device_count
from lorabench.training.train import Listener


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ranks")
    return make_base(root / "base", "bert", dropout=0.1), make_data(root / "data.csv", rows=149)


@pytest.fixture(scope="module")
def alone(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Record]]:
    """What one process makes of them."""
    store = Store(tmp_path_factory.mktemp("alone"))
    return store, train(Pack("p0", two_slices(parts, 1)), store)


@pytest.fixture(scope="module")
def together(
    parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, list[Record], list[int]]:
    """What two processes make of them, and the steps that were told of."""
    store, heard = Store(tmp_path_factory.mktemp("together")), list[int]()
    return (
        store,
        train(Pack("p0", two_slices(parts, 2)), store, Listener(step=lambda step, total: heard.append(step))),
        heard,
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(
    parts: tuple[Path, Path], alone: tuple[Store, list[Record]], together: Any, tmp_path: Path, strategy: str
) -> None:
    shared, two, heard = together
    if strategy == "fsdp":
        shared = Store(tmp_path / "shared")
        two = train(Pack("p0", two_slices(parts, 2, **{"trainer.strategy": strategy})), shared)
    for x, y in zip(alone[1], two, strict=True):
        assert_same(alone[0], shared, x, y)
        assert y.provenance["devices"] == 2
        held, base = y.provenance.get("base_bytes_by_rank"), 8 * y.resources["total_parameters"]  # float64
        if strategy == "fsdp":
            assert sum(held) == base and [n / base for n in held] == pytest.approx([0.5, 0.5], abs=0.01)
        told = [(s.run_dir(y.run_id) / "samples.json").read_bytes() for s in (alone[0], shared)]
        assert told[0] == told[1]
    assert heard == list(range(1, 31))
    assert shared.records() == sorted(two, key=lambda r: r.run_id)
    assert not checkpoints.list_checkpoints(checkpoints.pack_folder(shared.root, "p0"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method.name": "full", "trainer.precision": "32"},
        {"trainer.accumulate_grad_batches": 2, "trainer.max_steps": 20, "model.dropout": 0.1},
        {"method.name": "head", "trainer.early_stopping_patience": 1, "optimizer.lr": 1e-4},
    ],
    ids=["full", "accumulated", "head"],
)
def test_other_runs_in_two_processes(parts: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    alone, shared = Store(tmp_path / "alone"), Store(tmp_path / "shared")
    settings = {"trainer.max_steps": 30, **changes}
    base, data = parts
    pack = [Pack("p0", (make_run(base, data, role="confirm", **settings, **{"trainer.devices": n}),)) for n in (1, 2)]
    (one,), (two,) = train(pack[0], alone), train(pack[1], shared)
    assert two.status == "completed", two.error
    close = 1e-4 if changes.get("trainer.precision") == "32" else 1e-9
    assert numbers(one) == pytest.approx(numbers(two), rel=close, abs=close)


def _sum_of_gradients(rank: int, meet: str, out: Any) -> None:
    """One of two processes with three parameters: both use the first, one the second, neither the third."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    distributed.join(rank, 2)
    made = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for parameter in made[: 1 + rank]:
        parameter.grad = torch.full((2,), 1.0 + rank)
    distributed.sum_gradients(made)
    torch.optim.AdamW(made, lr=0.5, weight_decay=0.5).step()
    out.put(([p.grad if p.grad is None else p.grad.tolist() for p in made], made[2].tolist()))


def test_what_no_process_uses_is_left_alone(tmp_path: Path) -> None:
    """As in one process, where it has no gradient: a gradient of zeros would let weight decay move it."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    group = [context.Process(target=_sum_of_gradients, args=(i, str(tmp_path / "meet"), out)) for i in range(2)]
    for process in group:
        process.start()
    found = [out.get(timeout=600) for _ in group]
    for process in group:
        process.join()
    assert found == [([[3.0, 3.0], [2.0, 2.0], None], [1.0, 1.0])] * 2


def test_processes_wait_for_one_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the test the first one measures alone, before training and after it, longer than torch's half hour perhaps."""
    monkeypatch.setattr(distributed, "_place", (0, 2))
    assert distributed.trainer_devices("cpu", 2)["strategy"]._timeout >= timedelta(hours=12)


def processes() -> list[int]:
    """Those of the pack in training, in the order of their ranks."""
    return [p.pid or 0 for p in sorted(multiprocessing.active_children(), key=lambda p: p.pid or 0)]


@pytest.mark.parametrize(
    ("strategy", "stops"),
    [
        ("ddp", (2,)),
        pytest.param("ddp", (2, 5), marks=pytest.mark.slow),
        pytest.param("fsdp", (2, 5), marks=pytest.mark.slow),
    ],
)
def test_sigterm_ends_all_of_them_at_one_step_with_a_checkpoint(
    parts: tuple[Path, Path], together: Any, tmp_path: Path, strategy: str, stops: tuple[int, ...]
) -> None:
    """First the launcher alone is told, then the second process alone; there is no other checkpoint."""
    settings = {"trainer.checkpoint_interval": 1000, "trainer.strategy": strategy}
    pack, store, reached = Pack("p0", two_slices(parts, 2, **settings)), Store(tmp_path), list[int]()
    for at in stops:

        def tell(step: int, total: int, at: int = at) -> None:
            if step == at + sum(reached):
                os.kill(processes()[1] if reached else os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit) as e:
            train(pack, store, Listener(step=tell))
        assert (e.value.code, multiprocessing.active_children(), store.records()) == (143, [], [])
        reached.append(checkpoints.last_step(store.root, "p0") or 0)
        assert at + sum(reached[:-1]) <= reached[-1] < 30
    records = train(pack, store)
    assert records[0].provenance["resumed"] == reached
    if strategy == "ddp":
        assert remains(store, pack) == remains(together[0], pack)


@pytest.mark.slow
def test_sigterm_before_they_train_ends_them_at_once(parts: tuple[Path, Path], tmp_path: Path) -> None:
    store = Store(tmp_path)
    tell = Listener(start=lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as e:
        train(Pack("p0", two_slices(parts, 2)), store, tell)
    assert (e.value.code, multiprocessing.active_children()) == (143, [])
    assert not store.records() and checkpoints.last_step(store.root, "p0") is None


TROUBLED = """
import os, signal, time
from dataclasses import dataclass
import torch
from lorabench.config.fields import knob
from lorabench.tasks.text_classification import Config as Base

calls = []

@dataclass(frozen=True)
class Config(Base):
    kind: str = knob("local", help="")
    source: str = knob("file", help="")
    data: str = knob("", help="")

    def _rows(self, said):
        return self._file_rows(self.data, "task.data", None, said), ()

    def step(self, model, batch):
        calls.append(torch.is_grad_enabled())
        what, rank, at = os.environ.get("TROUBLE", "none 0 0").split()
        if rank == os.environ["LOCAL_RANK"] and calls[-1] and sum(calls) == int(at):
            if what == "raise":
                raise ValueError("a bad share")
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os.killpg(0, signal.SIGTERM)
            time.sleep(1)
        return super().step(model, batch)
"""


@pytest.fixture
def troubled(parts: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """A sweep of one pack in two processes, in which `TROUBLE` says what befalls which of them, at which step or so."""
    (tmp_path / "mine.py").write_text(TROUBLED)
    return [
        "-m", "method.r=2,4", "model=hf", f"model.source={parts[0]}", "task=local", f"task.file={tmp_path / 'mine.py'}",
        f"+task.data={parts[1]}", "trainer.devices=2", "trainer.max_steps=30", "trainer.eval_interval=10", "trainer.batch_size=4",
        "trainer.precision=64", "trainer.accelerator=cpu", "trainer.checkpoint_interval=10", "sweep.measure_solo=false",
        "report.enabled=false", "sweep.name=s",
    ]  # fmt: skip


def launched(folder: Path, argv: list[str], trouble: str = "none 0 0") -> tuple[int, str]:
    """A launcher of its own, and a process group of its own: exit code and what it said."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "lorabench", *argv], cwd=folder, env={**os.environ, "TROUBLE": trouble}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_sweep_goes_on_whatever_befalls_a_process(troubled: list[str], tmp_path: Path) -> None:
    """One is killed before the first checkpoint; SIGTERM to the whole process group; the first is killed, again and again."""
    cut, whole = Store(tmp_path / "cut/sweeps/s"), Store(tmp_path / "whole/sweeps/s")
    for trouble, code, words in (
        ("kill 1 4", 1, "(exit code -9); the same command goes on"),
        ("term 0 6", 143, "stopped; the same command goes on"),
    ):
        ended, out = launched(tmp_path / "cut", troubled, trouble)
        assert ended == code and words in " ".join(out.split()), out
        assert not cut.records() and not list((cut.root / "locks").glob("p*/*")), "no record, no lease"
    stopped = checkpoints.last_step(cut.root, "p0") or 0
    assert 0 < stopped < 30
    code, out = launched(tmp_path / "cut", troubled, "kill 0 15")
    assert code == 0 and "it goes on from its last checkpoint" in " ".join(out.split()), out
    resumed = cut.records()[0].provenance["resumed"]
    assert resumed[0] == stopped and len(resumed) > 1 and not any(step % 10 for step in resumed[1:])
    code, out = launched(tmp_path / "whole", troubled)
    assert code == 0, out
    assert [(r.run_id, r.status, r.metrics) for r in cut.records()] == [
        (r.run_id, r.status, r.metrics) for r in whole.records()
    ]
    assert all(cut.history(i) == whole.history(i) for i in whole.run_ids())


@pytest.mark.slow
def test_what_one_of_them_raises_fails_the_pack(troubled: list[str], tmp_path: Path) -> None:
    """The others would wait for it."""
    code, out = launched(tmp_path / "s", troubled, "raise 1 4")
    assert code == 1, out
    records = Store(tmp_path / "s/sweeps/s").records()
    assert [(r.status, r.error) for r in records] == [("failed", "ValueError: a bad share")] * 2
    assert "in step" in records[0].provenance["trace"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trainer.devices": "auto"}, "trainer.devices=auto"),
        ({"trainer.devices": 0}, "trainer.devices=0"),
        ({"trainer.strategy": "deepspeed"}, "trainer.strategy=deepspeed: allowed: auto, ddp .*, fsdp "),
        ({"trainer.num_nodes": 3}, "trainer.batch_size=4: a multiple of trainer.devices=1 x trainer.num_nodes=3"),
        ({"trainer.devices": 3}, "trainer.batch_size=4: a multiple of trainer.devices=3"),
    ],
)
def test_what_is_not_built_is_refused(parts: tuple[Path, Path], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        device_count(make_run(*parts, **changes).trainer)


def test_a_base_that_trains_is_cut_too(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Clipped in every step by the norm over both shares; the weights kept are not the last ones."""
    settings = {"method.name": "full", "optimizer.lr": 1e-3, "model.dropout": 0.1, "trainer.max_steps": 12,
                "trainer.eval_interval": 2, "trainer.gradient_clip_val": 0.05}  # fmt: skip
    cut = {"trainer.devices": 2, "trainer.strategy": "fsdp"}
    packs = [(make_run(*parts, role="confirm", **settings, **more),) for more in ({}, cut)]
    stores = Store(tmp_path / "alone"), Store(tmp_path / "cut")
    (one,), (two,) = (train(Pack("p0", pack), store) for pack, store in zip(packs, stores, strict=True))
    assert_same(*stores, one, two)
    assert one.metrics["best_step"] < 12
    half = 8 * two.resources["total_parameters"] / 2  # float64
    assert two.provenance["base_bytes_by_rank"] == pytest.approx([half, half], rel=0.01)


def test_workers_beside_several_devices_are_refused(cli: Any, parts: tuple[Path, Path]) -> None:
    base, data = parts
    files = ["model=hf", f"model.source={base}", "task=text_file", f"task.file={data}"]
    code, out = cli(*files, "trainer.devices=2", "sweep.workers=2")
    assert (code, "sweep.workers=2: 1 where a pack trains on several devices" in out) == (2, True), out
    assert not Path("sweeps").exists()


def test_the_store_of_a_group_listens_on_its_address_alone() -> None:
    import psutil

    port = free_port()
    distributed.join(0, 2)
    try:
        store = distributed.open_store("127.0.0.1", port)
        heard = {
            c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port
        }
        assert heard == {"127.0.0.1"}
        store.set("a", "b")
        distributed.join(1, 2)
        assert distributed.open_store("127.0.0.1", port).get("a") == b"b"
    finally:
        distributed.join(0, 1)


def test_machines_meet_on_the_interface_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    loopback = next(n for n, a in psutil.net_if_addrs().items() if any(x.address == "127.0.0.1" for x in a))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback)
    assert distributed.meeting_address("a.host.that.is.none") == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    with pytest.raises(ConfigError, match=rf"GLOO_SOCKET_IFNAME=absent0: .*{loopback}"):
        distributed.meeting_address("localhost")
