"""Texts to compact token ids, and examples to padded batches. Shape letters: N examples, T tokens, H hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.config.contracts.model import POSITION_EMBEDDINGS, BaseInfo
from lorabench.config.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_max_length(max_length: int, processor: Any, key: str = "task.max_length") -> None:
    """Raise `ConfigError` where the tokenizer says that the base takes fewer tokens than `max_length`."""
    limit = getattr(processor, "model_max_length", None)
    if limit is not None and max_length > limit:
        raise ConfigError(key, max_length, f"at most {limit}, the longest input of this base")


def check_positions(lengths: Mapping[str, Sequence[int]], info: BaseInfo, max_length: int | None) -> None:
    """Raise `ConfigError` where an example has more tokens than the base has absolute positions.

    lengths: tokens of each example, by split. The tokenizer's own limit may be missing or wrong; the positions are not.
    """
    tables = [x for x in info.layers if x.in_features and x.name.endswith(POSITION_EMBEDDINGS)]
    positions = [x.in_features - x.offset for x in tables]
    longest = max((max(split) for split in lengths.values() if len(split)), default=0)
    if positions and longest > min(positions):
        allowed = f"at most {min(positions)}, the positions this base has; the longest example has {longest} tokens"
        raise ConfigError("task.max_length", max_length, allowed)


def tokenize(
    processor: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int, *, special: bool = True
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Tokenize each text, or pair of texts, and cut it at `max_length` tokens.

    special: whether the tokenizer adds its begin and end tokens. Returns one dict an example, "input_ids" (int32 [T])
    and, where the base reads segments, "token_type_ids" (int8 [T]); and the lengths [N] before the cut.
    """
    if not texts:
        return [], np.zeros(0, dtype=np.int64)
    inputs = (list(texts),) if pairs is None else (list(texts), list(pairs))
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    whole = processor(*inputs, **options)
    lengths = np.fromiter(map(len, whole["input_ids"]), dtype=np.int64, count=len(texts))
    out = [_compact(whole, i) for i in range(len(texts))]
    long = np.flatnonzero(lengths > max_length).tolist()
    if long:  # the tokenizer's own rule of cutting keeps the end token and both halves of a pair
        again = tuple([column[i] for i in long] for column in inputs)
        cut = processor(*again, truncation=True, max_length=max_length, **options)
        for j, i in enumerate(long):
            out[i] = _compact(cut, j)
    return out, lengths


def _compact(batch: Any, i: int) -> dict[str, Any]:
    """Return example i of a tokenizer's output as arrays of small integers."""
    example: dict[str, Any] = {"input_ids": np.asarray(batch["input_ids"][i], dtype=np.int32)}
    if "token_type_ids" in batch:
        example["token_type_ids"] = np.asarray(batch["token_type_ids"][i], dtype=np.int8)
    return example


def begin_token(processor: Any) -> str:
    """Return the token that a tokenizer puts before every text by itself, or an empty text where it does not."""
    bos = getattr(processor, "bos_token", None)
    starts = bos is not None and processor("", verbose=False)["input_ids"][:1] == [processor.bos_token_id]
    return str(bos) if starts else ""


def truncation_notes(lengths: np.ndarray, max_length: int) -> dict[str, Any]:
    """Count the examples that were cut. lengths: tokens [N] before the cut."""
    n = int((lengths > max_length).sum())
    return {"truncated": n, "truncated_share": round(n / max(1, len(lengths)), 4), "max_length": max_length}


def pad(columns: Sequence[np.ndarray], value: int) -> Tensor:
    """Stack arrays [T_i] into one int64 tensor [N, T], padded on the right with `value` to the longest."""
    import torch

    out = np.full((len(columns), max(len(c) for c in columns)), value, dtype=np.int64)
    for row, column in zip(out, columns, strict=True):
        row[: len(column)] = column
    return torch.from_numpy(out)


def collate_tokens(examples: Sequence[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
    """Stack examples into `input_ids`, `attention_mask`, `token_type_ids`? [N, T], and `example` [N]."""
    import torch

    batch = {"input_ids": pad([e["input_ids"] for e in examples], processor.pad_token_id)}
    lengths = torch.tensor([len(e["input_ids"]) for e in examples])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    if "token_type_ids" in examples[0]:
        batch["token_type_ids"] = pad([e["token_type_ids"] for e in examples], 0)
    batch["example"] = torch.tensor([e["example"] for e in examples], dtype=torch.int64)
    return batch


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a batch that a text model's forward pass takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def mean_state(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean last hidden state over the tokens of each example, without padding: [N, H], float32 or wider."""
    hidden = model(**model_inputs(batch)).last_hidden_state
    hidden = hidden if hidden.dtype.itemsize == 8 else hidden.float()
    mask = batch["attention_mask"].unsqueeze(2).to(hidden.dtype)
    mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean
