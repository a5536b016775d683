"""Greedy replies of a pack: many prompts at once, every slice beside the others, or the base alone.

Shape letters: K slices, B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lorabench.forgetting import base_key, evaluating
from lorabench.models.build import end_tokens, quiet
from lorabench.outcome import Session

NEW_TOKENS = 32  # the longest reply
ROWS = 64  # replies written at once

_of_base: dict[str, list[str]] = {}


def prompt_of(example: dict[str, Any]) -> np.ndarray:
    """Tokens of an encoded pair up to its reply, as the loss sees them."""
    ids: np.ndarray = example["input_ids"][: example["start"]]
    return ids


def real_reply(s: Session, example: dict[str, Any]) -> str:
    """The reply of an encoded pair, as long as one that is written here may be."""
    return _text(s.base.processor, example["input_ids"][example["start"] :][:NEW_TOKENS].tolist())


def of_base(s: Session, prompts: Sequence[np.ndarray]) -> list[str]:
    """What the base alone replies; to be asked before it trains. Computed once a base and set of prompts."""
    key = base_key(s, [p.tolist() for p in prompts])
    if key not in _of_base:
        (_of_base[key],) = written(s, prompts, [])
    return _of_base[key]


def written(s: Session, prompts: Sequence[np.ndarray], slices: Sequence[int]) -> list[list[str]]:
    """Of each slice, or with [] of the base alone, its reply to each prompt (token ids [T]).

    Prompts are padded on the left and sorted by length; what is too long for the base loses its beginning.
    """
    model: Any = s.base.model
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    cut = [p[-max(1, limit - NEW_TOKENS) :] for p in prompts]
    order = sorted(range(len(cut)), key=lambda i: len(cut[i]))
    size = max(1, len(slices))
    out = [[""] * len(cut) for _ in range(size)]
    per = max(1, ROWS // size)
    with evaluating(s) as device, s.stack.active(slices), quiet():
        for start in range(0, len(order), per):
            chunk = order[start : start + per]
            ids, mask = _left([cut[i] for i in chunk], s.base.processor.pad_token_id)
            made = model.generate(
                input_ids=ids.repeat(size, 1).to(device), attention_mask=mask.repeat(size, 1).to(device),
                max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=s.base.processor.pad_token_id,
                eos_token_id=end_tokens(model, s.base.processor),
            )  # fmt: skip
            rows = made[:, ids.shape[1] :].view(size, len(chunk), -1).tolist()
            for k, own in enumerate(rows):
                for i, tokens in zip(chunk, own, strict=True):
                    out[k][i] = _text(s.base.processor, tokens)
    return out


def _left(prompts: Sequence[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], padded on the left."""
    ids = np.full((len(prompts), max(map(len, prompts))), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, seen, own in zip(ids, mask, prompts, strict=True):
        row[len(row) - len(own) :] = own
        seen[len(row) - len(own) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _text(processor: Any, tokens: list[int]) -> str:
    text: str = processor.decode(tokens, skip_special_tokens=True)
    return text.strip()
