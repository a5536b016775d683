"""What a task hands on: its data, its encoded examples, the outcome of a step. Shape letter: N examples of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "val", "test")
Row = dict[str, Any]  # one raw example: "example" (its id) and the fields of its kind


@dataclass(frozen=True)
class TaskData:
    """Raw rows by split, de-duplicated and split by content.

    fingerprint: of the content of every split, whatever the order of the rows. notes: counts such as
    `duplicates_removed`, and per split its size and labels; they go into the record.
    """

    splits: dict[str, list[Row]]
    fingerprint: str
    label_names: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """Examples ready for `collate`, by split: dicts with "input_ids" (int32 [T]) and "example" (content hash below
    2**63), and what else the task needs; "group", a whole number, where some are no draws of their own (a dialogue). lengths: tokens of each example. notes: truncation."""

    splits: dict[str, list[dict[str, Any]]]
    lengths: dict[str, list[int]]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepOutput:
    """One forward pass. A loss over any set of examples is sum(loss_sum) / sum(weight)."""

    loss_sum: Tensor  # [N], float32 or wider, carries the graph
    weight: Tensor  # [N]: target tokens for language modelling, class weight or 1 for classification
    rows: dict[str, Tensor]  # [N] each: what `metrics` needs of every example
