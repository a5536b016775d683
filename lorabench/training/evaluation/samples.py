"""A few test examples of a text task, with the answer of the model before training and that of each slice after.

<run dir>/samples.json: at most 8 of {"prompt" or "text", "expected", "before", "after"}, all strings; the same examples
for every run on the same test split. Answers are replies to prompts, or label names where texts are classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorabench.config.contracts.task import Row
from lorabench.runtime.files import atomic_write
from lorabench.store.records import dump_json
from lorabench.tasks.probe import CLASSIFICATION
from lorabench.training import distributed
from lorabench.training.evaluation import replies
from lorabench.training.evaluation.forgetting import evaluation_mode
from lorabench.training.session import Session

SAMPLES_FILE = "samples.json"
MAX_SAMPLES = 8


@dataclass(frozen=True)
class Samples:
    """Examples to show.

    items: what a reader sees of each. encoded: what the model reads. before: answers before training, by slice.
    """

    items: list[dict[str, str]]
    encoded: list[dict[str, Any]]
    before: list[list[str]]


def answer_before(session: Session) -> Samples | None:
    """Choose the examples of the smallest content hash and answer them. None for tasks without replies or labels.

    Call it before the base trains.
    """
    rows = {r["example"]: r for r in session.prepared.data.splits["test"]}
    encoded = sorted(session.prepared.encoded.splits["test"], key=lambda e: e["example"])[:MAX_SAMPLES]
    shown = [rows[e["example"]] for e in encoded if e["example"] in rows]
    if _has_replies(session):
        items = [{"prompt": row["prompt"], "expected": row["response"]} for row in shown]
        prompts = [replies.prompt_tokens(e) for e in encoded]
        return Samples(items, encoded, [replies.base_replies(session, prompts)] * len(session.pack.runs))
    complete = len(shown) == len(encoded) and all({"text", "label"} <= row.keys() for row in shown)
    if session.prepared.head.auto_class != CLASSIFICATION or not complete:
        return None
    items = [{"text": _shown_text(row), "expected": str(row["label"])} for row in shown]
    before = _predicted_labels(session, encoded, range(len(session.pack.runs)))
    return Samples(items, encoded, before) if before else None


def write(session: Session, samples: Samples) -> None:
    """Answer the examples with each slice whose weights are a result, and write its file.

    A run whose record is there already keeps its file. Collective: where the base is sharded, every rank calls it.
    """
    kept = session.module.kept
    if _has_replies(session):
        prompts = [replies.prompt_tokens(e) for e in samples.encoded]
        after = replies.generate(session, prompts, kept)
    else:
        after = _predicted_labels(session, samples.encoded, kept)
    if not distributed.is_rank_zero():
        return
    for k, answers in zip(kept, after, strict=True):
        run_id = session.pack.runs[k].run_id
        if run_id in session.keep:
            continue
        columns = zip(samples.items, samples.before[k], answers, strict=True)
        shown = [{**item, "before": before, "after": answer} for item, before, answer in columns]
        atomic_write(session.store.make_run_dir(run_id) / SAMPLES_FILE, dump_json(shown))


def _has_replies(session: Session) -> bool:
    return session.pack.runs[0].task.has_replies


def _shown_text(row: Row) -> str:
    return f"{row['text']}\n{row['pair']}" if row.get("pair") else str(row["text"])


def _predicted_labels(session: Session, encoded: Sequence[dict[str, Any]], slices: Sequence[int]) -> list[list[str]]:
    """Return the label name of each example by slice; empty where the task predicts no labels."""
    batch = session.module.task.collate(list(encoded) * len(slices))
    with evaluation_mode(session) as device, session.stack.active(list(slices)):
        out = session.module.task.step(session.base.model, {name: t.to(device) for name, t in batch.items()})
    names, predicted = session.prepared.head.label_names, out.rows.get("prediction")
    if predicted is None or predicted.dtype not in (torch.int64, torch.int32) or not names:
        return []
    return [[names[i] for i in row] for row in predicted.view(len(slices), -1).tolist()]
