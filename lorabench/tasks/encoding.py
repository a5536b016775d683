"""Texts to compact token ids, and examples to padded batches. Shape letters: N examples, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.config.contracts.model import BaseInfo
from lorabench.config.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_length(max_length: int, processor: Any, key: str = "task.max_length") -> None:
    """Raise `ConfigError` when examples may become longer than what the base was made for."""
    limit = getattr(processor, "model_max_length", None)
    if limit is not None and max_length > limit:
        raise ConfigError(key, max_length, f"at most {limit}, the longest input of this base")


POSITIONS = ("position_embeddings", "wpe")  # what embeddings of absolute positions are called


def check_positions(lengths: Mapping[str, Sequence[int]], info: BaseInfo, max_length: int | None) -> None:
    """Raise `ConfigError` where an example (lengths: in tokens, by split) is longer than the base has absolute positions,
    whatever its tokenizer says: a token beyond them has none."""
    tables = [x.in_features for x in info.layers if x.kind == "Embedding" and x.name.endswith(POSITIONS)]
    longest = max((max(found) for found in lengths.values() if len(found)), default=0)
    if tables and longest > min(tables):
        allowed = f"at most {min(tables)}, the positions this base has; the longest example has {longest} tokens"
        raise ConfigError("task.max_length", max_length, allowed)


def tokenize(
    processor: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int, *, special: bool = True
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Token ids (int32 [T]) and, where the base reads them, segment ids (int8 [T]) of each text or pair of texts.

    Also the length each would have had without the cut at `max_length`.
    """
    if not texts:
        return [], np.zeros(0, dtype=np.int64)
    inputs = (list(texts),) if pairs is None else (list(texts), list(pairs))
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    whole = processor(*inputs, **options)
    lengths = np.fromiter(map(len, whole["input_ids"]), dtype=np.int64, count=len(texts))
    out = [_pack(whole, i) for i in range(len(texts))]
    long = np.flatnonzero(lengths > max_length).tolist()
    if long:  # tokenized again by the tokenizer's own rule of cutting: it keeps the end token and the pair's halves
        again = tuple([column[i] for i in long] for column in inputs)
        cut = processor(*again, truncation=True, max_length=max_length, **options)
        for j, i in enumerate(long):
            out[i] = _pack(cut, j)
    return out, lengths


def opening(processor: Any) -> str:
    """The begin token, where a tokenizer puts it before every text of its own accord; else nothing."""
    bos = getattr(processor, "bos_token", None)
    starts = bos is not None and processor("", verbose=False)["input_ids"][:1] == [processor.bos_token_id]
    return str(bos) if starts else ""


def _pack(batch: Any, i: int) -> dict[str, Any]:
    made: dict[str, Any] = {"input_ids": np.asarray(batch["input_ids"][i], dtype=np.int32)}
    if "token_type_ids" in batch:
        made["token_type_ids"] = np.asarray(batch["token_type_ids"][i], dtype=np.int8)
    return made


def truncation(lengths: np.ndarray, max_length: int) -> dict[str, Any]:
    """How many examples were cut, for the notes."""
    n = int((lengths > max_length).sum())
    return {"truncated": n, "truncated_share": round(n / max(1, len(lengths)), 4), "max_length": max_length}


def pad(columns: Sequence[np.ndarray], value: int) -> Tensor:
    """Arrays [T_i] as one int64 tensor [N, T], padded on the right to the longest."""
    import torch

    out = np.full((len(columns), max(len(c) for c in columns)), value, dtype=np.int64)
    for row, column in zip(out, columns, strict=True):
        row[: len(column)] = column
    return torch.from_numpy(out)


def collate_tokens(examples: Sequence[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, where there are any `token_type_ids` [N, T], and `example` [N]."""
    import torch

    batch = {"input_ids": pad([e["input_ids"] for e in examples], processor.pad_token_id)}
    lengths = torch.tensor([len(e["input_ids"]) for e in examples])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    if "token_type_ids" in examples[0]:
        batch["token_type_ids"] = pad([e["token_type_ids"] for e in examples], 0)
    batch["example"] = torch.tensor([e["example"] for e in examples], dtype=torch.int64)
    return batch


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the base itself takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def mean_state(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over an example's own tokens of the last hidden state, [N, H], in float32 or wider."""
    hidden = model(**model_inputs(batch)).last_hidden_state
    hidden = hidden if hidden.dtype.itemsize == 8 else hidden.float()
    mask = batch["attention_mask"].unsqueeze(2).to(hidden.dtype)
    mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean
