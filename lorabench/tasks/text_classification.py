"""One label for each text, or pair of texts. Shape letters: N examples, T tokens, C classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lorabench.config.contracts.model import HeadSpec
from lorabench.config.contracts.task import Encoded, StepOutput, TaskData
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.tasks import encoding, metrics, split
from lorabench.tasks.labelled_texts import LabelledTexts
from lorabench.tasks.metrics import ExtensibleMetrics

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Config(ExtensibleMetrics, LabelledTexts):
    """Classification of tweets, food reviews, BBC topics, any GLUE classification task, or a table of the user's."""

    kind: str = knob("text_classification", help="the task's module", choices=("text_classification",))
    name: str = knob("classification", help="what tables call it")
    class_weights: Any = knob(None, help="null, balanced, or one number a label in the order of the label names")
    metric: str = knob("accuracy", help="primary metric: accuracy, macro_f1, mcc, loss or one of extra_metrics")
    extra_metrics: list[str] = knob([], help="your own: my_metrics.py:function")

    own_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc", "loss")
    units: ClassVar[dict[str, str]] = {"loss": "nats"}

    def validate(self, key: str) -> None:
        super().validate(key)
        w = self.class_weights
        numbers = isinstance(w, (list, tuple)) and all(isinstance(x, (int, float)) and x > 0 for x in w)
        if not (w is None or w == "balanced" or numbers):
            raise ConfigError(f"{key}.class_weights", w, "allowed: null, balanced, or a list of numbers above 0")

    def _check_labels(self, names: Sequence[str]) -> None:
        super()._check_labels(names)
        w = self.class_weights
        if isinstance(w, (list, tuple)) and len(w) != len(names):
            raise ConfigError("task.class_weights", list(w), f"one number for each of: {', '.join(names)}")

    def head(self, data: TaskData) -> HeadSpec:
        return HeadSpec("AutoModelForSequenceClassification", data.label_names)

    # -- examples ---------------------------------------------------------------------------------------------------

    def encode(self, data: TaskData, processor: Any) -> Encoded:
        """Return examples {"input_ids", "token_type_ids"?, "example", "group", "label", "weight"} by split."""
        encoded, weights = super().encode(data, processor), self._weights(data)
        number = {name: i for i, name in enumerate(data.label_names)}
        for name, rows in data.splits.items():
            for example, row in zip(encoded.splits[name], rows, strict=True):
                label = number[row["label"]]
                example |= {"label": label, "weight": weights[label]}
        encoded.notes["class_weights"] = weights if self.class_weights is not None else None
        return encoded

    def _weights(self, data: TaskData) -> list[float]:
        """Return the weight of each label; balanced: n / (C * count) over the training split, as in scikit-learn."""
        if self.class_weights is None:
            return [1.0] * len(data.label_names)
        if self.class_weights != "balanced":
            return [float(w) for w in self.class_weights]
        counts = Counter(r["label"] for r in data.splits["train"])
        return [len(data.splits["train"]) / (len(counts) * counts[name]) for name in data.label_names]

    def encode_text(self, text: str, processor: Any, pair: str | None = None) -> dict[str, Any]:
        """Return one example of a text, or pair, with label 0 in place of the unknown one."""
        tokens, _ = encoding.tokenize(processor, [text], None if pair is None else [pair], self.max_length)
        return tokens[0] | {"label": 0, "weight": 1.0, "example": split.content_hash(text, pair or "")}

    def collate(self, examples: Sequence[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `token_type_ids`? [N, T]; `labels`, `weight`, `example` [N]."""
        import torch

        batch = encoding.collate_tokens(examples, processor)
        batch["labels"] = torch.tensor([e["label"] for e in examples], dtype=torch.int64)
        batch["weight"] = torch.tensor([e["weight"] for e in examples], dtype=torch.float32)
        return batch

    # -- loss and metrics -------------------------------------------------------------------------------------------

    def step(self, model: nn.Module, batch: dict[str, Tensor]) -> StepOutput:
        """Return the cross-entropy of each example times its class weight, in float32 (float64 where the base is)."""
        import torch
        from torch.nn import functional as F

        logits = model(**encoding.model_inputs(batch)).logits  # [N, C]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels, weight = batch["labels"], batch["weight"].to(logits.dtype)
        prediction = logits.detach().argmax(-1)
        rows = {"example": batch["example"], "label": labels, "prediction": prediction, "correct": prediction == labels}
        return StepOutput(F.cross_entropy(logits, labels, reduction="none") * weight, weight, rows)

    def metrics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        """Return accuracy, macro_f1, mcc, loss and the user's own, from arrays [N] over all examples."""
        label, prediction = rows["label"], rows["prediction"]
        return {
            "loss": metrics.mean_loss(rows),
            "accuracy": metrics.accuracy(label, prediction),
            "macro_f1": metrics.macro_f1(label, prediction),
            "mcc": metrics.mcc(label, prediction),
        } | metrics.extra(self.extra_metrics, rows, "task.extra_metrics")
