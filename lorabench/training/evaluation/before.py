"""What a language model scores on the test split before it trains: without it, a loss after training says little."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from lorabench.training.evaluation.forgetting import base_key, evaluation_mode
from lorabench.training.session import Session

_known: dict[str, dict[str, float]] = {}


def base_metrics(s: Session) -> dict[str, float]:
    """Return the test metrics of the base alone, as `base/<metric>`; {} where the task gives it a new head.

    Call it before the base trains. It is computed once for each base and task in a process.
    """
    if s.prepared.head.label_names or s.prepared.head.auto_class != "AutoModelForCausalLM" or s.prepared.info.head:
        return {}
    key = base_key(s, s.prepared.data.fingerprint, dataclasses.asdict(s.pack.runs[0].task))
    if key not in _known:
        found = s.module.task.metrics(_test_rows(s))
        _known[key] = {f"base/{name}": float(value) for name, value in found.items()}
    return _known[key]


def _test_rows(s: Session) -> dict[str, np.ndarray]:
    """Return what the task's metrics need of each test example, [N] each."""
    chunks: list[dict[str, np.ndarray]] = []
    with evaluation_mode(s) as device, s.stack.active([]):
        for part in s.eval_stream("test", lambda: [0], dealt=False):
            batch = {name: column.to(device) for name, column in part.batch.items()}
            out = s.module.task.step(s.base.model, batch)
            columns = {"example": batch["example"], **out.rows, "loss_sum": out.loss_sum, "weight": out.weight}
            chunks.append({name: _column(values) for name, values in columns.items()})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _column(values: torch.Tensor) -> np.ndarray:
    half = values.dtype in (torch.bfloat16, torch.float16)
    return np.asarray((values.float() if half else values).cpu())
