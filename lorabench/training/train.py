"""Train a pack and return its records: one path for one run and for many."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from lorabench.adapters import SlicesMix, check_slices_independent, inject
from lorabench.config.errors import Unwritable
from lorabench.config.runs import Pack, RunConfig
from lorabench.runtime import signals
from lorabench.runtime.leases import LeaseLost
from lorabench.runtime.memory import PeakMemory, freeze_heap, is_out_of_memory, release_memory
from lorabench.runtime.terminal import say
from lorabench.store import checkpoints
from lorabench.store.checkpoints import Unreadable
from lorabench.store.records import Record, Store
from lorabench.training import acting, distributed, fsdp, precision, preparation
from lorabench.training.checkpointing import Checkpoint, Saver, load_checkpoint, restore
from lorabench.training.evaluation.measures import AuxiliaryMeasures
from lorabench.training.fit import CheckpointCallback, TrainingClock, fit, make_trainer, quiet_lightning
from lorabench.training.module import BoundTask, PackModule
from lorabench.training.padding import check_padding
from lorabench.training.session import Session, failed_record, make_records
from lorabench.training.trunk_cache import TrunkCache

__all__ = ["Listener", "OutOfMemory", "Pack", "SlicesMix", "measure_alone", "train"]


@dataclass
class Listener:
    """What the terminal and the mirrors hear of a pack as it trains. No data come back this way.

    A pack that goes on from a checkpoint starts its runs again, and their rows go on at the checkpoint's step. Rows
    after that step come a second time, unchanged, so a mirror drops the steps it has already.
    """

    step: Callable[[int, int], None] = lambda step, total: None
    start: Callable[[RunConfig], None] = lambda run: None
    rows: Callable[[str, list[dict[str, Any]]], None] = lambda run_id, rows: None
    finish: Callable[[Record], None] = lambda record: None


def train(
    pack: Pack,
    store: Store,
    listener: Listener | None = None,
    *,
    keep: Collection[str] = (),
    accept_drift: bool = False,
) -> list[Record]:
    """Train a pack, from its last checkpoint if it has one, and write one record a run.

    A pack that fails leaves `failed` records with the error's text, and its checkpoints for another try.

    keep: run_ids that have a record already, of a pack that was killed while it wrote. They are trained along; record
    and history stay. accept_drift: go on from a checkpoint although code, packages, data or model changed.

    Raises `SlicesMix` when the base cannot be shared between slices: the caller then trains the runs one by one. Raises
    `OutOfMemory` when the pack does not fit: the caller then trains it in halves. Raises `ExistingWork` for drift that
    is not accepted, and `LeaseLost`, `Unwritable` and `distributed.ProcessLost`. None of these leaves a record.
    """
    freeze_heap()  # before anything of the pack exists: frozen objects would keep it for good
    listener = listener or Listener()
    start = load_checkpoint(pack, store, keep, accept_drift=accept_drift)
    leads = distributed.is_rank_zero()
    if not leads:
        keep = pack.run_ids  # another process of the group writes
    _start_runs(pack, store, listener, keep, start)
    records: list[Record] | None = None
    try:
        records = _train(pack, store, listener, keep, start)
    except (LeaseLost, Unwritable):  # no run is at fault: nothing is recorded
        raise
    except SlicesMix:
        if leads:
            checkpoints.remove(store.root, pack.id)
        raise
    except Unreadable as e:  # a whole checkpoint of this pack that does not fit
        say(f"checkpoint of pack {pack.id}: {e}; the pack starts anew", error=True)
        checkpoints.remove(store.root, pack.id)
        return train(pack, store, listener, keep=keep)
    except Exception as e:
        if distributed.is_process_lost(e):
            raise distributed.ProcessLost(f"a process of the pack is gone ({e})") from e
        if not (is_out_of_memory(e) and len(pack.runs) > 1):
            error = "".join(traceback.format_exception(e)[-3:]).strip()
            records = [failed_record(run, f"{type(e).__name__}: {e}", error) for run in pack.runs]
    if records is None:  # raised out here, where the traceback no longer holds the tensors that did not fit
        release_memory()
        if leads:
            checkpoints.remove(store.root, pack.id)  # its halves train anew
        raise OutOfMemory(f"{pack.id}: {len(pack.runs)} runs at once need more memory than there is")
    _finish_runs(records, store, listener, keep)
    if leads and all(record.status != "failed" for record in records):
        checkpoints.remove(store.root, pack.id)
    return records


def _start_runs(pack: Pack, store: Store, listener: Listener, keep: Collection[str], start: Checkpoint | None) -> None:
    """Cut the histories back to the checkpoint, and tell the listener that the runs start."""
    for run in pack.runs:
        if run.run_id not in keep:
            store.cut_history(run.run_id, start.history(run.run_id) if start else 0)
        listener.start(run)


def _finish_runs(records: list[Record], store: Store, listener: Listener, keep: Collection[str]) -> None:
    """Write the records, and tell the listener that the runs are finished."""
    for record in records:
        if record.run_id not in keep:
            store.write(record)
        listener.finish(record)


class OutOfMemory(RuntimeError):
    """A pack of several runs did not fit into memory."""


def _train(
    pack: Pack, store: Store, listener: Listener, keep: Collection[str], start: Checkpoint | None
) -> list[Record]:
    """Train a pack from a checkpoint, or from step 0, and return its records; none in processes of rank 1 and up."""
    with open_session(pack, store, listener, keep, start.step if start else 0) as session:
        check_isolation(session)
        is_sharded = fsdp.is_sharded(session.base.model)
        if pack.runs[0].trainer.reuse_trunk and not is_sharded:
            session.module.trunk_cache = TrunkCache(session)
        measures_here = distributed.is_rank_zero() or is_sharded  # a sharded base runs in all processes or in none
        auxiliary = None
        if pack.runs[0].role == "confirm" and measures_here:
            auxiliary = AuxiliaryMeasures(session)  # measures the base, so before a checkpoint is restored
        if start:
            restore(session, start)
        with PeakMemory(session.resolved.device) as memory, quiet_lightning():
            saver = Saver(session, memory.peak)
            session.trainer.callbacks.append(CheckpointCallback(saver))
            fit(session, saver)
            session.peak_memory = saver.peak()
        if is_sharded:
            session.base_bytes = fsdp.bytes_by_rank(session.base.model)
        if auxiliary:
            auxiliary.measure_trained()
        if is_sharded and pack.runs[0].trainer.save_weights:
            session.stack.own = fsdp.gather_parameters(session.stack.own)  # for the files
        return make_records(session) if distributed.is_rank_zero() else []


def measure_alone(run: RunConfig, store: Store, *, steps: int = 10) -> dict[str, Any]:
    """Return seconds, tokens and peak memory of a few training steps of one run alone; the first two are not timed.

    Seconds are the median seconds a token times the tokens, so a moment in which the machine was busy does not count.
    Where no tokens are counted (images, features), they are the median seconds a step times the steps.
    A frozen trunk is served as in training (`reused_blocks`). `trunk_seconds` is its one pass over the training split,
    which a run alone pays once. Features that other packs left with the base are no part of the peak.
    """
    freeze_heap()
    return _timed_steps(run, store, steps)


def _timed_steps(run: RunConfig, store: Store, steps: int) -> dict[str, Any]:
    trainer = replace(run.trainer, max_steps=steps, eval_interval=steps + 1)
    marks: list[tuple[float, int]] = []
    with open_session(Pack("solo", (replace(run, trainer=trainer),)), store, Listener()) as s:
        listener = Listener(step=lambda step, total: marks.append((time.monotonic(), s.module.tokens)))
        s.trainer.callbacks.append(TrainingClock(listener.step, steps, dict(s.seconds)))
        reuse = TrunkCache(s, alone=preparation.total_steps(run, len(s.prepared.encoded.splits["train"])))
        if run.trainer.reuse_trunk:
            s.module.trunk_cache = reuse
        with PeakMemory(s.resolved.device) as memory, quiet_lightning(), signals.defer_stop() as s.progress.stopped:
            s.trainer.fit(s.module, s.train_stream(), s.val_stream())  # never reached: eval_interval
            peak = memory.peak() - reuse.idle_bytes()
        reused = {"reused_blocks": reuse.depth, "trunk_seconds": round(reuse.seconds("train"), 4)}
    seconds, tokens, counted = alone_seconds(marks)
    return {"seconds": seconds, "tokens": tokens, "steps": counted, "peak_memory_bytes": peak, **reused}


def alone_seconds(marks: Sequence[tuple[float, int]]) -> tuple[float, int, int]:
    """Return seconds, tokens and steps of what was measured of a run alone, the first two steps left out.

    marks: the clock and the tokens so far after each step.
    """
    counted = list(pairwise(marks[1:]))
    pace = median((end - start) / max(1, after - before) for (start, before), (end, after) in counted)
    tokens = marks[-1][1] - marks[1][1]
    return round(pace * (tokens or len(counted)), 4), tokens, len(counted)


@contextmanager
def open_session(
    pack: Pack, store: Store, listener: Listener, keep: Collection[str] = (), start: int = 0
) -> Iterator[Session]:
    """Give a pack ready to train on its base from step `start`.

    Raises RuntimeError where the frozen base comes back changed.
    """
    first = pack.runs[0]
    prepared, resolved = preparation.prepare(first), precision.resolve_in_sweep(first, store)
    base = preparation.load_base(first, prepared.head, resolved)
    prepared = preparation.teach(first, prepared, base)
    before: int | None = _base_checksum(base.model)
    plans = [preparation.slice_plan(run, base.info) for run in pack.runs]
    cut = first.trainer.strategy == "fsdp" and distributed.world_size() > 1
    stack = inject(base.model, plans, info=base.info, give_back=not cut)
    if cut and stack.own:
        before = None  # it trains and is given up
    ids = pack.run_ids

    def rows(k: int, new: list[dict[str, Any]]) -> None:
        if ids[k] not in keep:
            store.append_history(ids[k], new)
        listener.rows(ids[k], new)

    try:
        total = preparation.total_steps(first, len(prepared.encoded.splits["train"]))
        task = BoundTask(first.task, prepared.processor)
        module = PackModule(base.model, stack, task, pack.runs, total_steps=total, rows=rows, prune=pack.prune)
        if first.trainer.gradient_checkpointing:
            base.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        module.train()  # dropout is on; the stack keeps frozen normalisation in eval
        seconds = {"train": 0.0, "eval": 0.0}
        progress = TrainingClock(listener.step, total, seconds)
        trainer = make_trainer(first, resolved, progress, start)
        if cut:
            beside = {t.parameter for t in stack.named_trainables() if t.stacked}
            with quiet_lightning():
                fsdp.shard(base.model, beside, base.info.num_layers, trainer.strategy)
            stack.own = dict(base.model.named_parameters()) if stack.own else {}
        yield Session(
            pack, store, prepared, resolved, base, plans, stack, module, trainer, progress, keep=keep, seconds=seconds
        )
    finally:
        stack.remove()
        if first.trainer.gradient_checkpointing:
            base.model.activation_checkpointing_disable()  # type: ignore[operator]
        base.model.eval()
        if cut:
            preparation.forget_base()
    if before is not None and _base_checksum(base.model) != before:
        raise RuntimeError("the frozen base changed during training")


def check_isolation(s: Session) -> None:
    """Raise `SlicesMix` for a base that lets slices see each other, tried on two rows a slice, no two alike.

    Raises `ConfigError` for a base on which padding changes losses and for an adapter that does not act, of a run
    alone, too.
    """
    if not fsdp.is_sharded(s.base.model):
        with s.stack.active(()):
            check_padding(s.pack.runs[0], s.base.model, s.prepared, pack_size=len(s.pack.runs))
        acting.check_stack(s.base.model, s.stack, s.pack.runs, s.prepared, s.base.info)
    if len(s.pack.runs) == 1:
        return
    examples = s.prepared.encoded.splits["train"]
    batch = s.module.task.collate([examples[i % len(examples)] for i in range(2 * len(s.pack.runs))])
    device = next(s.base.model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    s.stack.context.set(seeds=[r.seed for r in s.pack.runs], step=0, examples=batch["example"])
    check_slices_independent(s.base.model, s.stack, lambda: s.module.task.step(s.base.model, batch).loss_sum)


def _base_checksum(model: torch.nn.Module) -> int:
    """Return a sum modulo 2**64 over the bits of every parameter and buffer, in which any changed bit shows.

    Collective for a sharded base: the sums of the shares are added.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [0, 0]  # of whole tensors, of shares
    for i, t in enumerate([*model.parameters(), *model.buffers()], 1):
        own = fsdp.local_part(t)
        sums[own is not t] += int(own.detach().contiguous().view(kinds[t.element_size()]).sum(dtype=torch.int64)) * i
    return (sums[0] + (sum(distributed.gather_objects(sums[1])) if fsdp.is_sharded(model) else 0)) % 2**64
