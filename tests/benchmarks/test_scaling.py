"""benchmarks/scaling.py and its model: the cost model against hand calculations, its bounds and limits, and the table it prints."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

A100 = (312e12, 1.555e12, 5e-6)


@pytest.fixture
def scaling(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    import scaling_model

    return scaling_model


@pytest.fixture
def command(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    import scaling

    return scaling


def test_minilm_by_hand(scaling: Any) -> None:
    s = scaling.SHAPES["minilm"]
    assert s.parameters == 6 * (4 * 384**2 + 2 * 384 * 1536) == 10_616_832
    assert s.trainable(8) == 6 * 8 * (4 * (384 + 384) + 2 * (384 + 1536)) == 331_776


def test_trainable_agrees_with_lorabench(scaling: Any, repo: Path) -> None:
    from hydra import compose, initialize_config_dir

    from lorabench.config.runs import parse
    from lorabench.launch.command_line import config_dir
    from lorabench.training import preparation

    with initialize_config_dir(config_dir(), version_base=None):
        run = parse(compose("config", overrides=["sweep.name=x", "method.r=8", "task.train_examples=32"]))[0]
    made = preparation.slice_plan(run, preparation.base_info(run)).trainable(preparation.base_info(run))
    pooler, classifier = 8 * (384 + 384), 384 * 3 + 3
    assert made == scaling.SHAPES["minilm"].trainable(8) + pooler + classifier


def test_a_language_model_multiplies_by_its_embedding(scaling: Any) -> None:
    s = scaling.SHAPES["smollm2"]
    block = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert s.parameters == 30 * block + 49152 * 576
    assert s.trainable(1) == 30 * (2 * 1152 + 2 * 768 + 3 * 2112)


def test_operations_a_token(scaling: Any) -> None:
    s, w = scaling.SHAPES["minilm"], scaling.Work(1, 16, 32)
    assert scaling.operations(s, w) == 4 * 10_616_832 + 6 * 331_776 + 12 * 32 * 384 * 6


def test_traffic(scaling: Any) -> None:
    s = scaling.Shape(hidden=4, intermediate=8, layers=1, vocabulary=10, heads=2, kv=4)
    part, token, run = scaling.traffic(s, scaling.Work(1, 1, 3, r=2, size=2, eager=True))
    assert part == 2 * (4 * 16 + 2 * 32) * 2
    assert token == 2 * (6 * (4 * 8 + 2 * 12) + 34 * 4 + 5 * 8 + 13 * 2 * 3)
    assert run == 52 * 2 * (4 * 8 + 2 * 12)


def test_launches_are_those_counted(scaling: Any) -> None:
    """1,358 operations at K = 1 and 2,323 at K = 2 in two parts were counted at torch's dispatcher, views left out."""
    s = scaling.SHAPES["minilm"]
    assert scaling.launches(s, scaling.Work(1, 16, 38)) == pytest.approx(1358, rel=0.02)
    assert scaling.launches(s, scaling.Work(2, 16, 38, part_tokens=700)) == pytest.approx(2323, rel=0.03)


def test_packing_shares_launches_inside_a_part(scaling: Any) -> None:
    s, one = scaling.SHAPES["minilm"], scaling.Work(1, 4, 32)
    assert scaling.launches(s, replace(one, K=8)) - scaling.launches(s, one) == 7 * 16


def test_parts_are_those_of_the_stream(scaling: Any) -> None:
    import numpy as np

    from lorabench.training.batches import PackStream

    for K, B, budget in ((1, 4, 100), (5, 4, 100), (8, 2, 64), (3, 8, 10)):
        rows = [{"example": i} for i in range(32)]
        stream = PackStream(rows, [16] * 32, list(range(K)), batch_size=B, accumulate=1, total_steps=1, budget=budget,
                            collate=lambda x: {"example": np.array([e["example"] for e in x])})  # fmt: skip
        assert scaling.Work(K, B, 16, part_tokens=budget).parts == len(stream[0])


def test_memory_of_slices(scaling: Any) -> None:
    s = scaling.SHAPES["minilm"]
    one, two = scaling.Work(1, 16, 64, part_tokens=1024), scaling.Work(2, 16, 64, part_tokens=1024)
    assert scaling.memory(s, two) - scaling.memory(s, one) == 331_776 * 16  # two parts: the activations of one
    layer = 8 * 384 + 2 * 1536 + 6 * 8
    weights = 2 * (10_616_832 + 30522 * 384)
    assert scaling.memory(s, one) == weights + 331_776 * 16 + 1024 * 6 * 2 * layer
    assert scaling.memory(s, replace(one, eager=True)) - scaling.memory(s, one) == 1024 * 6 * 2 * 2 * 12 * 64


def test_step_time_by_hand(scaling: Any) -> None:
    s, w, d = scaling.SHAPES["minilm"], scaling.Work(4, 2, 64), scaling.Device(*A100)
    part, token, run = scaling.traffic(s, w)
    compute = 512 * scaling.operations(s, w) / 312e12
    bandwidth = (part + 512 * token + 4 * run) / 1.555e12
    assert scaling.seconds(s, w, d) == pytest.approx(max(compute, bandwidth) + 5e-6 * scaling.launches(s, w))


@pytest.mark.parametrize("name", ["minilm", "smollm2", "7b"])
def test_speed_up_lies_between_one_and_k_and_falls_with_the_batch(scaling: Any, name: str) -> None:
    s, d = scaling.SHAPES[name], scaling.Device(*A100)
    for T in (32, 128, 512):
        for K in (1, 2, 8, 32):
            gains = [scaling.speed_up(s, scaling.Work(K, B, T), d) for B in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
            assert all(1 - 1e-12 <= g <= K + 1e-12 for g in gains)
            assert all(a >= b - 1e-12 for a, b in pairwise(gains))


def test_speed_up_grows_with_k_inside_a_part(scaling: Any) -> None:
    s, d = scaling.SHAPES["minilm"], scaling.Device(*A100)
    gains = [scaling.speed_up(s, scaling.Work(K, 4, 64), d) for K in (1, 2, 4, 8, 16, 32)]
    assert all(a < b for a, b in pairwise(gains))


def test_limits_of_the_speed_up(scaling: Any) -> None:
    """Almost K where the weights' reading is all but the adapters' own traffic; 1 where products count, or full parts."""
    s = scaling.SHAPES["7b"]
    bare = scaling.Device(1e30, 1.555e12, 0)
    part, _, run = scaling.traffic(s, scaling.Work(1, 1, 0))
    expected = 8 * (part + run) / (part + 8 * run)
    assert 6 < expected < 8
    assert scaling.speed_up(s, scaling.Work(8, 1, 0.001), bare) == pytest.approx(expected, rel=1e-3)
    assert scaling.speed_up(s, scaling.Work(8, 64, 128), scaling.Device(1e9, 1e15, 0)) == pytest.approx(1)
    assert scaling.speed_up(s, scaling.Work(8, 64, 512), bare) == pytest.approx(1)


def test_ridge(scaling: Any) -> None:
    """Products and traffic take equally long there; with the weights' traffic alone it is size x flops / (2 bandwidth)."""
    s, d = scaling.SHAPES["7b"], scaling.Device(*A100)
    w = scaling.Work(1, 1, 128, r=8)
    at = scaling.ridge(s, w, d)
    part, token, _ = scaling.traffic(s, w)
    assert at * scaling.operations(s, w) / d.flops == pytest.approx((part + at * token) / d.bandwidth)
    assert at > 2 * d.flops / (2 * d.bandwidth) * 0.9
    assert scaling.ridge(scaling.SHAPES["minilm"], w, d) == float("inf")


@pytest.mark.parametrize("bandwidth", [3e9, 1e12])
def test_fit_finds_the_device_again(scaling: Any, bandwidth: float) -> None:
    """At 1 TB/s the products bind: the launch cost is still found, the bandwidth is only known not to."""
    s, true = scaling.SHAPES["minilm"], scaling.Device(400e9, bandwidth, 4e-6)
    steps = {K: [scaling.Work(K, 16, T, part_tokens=2048, eager=True) for T in (20, 30, 45)] for K in (1, 2, 4)}
    took = {K: sum(scaling.seconds(s, w, true) for w in works) / 3 for K, works in steps.items()}
    found = scaling.fitted(s, [(steps[K], took[K]) for K in (1, 2)], 400e9)
    assert found.launch == pytest.approx(true.launch, rel=1e-2)
    assert sum(scaling.seconds(s, w, found) for w in steps[4]) / 3 == pytest.approx(took[4], rel=1e-3)
    if bandwidth == 3e9:
        assert found.bandwidth == pytest.approx(bandwidth, rel=1e-3)


@pytest.mark.parametrize("name", ["minilm", "7b"])
def test_the_gpu_table_prints(command: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    command.main(["--table", "gpu", "--shape", name, "--packs", "2", "8"])
    out = capsys.readouterr().out
    assert "nothing was run on a GPU" in out and "K = 8" in out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 6 and len({line.count("|") for line in rows}) == 1


def test_the_measurement_as_a_table(command: Any) -> None:
    row = {"K": 1, "tokens/s": 1234.5, "ms": 20.0}
    made = {"rows": [row], "fitted": {"bandwidth": 2e10, "launch": 3e-6}, "linear_flops": 4e11, "operation_us": 1.5}
    assert "| 1 | 1,234 | 20 |" in command.text(made) and "20.0 GB/s and 3.0 µs" in command.text(made)
