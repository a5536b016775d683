"""What all tasks that read tokens have in common: work units are tokens. Shape letters: N examples, T tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabench.config.contracts.component import attribute
from lorabench.config.contracts.model import BaseInfo
from lorabench.config.contracts.task import Encoded, Example, Task
from lorabench.tasks.encoding import check_positions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TextTask(Task):
    """A task whose examples hold "input_ids" (int32 [T]) and whose batches hold "attention_mask" ([N, T])."""

    @attribute
    def max_length(self) -> int | None:
        """Tokens an example is cut at. None: not cut."""
        return None

    @property
    def longest(self) -> int | None:
        return self.max_length

    def work_units(self, example: Example) -> int:
        return len(example["input_ids"])

    def token_mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        return batch.get("attention_mask")

    def check_base(self, encoded: Encoded, info: BaseInfo) -> None:
        """Raise `ConfigError` where an example is longer than the base has absolute positions."""
        check_positions(encoded.lengths, info, self.max_length)
