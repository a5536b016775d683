"""A few held-out examples of a text task, with what the model said before training and what each slice says after.

<run dir>/samples.json: at most 8 of {"prompt" or "text", "expected", "before", "after"}, all strings; the same examples
for every run on the same test split. Replies where prompts are answered, label names where texts are classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorabench.runtime.files import atomic_write
from lorabench.store.records import dump_json
from lorabench.tasks.probe import CLASSES
from lorabench.training import distributed as replicas
from lorabench.training.evaluation import replies
from lorabench.training.evaluation.forgetting import evaluating
from lorabench.training.session import Session

FILE = "samples.json"
MOST = 8


@dataclass(frozen=True)
class Samples:
    """Examples as they are shown, encoded, and what was said to them before training, by slice."""

    items: list[dict[str, str]]
    encoded: list[dict[str, Any]]
    before: list[list[str]]


def before(s: Session) -> Samples | None:
    """Those of the smallest content hash, answered before training; None for tasks that neither reply nor classify."""
    rows = {r["example"]: r for r in s.prepared.data.splits["test"]}
    encoded = sorted(s.prepared.encoded.splits["test"], key=lambda e: e["example"])[:MOST]
    found = [rows.get(e["example"]) for e in encoded]
    if chats(s):
        items = [{"prompt": row["prompt"], "expected": row["response"]} for row in found if row]
    elif s.prepared.head.auto_class == CLASSES and all(row and {"text", "label"} <= row.keys() for row in found):
        items = [{"text": _text(row), "expected": str(row["label"])} for row in found if row]
    else:
        return None
    said = _said(s, encoded, None)
    return Samples(items, encoded, said) if said else None


def write(s: Session, samples: Samples) -> None:
    """One file a slice whose weights are a result, unless its record stands already."""
    kept = s.module.kept
    after = _said(s, samples.encoded, kept) or []
    if not replicas.leads():
        return
    for k, own in zip(kept, after, strict=True):
        if (run_id := s.pack.runs[k].run_id) in s.keep:
            continue
        triples = zip(samples.items, samples.before[k], own, strict=True)
        made = [{**item, "before": then, "after": now} for item, then, now in triples]
        atomic_write(s.store.own_dir(run_id) / FILE, dump_json(made))


def chats(s: Session) -> bool:
    """Whether the task answers prompts."""
    return s.pack.runs[0].task.has_replies


def _text(row: dict[str, Any]) -> str:
    return f"{row['text']}\n{row['pair']}" if row.get("pair") else str(row["text"])


def _said(s: Session, encoded: Sequence[dict[str, Any]], slices: Sequence[int] | None) -> list[list[str]] | None:
    """By slice; None: before training, of all slices: as one, where it is the base that answers."""
    if chats(s):
        prompts = [replies.prompt_of(e) for e in encoded]
        if slices is None:
            return [replies.of_base(s, prompts)] * len(s.pack.runs)
        return replies.written(s, prompts, slices)
    own = list(range(len(s.pack.runs))) if slices is None else list(slices)
    if not own:
        return []
    batch = s.module.task.collate(list(encoded) * len(own))
    with evaluating(s) as device, s.stack.active(own):
        out = s.module.task.step(s.base.model, {name: column.to(device) for name, column in batch.items()})
    names, said = s.prepared.head.label_names, out.rows.get("prediction")
    if said is None or said.dtype not in (torch.int64, torch.int32) or not names:
        return None
    return [[names[i] for i in row] for row in said.view(len(own), -1).tolist()]
