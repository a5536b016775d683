"""A task of your own: several labels a text, from a csv file with the columns `text` and `labels` ("funny;rude").

    python -m lorabench task=local task.file=docs/examples/my_task.py +task.data=my.csv

One frozen dataclass `Config` that inherits `TextTask`. What is optional has its default in the contract,
`lorabench/config/contracts/task.py`; docs/extending.md has a task without text.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lorabench.config.contracts.model import HeadSpec
from lorabench.config.contracts.task import Encoded, StepOutput, TaskData
from lorabench.tasks import encoding, files, metrics, split
from lorabench.tasks.text_task import TextTask


@dataclass(frozen=True)
class Config(TextTask):
    data: str  # fields without a default must be given
    file: str  # this file
    kind: str = "local"
    name: str = "multi-label"
    metric: str = "exact_match"
    max_length: int = 64

    units: ClassVar = {"loss": "nats"}

    def load(self):
        """Read and split. Whatever is wrong with the data is a ConfigError here, before anything is trained."""
        table = files.read_table(self.data, {"text": "text", "labels": "labels"}, "task.data")
        rows = [{"text": t, "labels": y.split(";")} for t, y in zip(table["text"], table["labels"], strict=True)]
        rows = split.identify(rows, ("text", "labels"))
        rows, notes = split.deduplicate(
            [r | {"label": str(r["labels"])} for r in rows], lambda r: split.plain_key(r["text"])
        )
        splits = split.split_rows(rows, lambda r: split.plain_key(r["text"]), val_fraction=0.2, test_fraction=0.2)
        names = sorted({label for r in rows for label in r["labels"]})
        return TaskData(splits, split.fingerprint(splits), tuple(names), notes)

    def head(self, data):
        return HeadSpec("AutoModelForSequenceClassification", data.label_names)

    def encode(self, data, processor):
        splits, lengths = {}, {}
        for name, rows in data.splits.items():
            examples, _ = encoding.tokenize(processor, [r["text"] for r in rows], None, self.max_length)
            for example, row in zip(examples, rows, strict=True):
                example["target"] = np.array([label in row["labels"] for label in data.label_names], dtype=np.float32)
                example["example"] = row["example"]
            splits[name], lengths[name] = examples, [len(e["input_ids"]) for e in examples]
        return Encoded(splits, lengths)

    def collate(self, examples, processor):
        import torch

        targets = torch.from_numpy(np.stack([e["target"] for e in examples]))
        return encoding.collate_tokens(examples, processor) | {"target": targets}

    def step(self, model, batch):
        """loss_sum and weight of each example; a run's loss is the ratio of their sums over the whole batch."""
        import torch
        from torch.nn import functional as F

        logits = model(**encoding.model_inputs(batch)).logits.float()
        losses = F.binary_cross_entropy_with_logits(logits, batch["target"], reduction="none").mean(1)
        exact = ((logits > 0) == (batch["target"] > 0.5)).all(1)
        return StepOutput(losses, torch.ones_like(losses), {"example": batch["example"], "exact": exact})

    def metrics(self, rows):
        return {"loss": metrics.mean_loss(rows), "exact_match": float(rows["exact"].mean())}
