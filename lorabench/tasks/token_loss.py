"""Cross-entropy of next tokens with little memory.

Shape letters: N examples, T tokens, V vocabulary, M target tokens, m of them in one chunk.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORE = -100  # the label of a token that is no target, as in transformers
MAX_CHUNK_LOGITS = 2**24  # widened to float32 at once: 64 MiB


def token_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each example the summed loss of its target tokens, their number, and how many are right, [N] each.

    labels: [N, T], `IGNORE` where nothing counts; position t is predicted from t - 1. The loss carries the graph.
    Logits are computed only where a target follows. They are widened to float32 (float64 stays) in chunks.
    """
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # [N, T]: what each position predicts
    counted = following != IGNORE
    logits, targets = _logits(model, inputs, counted), following[counted]  # [M, V], [M]
    rows = max(1, MAX_CHUNK_LOGITS // logits.shape[1])
    chunks = zip(logits.split(rows), targets.split(rows), strict=True)
    if torch.is_grad_enabled():  # widened logits are recomputed, not kept for the backward pass
        results = [checkpoint(_chunk_losses, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in chunks]
    else:
        results = [_chunk_losses(a, b) for a, b in chunks]
    losses, right = (torch.cat(column) for column in zip(*results, strict=True))
    by_token = losses.new_zeros(counted.shape).masked_scatter(counted, losses)
    return by_token.sum(1), counted.sum(1), torch.zeros_like(labels).masked_scatter(counted, right).sum(1)


def _logits(model: nn.Module, inputs: dict[str, Tensor], counted: Tensor) -> Tensor:
    """Return the logits [M, V] of the positions that count.

    A plain head is given those positions alone. A head with adapters is given all: it tells slices apart by the rows.
    """
    from torch import nn

    options: dict[str, Any] = {"use_cache": False} if _takes(model, "use_cache") else {}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if type(head) is not nn.Linear:
        of_counted: Tensor = model(**inputs, **options).logits[counted]
        return of_counted
    at = counted.flatten().nonzero().squeeze(1)
    hook = head.register_forward_pre_hook(lambda _, args: args[0].flatten(0, 1).index_select(0, at)[None])
    try:
        logits: Tensor = model(**inputs, **options).logits
    finally:
        hook.remove()
    return logits[0]


def _chunk_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss [m] of each target, and 1 [m] where it is predicted right, in float32 (float64 stays)."""
    import torch
    from torch.nn import functional as F

    wide = logits if logits.dtype == torch.float64 else logits.float()
    right = (logits.detach().argmax(-1) == targets).to(targets.dtype)
    return F.cross_entropy(wide, targets, reduction="none"), right


def _takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward pass has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters
