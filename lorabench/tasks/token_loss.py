"""Cross-entropy of next tokens with little memory. Shape letters: N examples, T tokens, V vocabulary, M target tokens."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORE = -100
CHUNK = 2**24  # logits widened at once: 64 MiB in float32


def token_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each example: the summed loss of its target tokens [N] (with the graph), their number [N], those right [N].

    labels: [N, T], `IGNORE` where nothing counts; position t is predicted from t - 1. Logits are only computed from
    the first position that counts on, and only those of target tokens are widened, a few examples at a time.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    targets = labels[:, 1:]
    counted = (targets != IGNORE).any(0).nonzero()
    first = int(counted[0]) if len(counted) else 0
    options: dict[str, Any] = {"use_cache": False} if _takes(model, "use_cache") else {}
    if _takes(model, "logits_to_keep"):
        options["logits_to_keep"] = labels.shape[1] - first
    logits = model(**inputs, **options).logits[:, -(labels.shape[1] - first) : -1]  # [N, T - 1 - first, V]
    targets = targets[:, first:]
    rows = max(1, CHUNK // max(1, logits.shape[1] * logits.shape[2]))
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    if torch.is_grad_enabled():  # widened logits are recomputed, not kept for the backward pass
        made = [checkpoint(_chunk, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in parts]
    else:
        made = [_chunk(a, b) for a, b in parts]
    losses, right = (torch.cat(column) for column in zip(*made, strict=True))
    return losses, (targets != IGNORE).sum(1), right


def _chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[n, t, V], [n, t] -> summed loss [n], right ones [n]. In float32, or float64 where the logits are."""
    import torch
    from torch.nn import functional as F

    mask = targets != IGNORE
    chosen, wanted = logits[mask], targets[mask]  # [M, V], [M]
    wide = chosen if chosen.dtype == torch.float64 else chosen.float()
    losses = wide.new_zeros(targets.shape)
    losses[mask] = F.cross_entropy(wide, wanted, reduction="none")
    right = torch.zeros_like(targets)
    right[mask] = (chosen.detach().argmax(-1) == wanted).to(right.dtype)
    return losses.sum(1), right.sum(1)


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
