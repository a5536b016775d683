"""What a task is: its data, its encoded examples, the loss of a batch, its metrics.

A task is one frozen dataclass `Config` that inherits `Task` and defines its abstract methods; everything else has a
default here. Tasks that read tokens inherit `lorabench.tasks.text_task.TextTask`. Shape letter: N examples of a batch.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.config.contracts.component import Component, attribute
from lorabench.config.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from lorabench.config.contracts.model import BaseInfo, HeadSpec

SPLITS = ("train", "val", "test")
Row = dict[str, Any]  # one raw example: "example" (its id) and the fields of its kind
Example = dict[str, Any]  # one encoded example: "example" (content hash below 2**63) and what `collate` needs

# Settings that say which data a task reads; the others say how much of it and how.
DATA_SETTINGS = (
    "kind", "source", "subset", "file", "text_column", "label_column", "prompt_column", "response_column",
)  # fmt: skip


@dataclass(frozen=True)
class TaskData:
    """Raw rows by split, de-duplicated and split by content.

    fingerprint: a hash of the content of every split that does not depend on the order of the rows.
    notes: counts such as `duplicates_removed`, and per split its size and labels; they go into the record.
    """

    splits: dict[str, list[Row]]
    fingerprint: str
    label_names: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """Examples ready for `collate`, by split.

    splits: dicts with "example" and what else the task needs. "group" is a whole number shared by examples that are not
    independent draws, such as the turns of one dialogue.
    lengths: work units of each example, by split; where it is empty, `Task.work_units` is asked for them.
    notes: counts such as truncated examples; they go into the record.
    """

    splits: dict[str, list[Example]]
    lengths: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepOutput:
    """One forward pass. A loss over any set of examples is sum(loss_sum) / sum(weight)."""

    loss_sum: Tensor  # [N], float32 or wider, carries the graph
    weight: Tensor  # [N]: target tokens for language modelling, class weight or 1 for classification
    rows: dict[str, Tensor]  # [N] each: what `metrics` needs of every example


@dataclass(frozen=True)
class Task(Component, ABC):
    """The contract of a task. Subclasses are frozen dataclasses named `Config`; their fields are the task's settings.

    Attributes below are plain defaults and no settings. A subclass that declares a field of the same name makes it one.
    """

    units: ClassVar[Mapping[str, str]] = {}
    """Metric to its unit in a report, such as {"loss": "nats"}. A metric without one is shown without a unit."""

    @attribute
    def kind(self) -> str:
        """The module of `lorabench.tasks` that defines the task, or `local`."""
        raise NotImplementedError

    @attribute
    def name(self) -> str:
        """What tables call the task."""
        raise NotImplementedError

    @attribute
    def probe(self) -> Task | None:
        """Another task, measured before and after training to see what was forgotten."""
        return None

    @attribute
    def probe_examples(self) -> int:
        """Held-out examples of the probe at most, and as many to fit a classifier on."""
        return 1000

    @attribute
    def probe_along(self) -> bool:
        """Whether the probe is measured at each evaluation of a confirmation run, too."""
        return False

    @attribute
    def style_prompts(self) -> int:
        """Held-out prompts replied to before and after training. 0: none."""
        return 0

    def validate(self, key: str) -> None:
        """Check settings against each other. key: the section's dotted name, such as "task". Raises `ConfigError`."""
        if self.val_fraction + self.test_fraction >= 1:
            allowed = "with val_fraction it must leave rows to train on"
            raise ConfigError(f"{key}.test_fraction", self.test_fraction, allowed)
        if self.probe_along and not self.probe:
            raise ConfigError(f"{key}.probe_along", True, f"false without {key}.probe")

    # -- metrics ----------------------------------------------------------------------------------------------------

    @attribute
    def metric(self) -> str:
        """The primary metric. Higher is better unless it is in `lower_is_better`."""
        raise NotImplementedError

    @attribute
    def metric_names(self) -> Sequence[str]:
        """Names that `study.metric` and `study.selection` may take."""
        return tuple(dict.fromkeys((self.metric, "loss")))

    @attribute
    def lower_is_better(self) -> Sequence[str]:
        """Names of the metrics of which less is better."""
        return ("loss",)

    @attribute
    def extra_metrics(self) -> Sequence[str]:
        """Metrics of the user's own, as `my_metrics.py:function`."""
        return ()

    # -- data -------------------------------------------------------------------------------------------------------

    @attribute
    def train_examples(self) -> int | None:
        """Examples to train on. None: all."""
        return None

    @attribute
    def val_examples(self) -> int | None:
        """Examples to validate on. None: all."""
        return None

    @attribute
    def test_examples(self) -> int | None:
        """Examples to test on. None: all."""
        return None

    @attribute
    def val_fraction(self) -> float:
        """Share of the examples validated on, where the data has no such split."""
        return 0.1

    @attribute
    def test_fraction(self) -> float:
        """Share of the examples tested on, where the data has no such split."""
        return 0.2

    @abstractmethod
    def load(self) -> TaskData:
        """Read, de-duplicate and split the data, without torch. Raises `ConfigError` for every fault of the data."""
        raise NotImplementedError

    @attribute
    def data_source(self) -> Mapping[str, Any]:
        """The settings that say which data is read. Two tasks with equal ones read the same data."""
        names = [f.name for f in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in DATA_SETTINGS if name in names}

    @abstractmethod
    def head(self, data: TaskData) -> HeadSpec:
        """Return what the task asks of a base: the transformers Auto class, and the names of the labels."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, data: TaskData, processor: Any) -> Encoded:
        """Turn rows into examples. processor: the base's tokenizer, image processor or None. Raises `ConfigError`."""
        raise NotImplementedError

    def encode_text(self, text: str, processor: Any, pair: str | None = None) -> Example:
        """Encode one text without a label, for `lorabench.predict`. pair: the second text where `paired`."""
        raise NotImplementedError

    @attribute
    def paired(self) -> bool:
        """Whether an example is two texts."""
        return False

    @attribute
    def has_replies(self) -> bool:
        """Whether an example is a prompt with the reply to it."""
        return False

    @attribute
    def reads_text(self) -> bool:
        """Whether the task has an `encode_text` of its own, so that a trained run can answer a text."""
        return type(self).encode_text is not Task.encode_text

    def check_base(self, encoded: Encoded, info: BaseInfo) -> None:
        """Raise `ConfigError` where the base cannot take these examples. By default any base can."""
        return None

    # -- work units: what the base computes on, such as tokens, patches or pixels ------------------------------------

    @attribute
    def longest(self) -> int | None:
        """The most work units an example can have, or None where that is not known.

        Memory is estimated from it, and attention is chosen by it.
        """
        return None

    def work_units(self, example: Example) -> int:
        """Return the work units of one encoded example: `longest`, or 1 where that is not known.

        Examples of about one size are batched together, and a part of a pack holds at most `trainer.part_tokens` units.
        """
        return self.longest or 1

    def token_mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return which positions [N, T] of a batch are tokens and no padding; None for a task without tokens."""
        return None

    # -- training ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, Tensor]:
        """Stack examples into tensors whose leading axis is N, "example" (int64 [N]) among them."""
        raise NotImplementedError

    @abstractmethod
    def step(self, model: nn.Module, batch: dict[str, Tensor]) -> StepOutput:
        """Run the model on a batch and return the loss and weight of each example."""
        raise NotImplementedError

    @abstractmethod
    def metrics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        """Compute all metrics, "loss" among them.

        rows: arrays [N] over all examples of a split: those of `StepOutput.rows`, "loss_sum" and "weight".
        """
        raise NotImplementedError

    def teach(
        self, model: nn.Module, encoded: Encoded, collate: Callable[[list[Example]], dict[str, Tensor]]
    ) -> Encoded:
        """Return the examples with targets that the base itself gives. model: a float32 copy, the task's to change."""
        raise NotImplementedError

    @attribute
    def is_taught(self) -> bool:
        """Whether the task has a `teach` of its own."""
        return type(self).teach is not Task.teach
