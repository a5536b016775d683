"""Greedy replies to many prompts at once, by every slice of a pack or by the base alone.

Shape letters: K slices, N rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lorabench.models.pretrained import end_tokens, quiet
from lorabench.training.evaluation.forgetting import base_key, evaluation_mode
from lorabench.training.session import Session

MAX_NEW_TOKENS = 32
MAX_ROWS = 64  # rows generated at once, over all slices

_base_replies: dict[str, list[str]] = {}


def prompt_tokens(example: dict[str, Any]) -> np.ndarray:
    """Return the token ids [T] of an encoded pair up to its reply, as the loss sees them."""
    ids: np.ndarray = example["input_ids"][: example["start"]]
    return ids


def reference_reply(session: Session, example: dict[str, Any]) -> str:
    """Return the reply of an encoded pair as text, cut at the length of a generated one."""
    return _decode(session.base.processor, example["input_ids"][example["start"] :][:MAX_NEW_TOKENS].tolist())


def base_replies(session: Session, prompts: Sequence[np.ndarray]) -> list[str]:
    """Return what the base alone replies to each prompt. Call it before the base trains.

    Computed once for each base and set of prompts in a process.
    """
    key = base_key(session, [p.tolist() for p in prompts])
    if key not in _base_replies:
        (_base_replies[key],) = generate(session, prompts, [])
    return _base_replies[key]


def generate(session: Session, prompts: Sequence[np.ndarray], slices: Sequence[int]) -> list[list[str]]:
    """Generate a reply to each prompt with each slice, or with the base alone where `slices` is empty.

    prompts: token ids [T] each; one that is too long for the base loses its beginning.
    Returns one list of replies a slice, in the order of the prompts.
    """
    processor, model = session.base.processor, session.base.model
    copies = max(1, len(slices))
    replies = [[""] * len(prompts) for _ in range(copies)]
    with evaluation_mode(session) as device, session.stack.active(slices), quiet():
        for length, positions in _batches(prompts, _max_prompt_tokens(model), max(1, MAX_ROWS // copies)):
            ids = np.stack([prompts[i][-length:] for i in positions] * copies).astype(np.int64)
            texts = _greedy(model, processor, torch.from_numpy(ids).to(device))
            for row, text in enumerate(texts):
                copy, column = divmod(row, len(positions))
                replies[copy][positions[column]] = text
    return replies


def _batches(prompts: Sequence[np.ndarray], longest: int, size: int) -> Iterator[tuple[int, list[int]]]:
    """Yield lengths and the positions of at most `size` prompts of that length, cut at `longest` tokens.

    Nothing is padded: some attention gives NaN where all of a row is masked.
    """
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(min(len(prompt), longest), []).append(i)
    for length, positions in by_length.items():
        for start in range(0, len(positions), size):
            yield length, positions[start : start + size]


def _max_prompt_tokens(model: Any) -> int:
    """Return how long a prompt may be so that the base has positions left for the reply."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    return max(1, limit - MAX_NEW_TOKENS)


def _greedy(model: Any, processor: Any, ids: torch.Tensor) -> list[str]:
    """Generate a reply to each row of ids [N, T]."""
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=processor.pad_token_id,
        eos_token_id=end_tokens(model, processor),
    )
    return [_decode(processor, row) for row in generated[:, ids.shape[1] :].tolist()]


def _decode(processor: Any, tokens: list[int]) -> str:
    text: str = processor.decode(tokens, skip_special_tokens=True)
    return text.strip()
