"""Greedy replies of a pack: many prompts at once, every slice beside the others, or the base alone.

Shape letters: K slices, B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lorabench.models.build import end_tokens, quiet
from lorabench.training.evaluation.forgetting import base_key, evaluating
from lorabench.training.session import Session

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

    Prompts of one length go together, so that nothing is padded: some attention gives NaN where all of a row is masked.
    What is too long for the base loses its beginning.
    """
    model: Any = s.base.model
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    alike: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        alike.setdefault(min(len(prompt), max(1, limit - NEW_TOKENS)), []).append(i)
    size = max(1, len(slices))
    out, per = [[""] * len(prompts) for _ in range(size)], max(1, ROWS // size)
    with evaluating(s) as device, s.stack.active(slices), quiet():
        for length, same in alike.items():
            for start in range(0, len(same), per):
                chunk = same[start : start + per]
                ids = np.stack([prompts[i][-length:] for i in chunk] * size).astype(np.int64)
                rows = _greedy(model, s.base.processor, torch.from_numpy(ids).to(device))
                for position, text in enumerate(rows):
                    out[position // len(chunk)][chunk[position % len(chunk)]] = text
    return out


def _greedy(model: Any, processor: Any, ids: torch.Tensor) -> list[str]:
    """The reply to each row of ids [N, T]."""
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=processor.pad_token_id, eos_token_id=end_tokens(model, processor),
    )  # fmt: skip
    return [_text(processor, row) for row in made[:, ids.shape[1] :].tolist()]


def _text(processor: Any, tokens: list[int]) -> str:
    text: str = processor.decode(tokens, skip_special_tokens=True)
    return text.strip()
