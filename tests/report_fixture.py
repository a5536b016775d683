"""A synthetic sweep directory, written through the store. The numbers are drawn from a known model, not trained."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorabench.config.runs import digest
from lorabench.results.selection import choose
from lorabench.store.records import Record, Store

PER_RANK, HEAD, BASE = (
    42_240,
    1_155,
    22_713_216,
)  # parameters of MiniLM-L6: all linear layers a rank, 3-label head, base


@dataclass(frozen=True)
class Planted:
    """One cell and the truth behind it."""

    method: str  # config's method.name
    rates: Sequence[float]
    best: float  # rate at which the validation loss has its minimum
    quality: float  # expected test accuracy at that rate
    r: int | None = None
    alpha: float = 16.0
    targets: Any = "all-linear"
    rslora: bool = False
    seed_sd: float = 0.006  # of a seed's accuracy
    diverges_at: float = math.inf  # rates from here on
    label: dict[str, Any] = field(default_factory=dict)  # overrides of the manifest's label
    config: dict[str, Any] = field(default_factory=dict)  # e.g. {"trainer": {"batch_size": 64}}

    @property
    def trainable(self) -> int:
        return {"full": BASE + HEAD, "head": HEAD, "bitfit": 27_000}.get(self.method, PER_RANK * (self.r or 0) + HEAD)


LORA_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
RANK_SWEEP = (
    Planted("lora", LORA_RATES, 4e-3, 0.735, r=1, diverges_at=8e-3),
    Planted("lora", LORA_RATES, 4e-3, 0.757, r=4),
    Planted("lora", LORA_RATES, 2.2e-3, 0.768, r=16),
    Planted("lora", LORA_RATES, 2e-3, 0.770, r=64),
    Planted("head", (3e-3, 1e-2, 3e-2, 1e-1), 3e-2, 0.646, seed_sd=0.002),
    Planted("full", (5e-5, 1e-4, 2e-4, 4e-4), 2e-4, 0.779),
)


def build(
    root: Path, cells: Sequence[Planted] = RANK_SWEEP, *, name: str = "synthetic", tune: Sequence[int] = (0,),
    confirm: Sequence[int] = (100, 101, 102), examples: int = 2000, metric: str = "accuracy", manifest: bool = True,
    arrays: bool = True, study: dict[str, Any] | None = None, resources: dict[str, Any] | None = None,
) -> Store:  # fmt: skip
    """Write a finished sweep: every cell x rate x tuning seed, and confirmation seeds at the best rate."""
    store, rng = Store(root), np.random.default_rng(7)
    test = {"example": rng.choice(2**40, examples, replace=False).astype(np.uint64), "hard": rng.random(examples),
            "label": rng.integers(0, 3, examples)}  # fmt: skip
    entries: list[dict[str, Any]] = []
    made: dict[str, Record] = {}

    def add(cell: Planted, role: str, lr: float, seed: int) -> None:
        record = _record(cell, role, lr, seed, metric, test if arrays else None, store, resources or {}, examples)
        made[record.run_id] = record
        entries[-1]["runs"][role].append(record.run_id)

    for cell in cells:
        entries.append({"id": _cell_id(cell), "label": _label(cell), "runs": {"tune": [], "confirm": []}})
        for lr in cell.rates:
            for seed in tune:
                add(cell, "tune", lr, seed)
        chosen = choose({"cells": entries[-1:]}, made)[entries[-1]["id"]].lr
        for seed in confirm if chosen or not tune else ():
            add(cell, "confirm", chosen or cell.best, seed)
    runs = {
        i: {"role": r.role, "lr": r.config["optimizer"]["lr"], "seed": r.config["seed"], "config": r.config}
        for i, r in made.items()
    }
    if manifest:
        declared = {
            "question": "Does rank matter on this synthetic task?",
            "reference": None,
            "margin": 0.02,
            **(study or {}),
        }
        store.write_manifest({
            "schema": 1, "name": name, "experiment": "rank_sweep", "cells": entries, "runs": runs, "packs": [], "study": declared,
            "study_hash": digest(declared)[:12],
        })  # fmt: skip
    return store


def _label(cell: Planted) -> dict[str, Any]:
    shown = (
        "rsLoRA"
        if cell.rslora
        else {"lora": "LoRA", "head": "head only", "bitfit": "BitFit"}.get(cell.method, cell.method)
    )
    targets = cell.targets if isinstance(cell.targets, str) else "+".join(cell.targets)
    other = {"full": "everything", "head": "head", "bitfit": "biases"}
    return {
        "method": shown, "r": cell.r, "alpha": cell.alpha if cell.r else None, "alpha_rule": f"{cell.alpha:g}" if cell.r else None,
        "targets": targets if cell.r else other.get(cell.method, ""), "trainable": cell.trainable, "extra": {}, **cell.label,
    }  # fmt: skip


def _cell_id(cell: Planted) -> str:
    label = _label(cell)
    parts = [label["method"].lower().replace(" ", ""), *([f"r{cell.r}-a{label['alpha_rule']}"] if cell.r else [])]
    return "-".join([*parts, label["targets"], *(f"{k}={v}" for k, v in label["extra"].items())])


def config(cell: Planted, role: str, lr: float, seed: int, metric: str) -> dict[str, Any]:
    method: dict[str, Any] = {"name": cell.method}
    if cell.r:
        method |= {
            "r": cell.r,
            "alpha": cell.alpha,
            "dropout": 0.0,
            "target_modules": cell.targets,
            "use_rslora": cell.rslora,
        }
    out: dict[str, Any] = {
        "model": {"kind": "transformers", "name": "MiniLM-L6", "source": "package:synthetic", "dropout": 0.0},
        "task": {"kind": "text_classification", "name": "tweets", "metric": metric, "max_length": 64, "train_examples": 3200},
        "method": method, "optimizer": {"name": "adamw", "lr": lr, "weight_decay": 0.0, "schedule": "linear", "warmup_ratio": 0.06},
        "trainer": {"max_epochs": 1, "max_steps": None, "batch_size": 32, "accumulate_grad_batches": 1, "precision": "auto"},
        "seed": seed, "role": role,
    }  # fmt: skip
    for section, values in cell.config.items():
        out[section] = {**out[section], **values}
    return out


def _record(
    cell: Planted, role: str, lr: float, seed: int, metric: str, test: dict[str, np.ndarray] | None, store: Store,
    resources: dict[str, Any], examples: int,
) -> Record:  # fmt: skip
    cfg = config(cell, role, lr, seed, metric)
    run_id = hashlib.sha256(repr(cfg).encode()).hexdigest()[:12]
    rng = np.random.default_rng(int(run_id, 16))
    diverged = lr >= cell.diverges_at
    off = math.log2(lr / cell.best)
    truth = cell.quality - 0.012 * off**2 + rng.normal(0, cell.seed_sd)
    loss = 2.05 - 1.9 * truth + rng.normal(0, 0.002)
    rows = _history(rng, loss, truth, metric, lr, 100, diverged)
    store.append_history(run_id, rows)
    metrics: dict[str, Any] = {"primary": metric, "best_step": None if diverged else 100}
    if not diverged:
        metrics |= {f"val/{k}": v for k, v in _scores(loss, truth).items()}
    if role == "confirm" and not diverged:
        metrics |= {f"test/{k}": v for k, v in _scores(loss, truth).items()}
        if test is not None:
            metrics |= {f"test/{k}": v for k, v in _write_test(store, run_id, rng, truth, test).items()}
    full, shared = cell.method == "full", 1 if cell.method == "full" else 8
    found = {
        "train_seconds": 21.0 if full else 4.2 + (cell.r or 0) / 40, "eval_seconds": 1.1, "pack_size": shared,
        "pack_seconds": 22.1 if full else 8 * 5.3, "peak_memory_bytes": 900 << 20 if full else 720 << 20,
        "trainable_parameters": cell.trainable, "total_parameters": BASE + HEAD, "steps": 100,
        "examples": 3200, "train_examples": 3200, "val_examples": 600, "test_examples": examples,
    } | resources  # fmt: skip
    provenance = {
        "git": {"revision": "0123456789abcdef0123456789abcdef01234567", "dirty": False}, "code": "c0de" * 4,
        "packages": {"lorabench": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"}, "device": "cpu", "threads": 2,
        "machine": {"host": "synthetic-host", "system": "Linux", "cpu": "Synthetic CPU", "cpus": 2, "python": "3.11.2"},
        "precision": "bf16-mixed" if full else "bf16", "base_dtype": "float32" if full else "bfloat16", "attention": "eager",
        "data_fingerprint": "dada" * 4, "model_fingerprint": "fade" * 4, "pack": "p0",
    }  # fmt: skip
    error = "the loss was not finite at step 31" if diverged else None
    record = Record(run_id, role, "diverged" if diverged else "completed", cfg, metrics, found, provenance, error)
    store.write(record)
    return record


def _scores(loss: float, accuracy: float) -> dict[str, float]:
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "accuracy": accuracy,
        "macro_f1": accuracy - 0.02,
        "mcc": 1.5 * accuracy - 0.5,
    }


def _write_test(
    store: Store, run_id: str, rng: np.random.Generator, truth: float, test: dict[str, np.ndarray]
) -> dict[str, float]:
    """Right where a mix of the example's own difficulty and this run's luck stays below the truth."""
    n = len(test["label"])
    luck = np.where(rng.random(n) < 0.85, test["hard"], rng.random(n))
    correct = luck < truth
    prediction = np.where(correct, test["label"], (test["label"] + rng.integers(1, 3, n)) % 3)
    loss = np.where(correct, 0.25, 1.5) * rng.uniform(0.8, 1.2, n)
    weight = np.ones(n, np.float32)
    order = rng.permutation(n)  # runs may store their examples in any order
    columns = {"example": test["example"], "loss": loss.astype(np.float32), "weight": weight, "label": test["label"].astype(np.uint8),
               "prediction": prediction.astype(np.uint8), "correct": correct.astype(np.uint8)}  # fmt: skip
    store.write_arrays(run_id, "test", {k: v[order] for k, v in columns.items()})
    f1 = [
        2 * np.sum(correct & (test["label"] == c)) / (np.sum(test["label"] == c) + np.sum(prediction == c))
        for c in range(3)
    ]
    mean = float(np.mean(loss.astype(np.float32), dtype=np.float64))
    return {
        "accuracy": float(np.mean(correct)),
        "macro_f1": float(np.mean(f1)),
        "loss": mean,
        "perplexity": math.exp(mean),
    }


def _history(
    rng: np.random.Generator, loss: float, truth: float, metric: str, lr: float, steps: int, diverged: bool
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    start = 1.1
    for step in range(1, steps + 1):
        if diverged and step > 30:
            break
        at = loss + (start - loss) * math.exp(-step / 18)
        rows.append({"step": step, "train/loss": at + rng.normal(0, 0.06), "lr": lr * (1 - step / steps)})
        if step % 20 == 0:
            share = 1 - math.exp(-step / 18)
            value = {k: v * share + 0.34 * (1 - share) for k, v in _scores(loss, truth).items() if k == metric}
            rows.append({"step": step, "val/loss": at, **{f"val/{k}": v for k, v in value.items()}} | {"val/loss": at})
    return rows
