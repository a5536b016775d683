"""What all tasks that read tokens have in common: work units are tokens. Shape letters: N examples, T tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from lorabench.models.base import BaseInfo
from lorabench.tasks.contract import Encoded, Example, Task
from lorabench.tasks.encoding import check_positions

if TYPE_CHECKING:
    from torch import Tensor


class TextTask(Task):
    """A task whose examples hold "input_ids" (int32 [T]) and whose batches hold "attention_mask" ([N, T])."""

    max_length: int | None = None  # tokens an example is cut at; None: not cut

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


@cache
def with_defaults(config: type) -> type:
    """Return a user's `Config` with the defaults of `TextTask`: itself where it inherits `Task` already.

    A class that inherits nothing is not asked for its methods: one that is missing raises where it is called.
    """
    if issubclass(config, Task):
        return config
    names = {"__module__": config.__module__, "__qualname__": config.__qualname__, "__doc__": config.__doc__}
    made = type(config.__name__, (config, TextTask), names)
    made.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return made
