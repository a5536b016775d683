"""One pack in two processes (gloo, CPU): the numbers of one process with the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorabench import checkpoints
from lorabench.prepare import Pack, device_count
from lorabench.ranks import train
from lorabench.records import Record, Store
from lorabench.schema import ConfigError
from lorabench.train import Listener
from tiny import make_base, make_data, make_run


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ranks")
    return make_base(root / "base", "bert", dropout=0.1), make_data(root / "data.csv", rows=149)


def runs(parts: tuple[Path, Path], devices: int, **changes: Any) -> tuple[Any, ...]:
    """Two slices of different rank, rate and seed, dropout on; 101 examples: of the last batch one process gets none."""
    settings = {"model.dropout": 0.1, "trainer.devices": devices, "trainer.max_steps": 30, **changes}
    slices: list[dict[str, Any]] = [{"method.r": 2}, {"method.r": 4, "optimizer.lr": 2e-3, "seed": 1}]
    return tuple(make_run(*parts, role="confirm", **settings, **one) for one in slices)


@pytest.fixture(scope="module")
def alone(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Record]]:
    """What one process makes of them."""
    store = Store(tmp_path_factory.mktemp("alone"))
    return store, train(Pack("p0", runs(parts, 1)), store)


def numbers(record: Record) -> dict[str, Any]:
    return {k: v for k, v in record.metrics.items() if isinstance(v, (int, float))}


def same(a: Store, b: Store, one: Record, two: Record) -> None:
    """Metrics, history, test results and weights to 1e-10 (float64; sums in another order)."""
    assert (one.run_id, one.status) == (two.run_id, "completed"), two.error
    assert numbers(one) == pytest.approx(numbers(two), rel=1e-10, abs=1e-12)
    for x, y in zip(a.history(one.run_id), b.history(two.run_id), strict=True):
        assert x == pytest.approx(y, rel=1e-10, abs=1e-12)
    x, y = a.arrays(one.run_id, "test"), b.arrays(two.run_id, "test")
    assert x and y
    assert all(np.allclose(x[name], y[name], rtol=1e-6) for name in x)
    first, second = (load_file(next(s.run_dir(one.run_id).glob("adapter/*.safetensors"))) for s in (a, b))
    assert first and all(np.allclose(first[name], second[name], rtol=1e-9, atol=1e-12) for name in first)
    assert {k: one.resources[k] for k in ("tokens", "steps", "examples")} == {
        k: two.resources[k] for k in ("tokens", "steps", "examples")
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(
    parts: tuple[Path, Path], alone: tuple[Store, list[Record]], tmp_path: Path, strategy: str
) -> None:
    shared, heard = Store(tmp_path / "shared"), list[int]()
    pack = Pack("p0", runs(parts, 2, **{"trainer.strategy": strategy}))
    two = train(pack, shared, Listener(step=lambda step, total: heard.append(step)))
    for x, y in zip(alone[1], two, strict=True):
        same(alone[0], shared, x, y)
        assert y.provenance["devices"] == 2
        held, base = y.provenance.get("base_bytes_by_rank"), 8 * y.resources["total_parameters"]  # float64
        if strategy == "fsdp":
            assert sum(held) == base and [n / base for n in held] == pytest.approx([0.5, 0.5], abs=0.01)
        told = [(s.run_dir(y.run_id) / "samples.json").read_bytes() for s in (alone[0], shared)]
        assert told[0] == told[1]
    assert heard == list(range(1, 31))
    assert shared.records() == sorted(two, key=lambda r: r.run_id)
    assert not checkpoints.listed(checkpoints.folder(shared.root, "p0"))


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


@pytest.mark.slow
def test_a_process_that_dies_fails_the_pack_and_leaves_no_process(parts: tuple[Path, Path], tmp_path: Path) -> None:
    import multiprocessing
    import os
    import signal

    def kill(step: int, total: int) -> None:
        if step == 5:
            os.kill(multiprocessing.active_children()[-1].pid or 0, signal.SIGKILL)

    store = Store(tmp_path / "sweep")
    records = train(Pack("p0", runs(parts, 2)), store, Listener(step=kill))
    assert multiprocessing.active_children() == []
    assert [r.status for r in store.records()] == ["failed", "failed"]
    assert all("died (exit code -9)" in str(r.error) for r in records)


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
    same(*stores, one, two)
    assert one.metrics["best_step"] < 12
    half = 8 * two.resources["total_parameters"] / 2  # float64
    assert two.provenance["base_bytes_by_rank"] == pytest.approx([half, half], rel=0.01)


def test_workers_beside_several_devices_are_refused(cli: Any, parts: tuple[Path, Path]) -> None:
    base, data = parts
    files = ["model=hf", f"model.source={base}", "task=text_file", f"task.file={data}"]
    code, out = cli(*files, "trainer.devices=2", "sweep.workers=2")
    assert (code, "sweep.workers=2: 1 where a pack trains on several devices" in out) == (2, True), out
    assert not Path("sweeps").exists()
