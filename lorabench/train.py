"""train(pack) -> records. The only place that builds a Trainer. One path for one run and for many."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from lorabench import prepare as prep
from lorabench import provenance
from lorabench.adapters import SlicesMix, Stack, inject, probe
from lorabench.adapters.files import save_slice
from lorabench.base import Base
from lorabench.batches import EvalStream, PackStream
from lorabench.config import RunConfig
from lorabench.memory import PeakMemory
from lorabench.module import PackModule
from lorabench.plan import SlicePlan
from lorabench.records import Record, Store

__all__ = ["Listener", "Pack", "SlicesMix", "train"]


@dataclass(frozen=True)
class Pack:
    """Runs that train together, slice k being run k."""

    id: str
    runs: tuple[RunConfig, ...]

    @property
    def run_ids(self) -> list[str]:
        return [r.run_id for r in self.runs]


@dataclass
class Listener:
    """Who hears of a pack as it trains: the terminal and the mirrors. Never a way for data to come back."""

    step: Callable[[int, int], None] = lambda step, total: None
    start: Callable[[RunConfig], None] = lambda run: None
    rows: Callable[[str, list[dict[str, Any]]], None] = lambda run_id, rows: None
    finish: Callable[[Record], None] = lambda record: None


@dataclass
class _Session:
    """The parts of one pack in training."""

    pack: Pack
    store: Store
    prepared: prep.Prepared
    resolved: prep.Resolved
    base: Base
    plans: list[SlicePlan]
    stack: Stack
    module: PackModule
    trainer: pl.Trainer
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "eval": 0.0})
    peak_memory: int | None = None


def train(pack: Pack, store: Store, listener: Listener | None = None, *, keep: Collection[str] = ()) -> list[Record]:
    """Train a pack and write one record a run; a pack that fails leaves `failed` records with the error's text.

    keep: run_ids whose record stands already (a pack that was cut while it wrote): trained along, not written again.

    Raises `SlicesMix` when the base cannot be shared between slices: the caller then trains the runs one by one.
    """
    listener = listener or Listener()
    for run in pack.runs:
        store.reset_history(run.run_id)
        listener.start(run)
    try:
        records = _train(pack, store, listener)
    except SlicesMix:
        raise
    except Exception as e:
        error = "".join(traceback.format_exception(e)[-3:]).strip()
        records = [_failed(run, f"{type(e).__name__}: {e}", error) for run in pack.runs]
    for record in records:
        if record.run_id not in keep:
            store.write(record)
        listener.finish(record)
    return records


def _failed(run: RunConfig, error: str, trace: str) -> Record:
    made = provenance.packages(), provenance.machine(), provenance.git_state()
    where = dict(zip(("packages", "machine", "git"), made, strict=True))
    return Record(run.run_id, run.role, "failed", run.to_dict(), error=error, provenance={**where, "trace": trace})


def _train(pack: Pack, store: Store, listener: Listener) -> list[Record]:
    first = pack.runs[0]
    prepared, resolved = prep.prepare(first), prep.resolve(first)
    base = prep.base(first, prepared.head, resolved)
    plans = [prep.plan(run, base.info) for run in pack.runs]
    before = _checksum(base.model)
    stack = inject(base.model, plans, info=base.info)
    try:
        session = _session(pack, store, prepared, resolved, base, plans, stack, listener)
        _probe(session)
        with PeakMemory(resolved.device) as memory, _quiet():
            _fit(session)
            session.peak_memory = memory.peak()
        records = _finish(session)
    finally:
        stack.remove()
    if _checksum(base.model) != before:
        raise RuntimeError("the frozen base changed during training")
    return records


def _session(
    pack: Pack, store: Store, prepared: prep.Prepared, resolved: prep.Resolved, base: Base,
    plans: list[SlicePlan], stack: Stack, listener: Listener,
) -> _Session:  # fmt: skip
    first = pack.runs[0]
    ids = pack.run_ids

    def rows(k: int, new: list[dict[str, Any]]) -> None:
        store.append_history(ids[k], new)
        listener.rows(ids[k], new)

    total = prep.total_steps(first, len(prepared.encoded.splits["train"]))
    task = BoundTask(first.task, prepared.processor)
    module = PackModule(base.model, stack, task, pack.runs, total_steps=total, rows=rows)
    if first.trainer.gradient_checkpointing:
        _checkpoint_gradients(base.model)
    module.train()  # dropout is on; the stack keeps frozen normalisation in eval
    trainer = _trainer(first, resolved, total, listener)
    return _Session(pack, store, prepared, resolved, base, plans, stack, module, trainer)


class BoundTask:
    """A task with the processor its collation needs."""

    def __init__(self, task: Any, processor: Any) -> None:
        self.task, self.processor = task, processor
        self.step, self.metrics = task.step, task.metrics

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.task.collate(examples, self.processor)


def _checkpoint_gradients(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _trainer(run: RunConfig, resolved: prep.Resolved, total: int, listener: Listener) -> pl.Trainer:
    t = run.trainer
    interval = t.eval_interval or max(1, -(-total // 5))
    with _quiet():
        return pl.Trainer(
            accelerator=t.accelerator, devices=t.devices, num_nodes=t.num_nodes, strategy=t.strategy,
            precision=resolved.trainer_precision, max_steps=total, max_epochs=-1,  # type: ignore[arg-type]
            val_check_interval=interval, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            callbacks=[_Progress(listener, total)], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, inference_mode=False, use_distributed_sampler=False,
        )  # fmt: skip


class _Progress(pl.Callback):
    """Tells the listener of each step and keeps the clock of evaluations."""

    def __init__(self, listener: Listener, total: int) -> None:
        self.listener, self.total, self.evaluating, self._since = listener, total, 0.0, 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.listener.step(module.steps_done, self.total)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.evaluating += time.perf_counter() - self._since


def _fit(s: _Session) -> None:
    """Train, evaluate at the last step, load each slice's best weights, and test where the role allows it."""
    start = time.perf_counter()
    first, encoded = s.pack.runs[0], s.prepared.encoded
    stream = PackStream(
        encoded.splits["train"], encoded.lengths["train"], [r.seed for r in s.pack.runs], collate=s.module.task.collate,
        batch_size=first.trainer.batch_size, accumulate=first.trainer.accumulate_grad_batches, total_steps=s.module.total_steps,
    )  # fmt: skip
    s.trainer.fit(s.module, stream, _eval_stream(s, "val"))
    if s.module.evaluated_at != s.module.steps_done:
        s.trainer.validate(s.module, _eval_stream(s, "val"), verbose=False)
    progress = next(c for c in s.trainer.callbacks if isinstance(c, _Progress))  # type: ignore[attr-defined]
    s.seconds = {"train": time.perf_counter() - start - progress.evaluating, "eval": progress.evaluating}
    for k, state in enumerate(s.module.slices):
        if state.best_weights is not None:
            s.stack.load_slice(k, state.best_weights)
    if first.role == "confirm":
        start = time.perf_counter()
        s.trainer.test(s.module, _eval_stream(s, "test"), verbose=False)
        s.seconds["eval"] += time.perf_counter() - start


def _eval_stream(s: _Session, split: str) -> EvalStream:
    encoded, rows = s.prepared.encoded, s.pack.runs[0].trainer.eval_batch_size
    return EvalStream(encoded.splits[split], encoded.lengths[split], len(s.pack.runs), rows=rows, collate=s.module.task.collate)


def _probe(s: _Session) -> None:
    """Two rows a slice, no two alike, through the base: refuses one that would let slices see each other."""
    if len(s.pack.runs) == 1:
        return
    examples = s.prepared.encoded.splits["train"]
    batch = s.module.task.collate([examples[i % len(examples)] for i in range(2 * len(s.pack.runs))])
    device = next(s.base.model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    s.stack.context.set(seeds=[r.seed for r in s.pack.runs], step=0, examples=batch["example"])
    probe(s.base.model, s.stack, lambda: s.module.task.step(s.base.model, batch).loss_sum)


def _finish(s: _Session) -> list[Record]:
    records = []
    for k, (run, state) in enumerate(zip(s.pack.runs, s.module.slices, strict=True)):
        s.module.flush(k)
        status = "diverged" if state.status == "diverged" else "completed"
        metrics = _metrics(s, k, run, status)
        if run.trainer.save_weights and status == "completed":
            folder = s.store.run_dir(run.run_id) / "adapter"
            save_slice(folder, s.stack.slice_state(k), s.plans[k], info=s.base.info, run=run.to_dict(), head=s.prepared.head)
        error = state.reason if status == "diverged" else None
        records.append(Record(run.run_id, run.role, status, run.to_dict(), metrics, _resources(s, k), _provenance(s, state), error))
    return records


def _metrics(s: _Session, k: int, run: RunConfig, status: str) -> dict[str, Any]:
    state = s.module.slices[k]
    found = state.best_metrics if status == "completed" else state.last_metrics
    metrics: dict[str, Any] = {f"val/{name}": value for name, value in found.items()}
    metrics |= {"primary": run.task.metric, "best_step": state.best_step}
    if run.role == "confirm" and status == "completed":
        rows = s.module.results[k]
        metrics |= {f"test/{name}": value for name, value in run.task.metrics(rows).items()}
        s.store.write_arrays(run.run_id, "test", _kept(rows))
    return metrics


def _kept(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What later statistics need of each example, in small types; `loss` is the loss per unit of weight."""
    loss = rows["loss_sum"] / np.maximum(rows["weight"], 1e-12)
    kept = {"example": rows["example"].astype(np.uint64), "loss": loss.astype(np.float32), "weight": rows["weight"].astype(np.float32)}
    for name, column in rows.items():
        if name not in ("example", "loss_sum", "weight"):
            kept[name] = _small(column)
    return kept


def _small(column: np.ndarray) -> np.ndarray:
    if column.dtype.kind == "f":
        return column.astype(np.float32)
    low, high = (int(column.min()), int(column.max())) if column.size else (0, 0)
    return column.astype(np.uint8 if low >= 0 and high < 256 else np.int32)


def _resources(s: _Session, k: int) -> dict[str, Any]:
    size, run = len(s.pack.runs), s.pack.runs[k]
    steps = s.module.steps_done
    examples = steps * run.trainer.batch_size * run.trainer.accumulate_grad_batches
    found = {
        "train_seconds": s.seconds["train"] / size, "eval_seconds": s.seconds["eval"] / size, "pack_seconds": sum(s.seconds.values()),
        "pack_size": size, "peak_memory_bytes": s.peak_memory, "trainable_parameters": s.plans[k].trainable(s.base.info),
        "total_parameters": s.base.info.parameters, "steps": steps, "examples": examples,
        "train_examples": len(s.prepared.encoded.splits["train"]), "val_examples": len(s.prepared.encoded.splits["val"]),
        "test_examples": len(s.prepared.encoded.splits["test"]),
    }  # fmt: skip
    if s.module.tokens:
        found |= {"tokens": s.module.tokens // size, "tokens_per_second": s.module.tokens / max(s.seconds["train"], 1e-9)}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


def _provenance(s: _Session, state: Any) -> dict[str, Any]:
    return {
        "code": provenance.code_fingerprint(), "git": provenance.git_state(), "packages": provenance.packages(),
        "machine": provenance.machine(), "device": s.resolved.device, "threads": torch.get_num_threads(),
        "precision": s.resolved.precision, "base_dtype": s.resolved.base_dtype, "attention": s.resolved.attention,
        "data_fingerprint": s.prepared.data.fingerprint, "model_fingerprint": s.base.fingerprint, "model_notes": s.base.notes,
        "data_notes": {**s.prepared.data.notes, **s.prepared.encoded.notes}, "pack": s.pack.id, "pack_runs": s.pack.run_ids,
        "head": {"auto_class": s.prepared.head.auto_class, "label_names": list(s.prepared.head.label_names)},
        "stopped": state.reason if state.status == "stopped" else None,
    }  # fmt: skip


def _checksum(model: torch.nn.Module) -> int:
    """A wrap-around sum over the bits of every parameter and buffer: cheap, and any changed bit shows."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [*model.parameters(), *model.buffers()]
    return sum(int(t.detach().contiguous().view(kinds[t.element_size()]).sum(dtype=torch.int64)) * (i + 1) for i, t in enumerate(tensors))


class _quiet(warnings.catch_warnings):
    """Lightning's advice about things decided here on purpose stays off the user's terminal."""

    def __enter__(self) -> None:
        super().__enter__()
        self._loggers = [logging.getLogger(n) for n in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda")]
        self._levels = [x.level for x in self._loggers]
        for x in self._loggers:
            x.setLevel(logging.ERROR)
        for text in (".*does not have many workers.*", ".*`isinstance\\(treespec.*", ".*GPU available but not used.*"):
            warnings.filterwarnings("ignore", message=text)

    def __exit__(self, *args: Any) -> None:
        for x, level in zip(self._loggers, self._levels, strict=True):
            x.setLevel(level)
        super().__exit__(*args)
