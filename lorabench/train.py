"""train(pack) -> records. The only place that builds a Trainer. One path for one run and for many."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch

from lorabench import prepare as prep
from lorabench.adapters import SlicesMix, inject, probe
from lorabench.batches import EvalStream, PackStream
from lorabench.beside import Beside
from lorabench.config import RunConfig
from lorabench.memory import PeakMemory, out_of_memory, release
from lorabench.module import PackModule
from lorabench.outcome import Session, failed, records_of
from lorabench.prepare import Pack
from lorabench.records import Record, Store
from lorabench.reuse import Reuse

__all__ = ["Listener", "OutOfMemory", "Pack", "SlicesMix", "measure", "train"]


@dataclass
class Listener:
    """Who hears of a pack as it trains: the terminal and the mirrors. Never a way for data to come back."""

    step: Callable[[int, int], None] = lambda step, total: None
    start: Callable[[RunConfig], None] = lambda run: None
    rows: Callable[[str, list[dict[str, Any]]], None] = lambda run_id, rows: None
    finish: Callable[[Record], None] = lambda record: None


def train(pack: Pack, store: Store, listener: Listener | None = None, *, keep: Collection[str] = ()) -> list[Record]:
    """Train a pack and write one record a run; a pack that fails leaves `failed` records with the error's text.

    keep: run_ids whose record stands already (a pack that was cut while it wrote): trained along; record and history stay.

    Raises `SlicesMix` when the base cannot be shared between slices, and `OutOfMemory` when the pack does not fit: the
    caller then trains the runs one by one, or the pack in halves. Neither leaves a record.
    """
    listener = listener or Listener()
    for run in pack.runs:
        if run.run_id not in keep:
            store.reset_history(run.run_id)
        listener.start(run)
    records: list[Record] | None = None
    try:
        records = _train(pack, store, listener, keep)
    except SlicesMix:
        raise
    except Exception as e:
        if not (out_of_memory(e) and len(pack.runs) > 1):
            error = "".join(traceback.format_exception(e)[-3:]).strip()
            records = [failed(run, f"{type(e).__name__}: {e}", error) for run in pack.runs]
    if records is None:  # raised out here, where the traceback no longer holds the tensors that did not fit
        release()
        raise OutOfMemory(f"{pack.id}: {len(pack.runs)} runs at once need more memory than there is")
    for record in records:
        if record.run_id not in keep:
            store.write(record)
        listener.finish(record)
    return records


class OutOfMemory(RuntimeError):
    """A pack of several runs did not fit into memory."""


def _train(pack: Pack, store: Store, listener: Listener, keep: Collection[str]) -> list[Record]:
    with _opened(pack, store, listener, keep) as session:
        _probe(session)
        if pack.runs[0].trainer.reuse_trunk:
            session.module.reuse = Reuse(session)
        beside = Beside(session) if pack.runs[0].role == "confirm" else None
        with PeakMemory(session.resolved.device) as memory, _quiet():
            _fit(session)
            session.peak_memory = memory.peak()
        if beside:
            beside.finish()
        return records_of(session)


def measure(run: RunConfig, store: Store, *, steps: int = 10) -> dict[str, Any]:
    """Seconds, tokens and peak memory of a few training steps of one run alone, the first two left out of the clock.

    The seconds are the median pace, seconds a token, over the tokens: a machine that was busy for a moment does not show.
    """
    trainer = replace(run.trainer, max_steps=steps, eval_interval=steps + 1)
    marks: list[tuple[float, int]] = []
    with _opened(Pack("solo", (replace(run, trainer=trainer),)), store, Listener()) as s:
        listener = Listener(step=lambda step, total: marks.append((time.perf_counter(), s.module.tokens)))
        s.trainer.callbacks.append(_Progress(listener, steps))
        with PeakMemory(s.resolved.device) as memory, _quiet():
            s.trainer.fit(s.module, _train_stream(s), _val_stream(s))  # never reached: eval_interval
            peak = memory.peak()
    counted = list(pairwise(marks[1:]))
    pace = median((end - start) / max(1, after - before) for (start, before), (end, after) in counted)
    tokens = marks[-1][1] - marks[1][1]
    return {
        "seconds": round(pace * max(1, tokens), 4),
        "tokens": tokens,
        "steps": len(counted),
        "peak_memory_bytes": peak,
    }


@contextmanager
def _opened(pack: Pack, store: Store, listener: Listener, keep: Collection[str] = ()) -> Iterator[Session]:
    """A pack ready to train on its base; the base comes back as it was, and that is checked."""
    first = pack.runs[0]
    prepared, resolved = prep.prepare(first), prep.resolve(first)
    base = prep.base(first, prepared.head, resolved)
    prepared = prep.taught(first, prepared, base)
    before = _checksum(base.model)
    plans = [prep.plan(run, base.info) for run in pack.runs]
    stack = inject(base.model, plans, info=base.info)
    ids = pack.run_ids

    def rows(k: int, new: list[dict[str, Any]]) -> None:
        if ids[k] not in keep:
            store.append_history(ids[k], new)
        listener.rows(ids[k], new)

    try:
        total = prep.total_steps(first, len(prepared.encoded.splits["train"]))
        task = BoundTask(first.task, prepared.processor)
        module = PackModule(base.model, stack, task, pack.runs, total_steps=total, rows=rows, prune=pack.prune)
        if first.trainer.gradient_checkpointing:
            base.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        module.train()  # dropout is on; the stack keeps frozen normalisation in eval
        trainer = _trainer(first, resolved, total, listener)
        yield Session(pack, store, prepared, resolved, base, plans, stack, module, trainer)
    finally:
        stack.remove()
        if first.trainer.gradient_checkpointing:
            base.model.gradient_checkpointing_disable()  # type: ignore[operator]
        base.model.eval()
    if _checksum(base.model) != before:
        raise RuntimeError("the frozen base changed during training")


class BoundTask:
    """A task with the processor its collation needs."""

    def __init__(self, task: Any, processor: Any) -> None:
        self.task, self.processor = task, processor
        self.step, self.metrics = task.step, task.metrics

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.task.collate(examples, self.processor)


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


def _fit(s: Session) -> None:
    """Train, evaluate at the last step, load each slice's best weights, and test where the role allows it."""
    start = time.perf_counter()
    try:
        s.trainer.fit(s.module, _train_stream(s), _val_stream(s))
    except SystemExit as e:  # how Lightning passes on SIGTERM (with code 0) and Ctrl-C (with code 1)
        raise SystemExit(143 if s.trainer.received_sigterm else 130) from e
    if s.module.steps_done < s.module.total_steps and s.module.live:
        raise RuntimeError(f"training ended at step {s.module.steps_done} of {s.module.total_steps}")
    if s.module.evaluated_at != s.module.steps_done and s.module.live:
        s.trainer.validate(s.module, _val_stream(s), verbose=False)
    progress = next(c for c in s.trainer.callbacks if isinstance(c, _Progress))
    s.seconds = {"train": time.perf_counter() - start - progress.evaluating, "eval": progress.evaluating}
    for k, state in enumerate(s.module.slices):
        if state.best_weights is not None:
            s.stack.load_slice(k, state.best_weights)
    if s.pack.runs[0].role == "confirm" and s.module.kept:
        start = time.perf_counter()
        s.trainer.test(s.module, _eval_stream(s, "test", lambda: s.module.kept), verbose=False)
        s.seconds["eval"] += time.perf_counter() - start


def _train_stream(s: Session) -> PackStream:
    t, encoded = s.pack.runs[0].trainer, s.prepared.encoded
    return PackStream(
        encoded.splits["train"], encoded.lengths["train"], [r.seed for r in s.pack.runs], collate=s.module.task.collate,
        batch_size=t.batch_size, accumulate=t.accumulate_grad_batches, total_steps=s.module.total_steps,
        budget=s.resolved.part_tokens, live=lambda: s.module.live,
    )  # fmt: skip


def _eval_stream(s: Session, split: str, live: Callable[[], list[int]]) -> EvalStream:
    encoded, rows = s.prepared.encoded, s.pack.runs[0].trainer.eval_batch_size
    return EvalStream(
        encoded.splits[split], encoded.lengths[split], live, rows=rows, collate=s.module.task.collate,
        budget=s.resolved.part_tokens,
    )  # fmt: skip


def _val_stream(s: Session) -> EvalStream:
    return _eval_stream(s, "val", lambda: s.module.live)


def _probe(s: Session) -> None:
    """Two rows a slice, no two alike, through the base: refuses one that would let slices see each other."""
    if len(s.pack.runs) == 1:
        return
    examples = s.prepared.encoded.splits["train"]
    batch = s.module.task.collate([examples[i % len(examples)] for i in range(2 * len(s.pack.runs))])
    device = next(s.base.model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    s.stack.context.set(seeds=[r.seed for r in s.pack.runs], step=0, examples=batch["example"])
    probe(s.base.model, s.stack, lambda: s.module.task.step(s.base.model, batch).loss_sum)


def _checksum(model: torch.nn.Module) -> int:
    """A wrap-around sum over the bits of every parameter and buffer: cheap, and any changed bit shows."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        int(t.detach().contiguous().view(kinds[t.element_size()]).sum(dtype=torch.int64)) * (i + 1)
        for i, t in enumerate(tensors)
    )


class _quiet(warnings.catch_warnings):
    """Lightning's advice about things decided here on purpose stays off the user's terminal."""

    def __enter__(self) -> None:
        super().__enter__()
        self._loggers = [
            logging.getLogger(n)
            for n in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda")
        ]
        self._levels = [x.level for x in self._loggers]
        for x in self._loggers:
            x.setLevel(logging.ERROR)
        for text in (".*does not have many workers.*", ".*`isinstance\\(treespec.*", ".*GPU available but not used.*"):
            warnings.filterwarnings("ignore", message=text)

    def __exit__(self, *args: Any) -> None:
        for x, level in zip(self._loggers, self._levels, strict=True):
            x.setLevel(level)
        super().__exit__(*args)
