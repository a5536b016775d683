"""How well a base, or each slice of a pack, does on another task: the scores of `task.probe`.

A probe of language modelling is scored by nats a token on its test split. One of classification is scored by the test
accuracy of a linear classifier fitted on frozen features, the mean hidden state of the body without the run's own head.
Shape letters: K slices, N examples, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lorabench.config.errors import ConfigError
from lorabench.config.runs import digest
from lorabench.stats import logistic
from lorabench.tasks.encoding import mean_state
from lorabench.tasks.probe import ProbeData
from lorabench.training import fsdp
from lorabench.training.batches import EvalStream
from lorabench.training.session import Session

_base_scores: dict[str, float] = {}


@contextmanager
def evaluation_mode(s: Session) -> Iterator[torch.device]:
    """Set the base up as the trainer evaluates it, and put it back afterwards. Yields the device.

    Inside there is no dropout and no gradient, and autocast is on where training uses it.
    """
    device, mode = s.trainer.strategy.root_device, s.base.model.training
    home = next(s.base.model.parameters()).device
    s.base.model.to(device).eval()
    try:
        autocast = torch.autocast(
            device.type,
            dtype=torch.bfloat16,
            enabled=uses_autocast(s),
            cache_enabled=not fsdp.is_sharded(s.base.model),  # it would keep each weight that is gathered
        )
        with torch.no_grad(), autocast:
            yield device
    finally:
        s.base.model.to(home).train(mode)


def uses_autocast(s: Session) -> bool:
    """Whether the pack trains float32 weights under bf16 autocast."""
    return s.resolved.trainer_precision == "bf16-mixed"


def base_key(s: Session, *about: Any) -> str:
    """Return a key of the untrained base in the types it is used in, and of `about`: for results computed once."""
    r = s.resolved
    base = [s.base.fingerprint, s.prepared.head.auto_class, r.base_dtype, r.attention, r.device, uses_autocast(s)]
    return digest([*base, *about])


def base_score(s: Session, probe: ProbeData) -> float:
    """Score the base alone. Call it before the base trains; computed once for each base and probe in a process."""
    key = base_key(s, probe.key)
    if key not in _base_scores:
        (_base_scores[key],) = score(s, probe, [])
    return _base_scores[key]


def score(s: Session, probe: ProbeData, slices: Sequence[int]) -> list[float]:
    """Score each of these slices, all in one pass, or the base alone where `slices` is empty.

    Raises `ConfigError` where the probe needs features and the base gives no hidden states.
    """
    with evaluation_mode(s) as device, s.stack.active(slices):
        if probe.metric == "loss":
            return _losses(s, probe, slices, device)
        return _accuracies(s, probe, slices, device)


def _losses(s: Session, probe: ProbeData, slices: Sequence[int], device: torch.device) -> list[float]:
    """Return nats a token of each slice on the probe's test split."""
    sums = np.zeros((max(1, len(slices)), 2))
    for part in _stream(s, probe, "test", slices):
        out = probe.task.step(s.base.model, {name: column.to(device) for name, column in part.batch.items()})
        for i, column in enumerate((out.loss_sum, out.weight)):
            sums[:, i] += column.double().view(len(sums), -1).sum(1).cpu().numpy()
    return [float(loss / weight) for loss, weight in sums]


def _accuracies(s: Session, probe: ProbeData, slices: Sequence[int], device: torch.device) -> list[float]:
    """Return the test accuracy of each slice's own linear classifier."""
    (x, y), (x_test, y_test) = (_features(s, probe, split, slices, device) for split in ("train", "test"))
    return [logistic.held_out_accuracy(a, y, b, y_test) for a, b in zip(x, x_test, strict=True)]


def _features(
    s: Session, probe: ProbeData, split: str, slices: Sequence[int], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean hidden states [K, N, H] in float64 and labels [N] of one split."""
    body: Any = getattr(s.base.model, "base_model", s.base.model)
    stream, states = _stream(s, probe, split, slices), []
    for part in stream:
        try:
            batch = {name: column.to(device) for name, column in part.batch.items()}
            state = fsdp.run_gathered(s.base.model, lambda: mean_state(body, batch))  # noqa: B023
        except (AttributeError, TypeError) as e:
            raise ConfigError("task.probe", probe.task.name, "null: this base gives no last_hidden_state") from e
        states.append(state.double().view(max(1, len(slices)), -1, state.shape[-1]).cpu().numpy())
    labels = np.asarray([e["label"] for e in probe.splits[split]])
    return np.concatenate(states, axis=1), labels[stream.order]


def _stream(s: Session, probe: ProbeData, split: str, slices: Sequence[int]) -> EvalStream:
    """Return one split of the probe in parts of K * N rows, slice-major."""
    return EvalStream(
        probe.splits[split],
        probe.lengths[split],
        lambda: list(slices) or [0],
        rows=s.pack.runs[0].trainer.eval_batch_size,
        collate=lambda examples: probe.task.collate(examples, probe.processor),
        budget=s.resolved.part_tokens,
    )
