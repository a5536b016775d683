"""A finished sweep made by hand: records and saved weights that look trained, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor

from lorabench.adapters import inject
from lorabench.adapters.files import save_slice
from lorabench.config.runs import RunConfig
from lorabench.store.records import Record, Store
from tiny import make_run


class Made:
    """A sweep with a record and saved weights a cell and seed; `states` and `starts` by run_id, as they were saved."""

    def __init__(self, root: Path, base: Path, data: Path) -> None:
        self.store, self.base, self.data = Store(root), base, data
        self.ids: dict[tuple[str, int], str] = {}
        self.states: dict[str, dict[str, Tensor]] = {}
        self.starts: dict[str, dict[str, Tensor]] = {}
        self.runs: dict[str, RunConfig] = {}

    @property
    def root(self) -> Path:
        return self.store.root

    @property
    def file(self) -> Path:
        return self.root / "analysis" / "weights.json"

    def add(self, cell: str, seed: int, settings: dict[str, Any]) -> None:
        run = make_run(self.base, self.data, role="confirm", **settings, seed=seed)
        self.ids[cell, seed], self.runs[run.run_id] = run.run_id, run
        self.train(run.run_id)
        self.manifest()

    def train(self, run_id: str, noise: int = 0) -> None:
        """What training would leave: the start and some noise."""
        run = self.runs[run_id]
        head = run.task.head(run.task.load())
        base = run.model.load(head)
        plan = run.method.plan(base.info, seed=run.seed)
        stack = inject(base.model, [plan], info=base.info)
        g = torch.Generator().manual_seed(1000 * noise + run.seed)
        self.starts[run_id] = {k: t.clone() for k, t in stack.slice_state(0).items()}
        stack.load_slice(0, {k: t + 0.05 * torch.randn(t.shape, generator=g) for k, t in self.starts[run_id].items()})
        state, plan = stack.exported(0)
        state = {k: t.clone() for k, t in state.items()}
        self.states[run_id] = state
        save_slice(self.store.run_dir(run_id) / "adapter", state, plan, info=base.info, run=run.to_dict(), head=head)
        provenance = {"head": {"auto_class": head.auto_class, "label_names": list(head.label_names)},
                      "model_fingerprint": base.fingerprint, "attention": "eager"}  # fmt: skip
        metrics = {"val/loss": 0.5, "val/accuracy": 0.5, "test/accuracy": 0.75, "primary": "accuracy"}
        self.store.write(Record(run_id, "confirm", "completed", run.to_dict(), metrics, provenance=provenance))

    def manifest(self) -> None:
        cells: dict[str, dict[str, Any]] = {}
        for (cell, _), run_id in self.ids.items():
            label = {**self.runs[run_id].method.label(), "alpha_rule": "8", "trainable": 1, "extra": {}}
            entry = cells.setdefault(cell, {"id": cell, "label": label, "runs": {"tune": [], "confirm": []}})
            entry["runs"]["confirm"].append(run_id)
        runs = {i: {"role": "confirm", "lr": r.optimizer.lr, "seed": r.seed} for i, r in self.runs.items()}
        self.store.write_manifest(
            {"schema": 1, "name": "tiny", "cells": list(cells.values()), "runs": runs, "packs": []}
        )

    def weight(self, layer: str) -> np.ndarray:
        """From transformers itself, as [O, I] for a Linear."""
        model = tf.AutoModelForSequenceClassification.from_pretrained(self.base)
        return model.state_dict()[f"{layer}.weight"].numpy().astype(np.float64)

    def dW(self, run_id: str, layer: str, scaling: float) -> np.ndarray:
        state = {k: t.numpy().astype(np.float64) for k, t in self.states[run_id].items()}
        if f"{layer}.lora_A" in state:
            return scaling * state[f"{layer}.lora_B"] @ state[f"{layer}.lora_A"]
        return state[f"{layer}.weight"] - self.weight(layer)


def refused(face: Any, argv: list[str], text: str, capsys: Any) -> None:
    """A command-line face ends with 2 and one line on stderr that holds the text."""
    assert face.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert text in said.err
