"""One device, decided once; and a new head's logits, which are float32 under every method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_lightning.accelerators import CPUAccelerator, MPSAccelerator

from fixtures import bases, runs
from lorabench.adapters import inject
from lorabench.config.contracts.method import SlicePlan
from lorabench.training.fit import TrainingClock, make_trainer
from lorabench.training.precision import resolve


def test_the_trainer_takes_the_device_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.make_run(tmp_path, tmp_path / "data.csv", **{"trainer.accelerator": "auto"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))  # an Apple Silicon machine
    resolved = resolve(run)
    trainer = make_trainer(run, resolved, TrainingClock(lambda step, total: None, 3, {}), 0)
    assert resolved.device == "cpu"
    assert isinstance(trainer.accelerator, CPUAccelerator)


@pytest.mark.parametrize("full", [True, False])
def test_logits_of_a_new_head_are_float32_in_bf16(full: bool) -> None:
    """full: float32 weights under autocast. Else a bf16 base without it."""
    model, info = bases.bert()
    model = model if full else model.bfloat16()
    batch = {"input_ids": torch.arange(12).view(2, 6) + 1}
    plan = SlicePlan(0, full=True) if full else SlicePlan(0, modules=info.head)
    stack = inject(model, [plan], info=info)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=full):
        logits = model(**batch).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # not bf16 numbers in a wider type
    logits.sum().backward()
    stack.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**batch).logits.dtype == torch.bfloat16  # the base is given back as it was
