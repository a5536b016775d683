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

    labels: [N, T], `IGNORE` where nothing counts; position t is predicted from t - 1. Only where a target follows are
    logits computed, and they are widened to float32 (float64 stays) a few at a time.
    """
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # [N, T]: what each position predicts
    counted = following != IGNORE
    logits, wanted = _logits(model, inputs, counted), following[counted]  # [M, V], [M]
    rows = max(1, CHUNK // logits.shape[1])
    parts = zip(logits.split(rows), wanted.split(rows), strict=True)
    if torch.is_grad_enabled():  # widened logits are recomputed, not kept for the backward pass
        made = [checkpoint(_chunk, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in parts]
    else:
        made = [_chunk(a, b) for a, b in parts]
    losses, right = (torch.cat(column) for column in zip(*made, strict=True))
    by_token = losses.new_zeros(counted.shape).masked_scatter(counted, losses)
    return by_token.sum(1), counted.sum(1), torch.zeros_like(labels).masked_scatter(counted, right).sum(1)


def _logits(model: nn.Module, inputs: dict[str, Tensor], counted: Tensor) -> Tensor:
    """[M, V] of the M positions that count. A plain head sees those alone; one with adapters has slices to tell apart."""
    from torch import nn

    options: dict[str, Any] = {"use_cache": False} if _takes(model, "use_cache") else {}
    own = getattr(model, "get_output_embeddings", None)
    head = own() if own else None
    if type(head) is not nn.Linear:
        chosen: Tensor = model(**inputs, **options).logits[counted]
        return chosen
    at = counted.flatten().nonzero().squeeze(1)
    hook = head.register_forward_pre_hook(lambda _, args: args[0].flatten(0, 1).index_select(0, at)[None])
    try:
        logits: Tensor = model(**inputs, **options).logits
    finally:
        hook.remove()
    return logits[0]


def _chunk(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[m, V], [m] -> loss [m], 1 where it is right [m]. In float32, or float64 where the logits are."""
    import torch
    from torch.nn import functional as F

    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, wanted, reduction="none"), (logits.detach().argmax(-1) == wanted).to(wanted.dtype)


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
