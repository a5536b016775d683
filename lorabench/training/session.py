"""The parts of a pack in training, and what it leaves: one record a slice, its weights, its test results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lorabench.adapters import Stack
from lorabench.adapters.files import save_slice
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import Base
from lorabench.config.runs import Pack, RunConfig
from lorabench.config.secrets import mask_values
from lorabench.runtime import provenance
from lorabench.runtime.files import name_unwritable
from lorabench.store.records import Record, Store
from lorabench.tasks.probe import probe_fingerprint
from lorabench.training import distributed
from lorabench.training.batches import EvalStream, PackStream
from lorabench.training.module import PackModule
from lorabench.training.precision import Resolved
from lorabench.training.preparation import Prepared, processor_fingerprint, user_code_fingerprint


@dataclass
class Session:
    """The parts of one pack in training.

    keep: run_ids that have a record already. seconds, peak_memory: over all restarts. resumed: the steps at which the
    pack went on from a checkpoint. changed: what had changed by then, {name: [then, now]}.
    """

    pack: Pack
    store: Store
    prepared: Prepared
    resolved: Resolved
    base: Base
    plans: list[SlicePlan]
    stack: Stack
    module: PackModule
    trainer: Any  # Lightning's
    progress: Any  # the callback with the clock
    keep: Collection[str] = ()
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "eval": 0.0})
    peak_memory: int | None = None
    resumed: list[int] = field(default_factory=list)
    changed: dict[str, list[Any]] = field(default_factory=dict)
    extras: dict[int, dict[str, float]] = field(default_factory=dict)  # metrics of a slice beside its own task's
    beside_seconds: float | None = None  # what they took
    base_bytes: list[int] | None = None  # of a base that is cut over processes, what each holds between uses

    def train_stream(self) -> PackStream:
        """Return the steps that are left; this process's share of each where several train the pack."""
        t, encoded = self.pack.runs[0].trainer, self.prepared.encoded
        return PackStream(
            encoded.splits["train"],
            encoded.lengths["train"],
            [r.seed for r in self.pack.runs],
            collate=self.module.task.collate,
            batch_size=t.batch_size,
            accumulate=t.accumulate_grad_batches,
            start=self.module.steps_done,
            total_steps=self.module.total_steps,
            budget=self.resolved.part_tokens,
            live=lambda: self.module.live,
            shares=distributed.rank_and_world(),
        )

    def eval_stream(self, split: str, live: Callable[[], list[int]], *, dealt: bool = True) -> EvalStream:
        """Return all examples of a split for each live slice. dealt: each process of the pack gets its share."""
        encoded, rows = self.prepared.encoded, self.pack.runs[0].trainer.eval_batch_size
        return EvalStream(
            encoded.splits[split],
            encoded.lengths[split],
            live,
            rows=rows,
            collate=self.module.task.collate,
            budget=self.resolved.part_tokens,
            shares=distributed.rank_and_world() if dealt else (0, 1),
        )

    def val_stream(self) -> EvalStream:
        """Return the validation examples for the slices that still train."""
        return self.eval_stream("val", lambda: self.module.live)


def make_records(s: Session) -> list[Record]:
    """Return one record a slice, and write each slice's weights and per-example test results.

    Nothing is written for a run that has a record already: its files belong to that record.
    """
    records = []
    for k, (run, state) in enumerate(zip(s.pack.runs, s.module.slices, strict=True)):
        s.module.flush(k)
        status = state.status if state.status in ("diverged", "pruned") else "completed"
        metrics = _metrics(s, k, run, status)
        if run.trainer.save_weights and status == "completed" and run.run_id not in s.keep:
            folder = s.store.make_run_dir(run.run_id) / "adapter"
            trained, plan = s.stack.export_slice(k)
            with name_unwritable(folder):
                save_slice(folder, trained, plan, info=s.base.info, run=run.to_dict(), head=s.prepared.head)
        error = None if status == "completed" else state.reason
        records.append(
            Record(run.run_id, run.role, status, run.to_dict(), metrics, _resources(s, k), _provenance(s, state), error)
        )
    return records


def _metrics(s: Session, k: int, run: RunConfig, status: str) -> dict[str, Any]:
    state = s.module.slices[k]
    on_validation = state.best_metrics if status == "completed" else state.last_metrics
    metrics: dict[str, Any] = {f"val/{name}": value for name, value in on_validation.items()}
    metrics |= {"primary": run.task.metric, "best_step": state.best_step}
    if status == "pruned":
        metrics["pruned_step"] = state.steps
    metrics["lower_is_better"] = run.task.metric in run.task.lower_is_better
    if run.role == "confirm" and status == "completed":
        rows = s.module.results[k]
        metrics |= {f"test/{name}": value for name, value in run.task.metrics(rows).items()}
        if run.run_id not in s.keep:
            s.store.write_arrays(run.run_id, "test", _example_columns(rows) | _groups(s, rows["example"]))
    return metrics | s.extras.get(k, {})


def _example_columns(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what later statistics need of each example, in small types. `loss` is the loss per unit of weight."""
    loss = rows["loss_sum"] / np.maximum(rows["weight"], 1e-12)
    kept = {
        "example": rows["example"].astype(np.uint64),
        "loss": loss.astype(np.float32),
        "weight": rows["weight"].astype(np.float32),
    }
    for name, column in rows.items():
        if name not in ("example", "loss_sum", "weight"):
            kept[name] = _small(column)
    return kept


def _groups(s: Session, examples: np.ndarray) -> dict[str, np.ndarray]:
    """Return the group number [N] of each test example; empty where each is alone or the task does not say."""
    groups = {e["example"]: e["group"] for e in s.prepared.encoded.splits["test"] if "group" in e}
    named = [groups.get(i) for i in examples.tolist()]
    if None in named or len(set(named)) == len(named):
        return {}
    return {"group": _small(np.unique(np.asarray(named, dtype=np.uint64), return_inverse=True)[1])}


def _small(column: np.ndarray) -> np.ndarray:
    """Return a column as float32, uint8 or int32."""
    if column.dtype.kind == "f":
        return column.astype(np.float32)
    low, high = (int(column.min()), int(column.max())) if column.size else (0, 0)
    return column.astype(np.uint8 if low >= 0 and high < 256 else np.int32)


def _resources(s: Session, k: int) -> dict[str, Any]:
    size = len(s.pack.runs)
    steps, tokens = s.module.slices[k].steps, s.module.slices[k].tokens
    share = steps / max(1, sum(x.steps for x in s.module.slices))
    found = {
        "train_seconds": s.seconds["train"] * share,
        "eval_seconds": s.seconds["eval"] / size,
        "pack_seconds": sum(s.seconds.values()),
        "pack_size": size,
        "peak_memory_bytes": s.peak_memory,
        "trainable_parameters": s.plans[k].trainable(s.base.info),
        "total_parameters": s.base.info.parameters,
        "steps": steps,
        "examples": s.module.slices[k].examples,
        "train_examples": len(s.prepared.encoded.splits["train"]),
        "val_examples": len(s.prepared.encoded.splits["val"]),
        "test_examples": len(s.prepared.encoded.splits["test"]),
    }
    if s.plans[k].adapters:
        found["beyond_adapters"] = s.base.info.beyond_adapters
    if s.beside_seconds is not None:
        found["beside_seconds"] = s.beside_seconds / size
    if tokens:
        found |= {
            "tokens": tokens,
            "tokens_per_second": s.module.tokens / max(s.seconds["train"], 1e-9),
        }
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


def _provenance(s: Session, state: Any) -> dict[str, Any]:
    again: dict[str, Any] = {"resumed": s.resumed} if s.resumed else {}
    again |= {"resumed_with_drift": s.changed} if s.changed else {}
    return again | {
        "code": provenance.code_fingerprint(),
        "git": provenance.git_state(),
        "packages": provenance.packages(),
        "machine": provenance.machine(),
        "device": s.resolved.device,
        "threads": torch.get_num_threads(),
        "precision": s.resolved.precision,
        "base_dtype": s.resolved.base_dtype,
        "attention": s.resolved.attention,
        "part_tokens": s.resolved.part_tokens,
        "reused_blocks": s.module.trunk_cache.depth,
        "data_fingerprint": s.prepared.data.fingerprint,
        "model_fingerprint": s.base.fingerprint,
        "processor_fingerprint": processor_fingerprint(s.pack.runs[0]),
        "model_notes": s.base.notes,
        "data_notes": {**s.prepared.data.notes, **s.prepared.encoded.notes},
        "pack": s.pack.id,
        "pack_runs": s.pack.run_ids,
        **_devices(s),
        "head": {"auto_class": s.prepared.head.auto_class, "label_names": list(s.prepared.head.label_names)},
        "user_code": user_code_fingerprint(s.pack.runs[0]),
        "probe_fingerprint": probe_fingerprint(s.pack.runs[0]),
        "stopped": state.reason if state.status == "stopped" else None,
    }


def _devices(s: Session) -> dict[str, Any]:
    """Return the provenance of a pack that several processes trained; empty for one."""
    if distributed.world_size() == 1:
        return {}
    return {"devices": distributed.world_size(), **({"base_bytes_by_rank": s.base_bytes} if s.base_bytes else {})}


def failed_record(run: RunConfig, error: str, trace: str) -> Record:
    """Return the record of a run whose pack raised."""
    where = {"packages": provenance.packages(), "machine": provenance.machine(), "git": provenance.git_state()}
    told, trace = mask_values(error), mask_values(trace)
    return Record(run.run_id, run.role, "failed", run.to_dict(), error=told, provenance={**where, "trace": trace})
