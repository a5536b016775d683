"""What a base knows of another task, plain and with each slice of a pack: the numbers of `task.probe`.

Language modelling: nats a token on the probe's held-out texts. Classification: accuracy on its held-out texts of a linear
classifier fitted on frozen features, the mean hidden state of the body; the run's own head is left out.
Shape letters: K slices, B examples, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lorabench.config.errors import ConfigError
from lorabench.config.runs import digest
from lorabench.stats import logistic as regression
from lorabench.tasks.encoding import mean_state
from lorabench.tasks.probe import Probe
from lorabench.training import fsdp as shards
from lorabench.training.batches import EvalStream
from lorabench.training.session import Session

_plain: dict[str, float] = {}


@contextmanager
def evaluating(s: Session) -> Iterator[torch.device]:
    """The pack's base as its trainer evaluates it: on the device it gives, without dropout, gradients, in its precision."""
    device, mode = s.trainer.strategy.root_device, s.base.model.training
    home = next(s.base.model.parameters()).device
    s.base.model.to(device).eval()
    try:
        lower = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=autocast(s),
            cache_enabled=not shards.sharded(s.base.model),  # it would keep each weight that is gathered
        )  # fmt: skip
        with torch.no_grad(), lower:
            yield device
    finally:
        s.base.model.to(home).train(mode)


def autocast(s: Session) -> bool:
    return s.resolved.trainer_precision == "bf16-mixed"


def base_key(s: Session, *about: Any) -> str:
    """Of the plain base in the types it is used in, for what is computed once a base."""
    return digest([s.base.fingerprint, s.prepared.head.auto_class, s.resolved.base_dtype, s.resolved.attention,
                   s.resolved.device, autocast(s), *about])  # fmt: skip


def plain(s: Session, probe: Probe) -> float:
    """The number of the base alone, before it trains; computed once a base and probe."""
    key = base_key(s, probe.key)
    if key not in _plain:
        (_plain[key],) = measured(s, probe, [])
    return _plain[key]


def measured(s: Session, probe: Probe, slices: Sequence[int]) -> list[float]:
    """The number of each of these slices, all in one pass; [] gives that of the base alone."""
    with evaluating(s) as device, s.stack.active(slices):
        return (_losses if probe.metric == "loss" else _accuracies)(s, probe, slices, device)


def _losses(s: Session, probe: Probe, slices: Sequence[int], device: torch.device) -> list[float]:
    sums = np.zeros((max(1, len(slices)), 2))
    for part in _stream(s, probe, "test", slices):
        out = probe.task.step(s.base.model, {name: column.to(device) for name, column in part.batch.items()})
        for i, column in enumerate((out.loss_sum, out.weight)):
            sums[:, i] += column.double().view(len(sums), -1).sum(1).cpu().numpy()
    return [float(loss / weight) for loss, weight in sums]


def _accuracies(s: Session, probe: Probe, slices: Sequence[int], device: torch.device) -> list[float]:
    (x, y), (x_test, y_test) = (_features(s, probe, split, slices, device) for split in ("train", "test"))
    return [regression.held_out_accuracy(a, y, b, y_test) for a, b in zip(x, x_test, strict=True)]


def _features(
    s: Session, probe: Probe, split: str, slices: Sequence[int], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Features [K, N, H] in float64 and labels [N]."""
    body: Any = getattr(s.base.model, "base_model", s.base.model)
    stream, states = _stream(s, probe, split, slices), []
    for part in stream:
        try:
            batch = {name: column.to(device) for name, column in part.batch.items()}
            state = shards.within(s.base.model, lambda: mean_state(body, batch))  # noqa: B023
        except (AttributeError, TypeError) as e:
            raise ConfigError("task.probe", probe.task.name, "null: this base gives no last_hidden_state") from e
        states.append(state.double().view(max(1, len(slices)), -1, state.shape[-1]).cpu().numpy())
    labels = np.asarray([e["label"] for e in probe.splits[split]])
    return np.concatenate(states, axis=1), labels[stream.order]


def _stream(s: Session, probe: Probe, split: str, slices: Sequence[int]) -> EvalStream:
    """Parts of K * B rows, slice-major."""
    return EvalStream(
        probe.splits[split], probe.lengths[split], lambda: list(slices) or [0], rows=s.pack.runs[0].trainer.eval_batch_size,
        collate=lambda examples: probe.task.collate(examples, probe.processor), budget=s.resolved.part_tokens,
    )  # fmt: skip
