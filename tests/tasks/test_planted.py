"""The planted task: the base has loss 1, the planted change itself has loss 0, fewer ranks cannot have it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.runs import make_base, make_data, make_run
from lorabench.adapters import inject
from lorabench.config.errors import ConfigError
from lorabench.store.records import Store
from lorabench.training import precision, preparation
from lorabench.training.train import Pack, train

LAYER = "encoder.layer.1.intermediate.dense"
PLANTED = {
    "task.kind": "planted",
    "task.planted_in": r"encoder\.layer\.1\.intermediate\.dense",
    "task.planted_rank": 3,
    "task.metric": "loss",
    "method.target_modules": [LAYER],
    "trainer.precision": "32",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("planted")
    return make_base(root / "bert", "bert"), make_data(root / "data.csv")


def test_losses_of_base_teacher_and_too_small_a_rank(place: tuple[Path, Path]) -> None:
    run = make_run(*place, **{**PLANTED, "method.r": 3})
    plain = preparation.prepare(run)
    base = preparation.load_base(run, plain.head, precision.resolve(run))
    taught = preparation.teach(run, plain, base)
    assert preparation.teach(run, plain, base) is taught
    teacher = copy.deepcopy(base.model)
    rows = taught.encoded.splits["train"]
    batch = run.task.collate(rows, plain.processor)
    run.task.plant(teacher, [run.task.collate(rows[i : i + 64], plain.processor) for i in range(0, len(rows), 64)])
    change = teacher.get_submodule(LAYER).weight - base.model.get_submodule(LAYER).weight
    u, s, vh = torch.linalg.svd(change.detach().double())
    assert float(s[3]) < 1e-5 < float(s[2])
    losses = {}
    for r in (0, 2, 3):
        stack = inject(base.model, [preparation.slice_plan(run, base.info)], info=base.info)
        a, b = torch.zeros(3, 32), torch.zeros(48, 3)
        a[:r], b[:, :r] = vh[:r].float(), (u[:, :r] * s[:r]).float()
        scaling = stack.plans[0].adapters[LAYER].scaling
        stack.load_slice(0, {f"{LAYER}.lora_A": a, f"{LAYER}.lora_B": b / scaling})
        with torch.no_grad():
            losses[r] = float(run.task.step(base.model, batch).loss_sum.mean())
        stack.remove()
    assert losses[0] == pytest.approx(1, abs=1e-5)
    assert 0.05 < losses[2] < 1
    assert losses[3] < 1e-8


def test_it_trains_in_a_pack_and_alone_alike(place: tuple[Path, Path], tmp_path: Path) -> None:
    runs = [make_run(*place, **{**PLANTED, "method.r": r, "trainer.precision": "64"}, role="confirm") for r in (1, 3)]
    packed, solo = Store(tmp_path / "packed"), Store(tmp_path / "solo")
    train(Pack("p", tuple(runs)), packed)
    for i, run in enumerate(runs):
        train(Pack(f"s{i}", (run,)), solo)
    for run in runs:
        one, two = packed.read(run.run_id), solo.read(run.run_id)
        assert one is not None and two is not None
        assert one.metrics["test/loss"] == pytest.approx(two.metrics["test/loss"], abs=1e-9)
        assert one.metrics["test/loss"] < 0.95


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task.planted_in": "nothing"}, "task.planted_in=nothing: a regex for some of: encoder"),
        ({"task.planted_in": "("}, "valid regular expression"),
        ({"task.planted_rank": 33}, "task.planted_rank=33: at most 32"),
    ],
)
def test_bad_settings(place: tuple[Path, Path], change: dict[str, Any], says: str) -> None:
    def teach() -> None:
        run = make_run(*place, **{**PLANTED, **change})
        plain = preparation.prepare(run)
        preparation.teach(run, plain, preparation.load_base(run, plain.head, precision.resolve(run)))

    with pytest.raises(ConfigError, match=says):
        teach()
