"""Whether padding leaves an example's loss as it is: one example is run at its own length, and padded to another's.

What a loss is then depends on which examples share a batch, and a pack is not what its runs are alone. XLNet's summary
of the last position, convolutions over tokens and Fourier mixing are such bases.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.config.contracts.task import Task
from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig, digest
from lorabench.training.preparation import Prepared

# shares by which a loss may differ for rounding alone, by the type of the base; norms of a float64 base are float32
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
WITHOUT_PADDING = "trainer.batch_size=1 trainer.eval_batch_size=1 trainer.reuse_trunk=false sweep.max_pack=1"

_known: set[str] = set()  # hashes of bases and tasks that passed in this process


def check_padding(run: RunConfig, model: nn.Module, prepared: Prepared, *, pack_size: int) -> None:
    """Raise `ConfigError` where padding changes an example's loss, and this run's batches would be padded.

    model: the base without adapters. pack_size: runs that may train together. One example is run at two lengths, once
    for each base and task in a process; a task without tokens, or with examples of one length, passes.
    """
    dtype = next(model.parameters()).dtype
    key = digest([dataclasses.asdict(run.model), dataclasses.asdict(run.task), str(dtype)])
    if key in _known or _is_never_padded(run, pack_size):
        return
    losses = _at_two_lengths(run.task, model, prepared)
    if losses is not None:
        alone, padded = losses
        if abs(alone - padded) > TOLERANCE.get(dtype, 1e-4) * max(1.0, abs(alone)):
            raise ConfigError(
                "model.source",
                getattr(run.model, "source", run.model.name),
                f"a base on which padding changes no loss; here that of one example is {alone:.8g} at its own length "
                f"and {padded:.8g} padded to a longer one, so results would depend on what shares a batch. "
                f"Take another base, or train without padding: {WITHOUT_PADDING}",
            )
    _known.add(key)


def _is_never_padded(run: RunConfig, pack_size: int) -> bool:
    t = run.trainer
    return pack_size == t.batch_size == t.eval_batch_size == 1 and not t.reuse_trunk


@torch.no_grad()
def _at_two_lengths(task: Task, model: nn.Module, prepared: Prepared) -> tuple[float, float] | None:
    """Return the loss of one example at its own length, and padded; None where nothing is padded."""
    examples = prepared.encoded.splits["train"]
    lengths = prepared.encoded.lengths.get("train") or [task.work_units(e) for e in examples]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    short, long = order[len(order) // 4], order[-1]
    short = short if lengths[short] < lengths[long] else order[0]
    if lengths[short] == lengths[long]:
        return None
    own = _batch(task, [examples[short]], prepared, model)
    padded = _batch(task, [examples[short], examples[long]], prepared, model)
    if task.token_mask(own) is None:
        return None
    was = model.training
    model.eval()
    try:
        first = {name: value[:1] for name, value in padded.items()}  # alone: what shares a batch is not asked here
        alone, beside = (float(task.step(model, batch).loss_sum.sum()) for batch in (own, first))
    finally:
        model.train(was)
    return alone, beside


def _batch(task: Task, examples: list[dict[str, Any]], prepared: Prepared, model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in task.collate(examples, prepared.processor).items()}
