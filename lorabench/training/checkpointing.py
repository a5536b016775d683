"""Checkpoints of a pack in training: capture a session between two steps and restore it, bit for bit. K slices.

A checkpoint holds the trained tensors, the optimizer's moments, each slice's state and the length of its history. Base
weights are in it only where the base trains. Schedule, data and dropout follow from the step. A slice's best weights
are left out where they are its present ones.

Sharded tensors (`fsdp`) are whole in a checkpoint: rank 0 gathers them one at a time and holds all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorabench.adapters import Trainable
from lorabench.config.errors import ExistingWork
from lorabench.config.runs import Pack
from lorabench.runtime import leases, provenance
from lorabench.runtime.memory import is_out_of_memory
from lorabench.runtime.terminal import say
from lorabench.store import checkpoints
from lorabench.store.checkpoints import Content, Unreadable
from lorabench.store.records import Store
from lorabench.tasks.probe import probe_fingerprint
from lorabench.training import distributed, fsdp, precision, preparation
from lorabench.training.module import SliceState
from lorabench.training.optimizer import PackedAdamW
from lorabench.training.precision import Resolved
from lorabench.training.session import Session

STATE_FIELDS = {
    "pack",
    "runs",
    "prune",
    "step",
    "total",
    "evaluated_at",
    "slices",
    "history",
    "seconds",
    "peak_memory",
    "reused",
    "resumed",
    "changed",
    "facts",
    "cpu",
}
TRAINER_FACTS = ("eval_batch_size", "reuse_trunk", "log_interval")  # no part of a run's identity, yet of its numbers
MAX_SECONDS_BETWEEN = 180.0  # seconds between checkpoints of a pack that evaluates less often
MAX_TIME_SHARE = 0.03  # of the time that checkpoints may take where their interval is not set


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to go on from. changed: accepted differences {name: [then, now]} over all restarts."""

    tensors: dict[str, Tensor]  # emptied by `restore`
    state: Mapping[str, Any]
    changed: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def history(self, run_id: str) -> int:
        """Return the bytes of a run's history that belong to this checkpoint."""
        return int(self.state["history"][run_id] or 0)


def facts(pack: Pack, model: str, resolved: Resolved) -> dict[str, Any]:
    """Return what a pack's numbers depend on beside its runs. model: the fingerprint of the base's files."""
    first = pack.runs[0]
    data = preparation.load_data(first.task).fingerprint
    settings = {name: getattr(first.trainer, name) for name in TRAINER_FACTS}
    return {
        "code": provenance.code_fingerprint(),
        **provenance.packages(),
        "data": data,
        "model": model,
        **settings,
        "user code": preparation.user_code_fingerprint(first),
        "probe": probe_fingerprint(first),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "base cut": first.trainer.strategy == "fsdp" and distributed.world_size() > 1,
        **asdict(resolved),
    }


def load_checkpoint(pack: Pack, store: Store, keep: Collection[str], *, accept_drift: bool) -> Checkpoint | None:
    """Return the checkpoint a pack goes on from; None: it starts anew. stderr says which ones were refused and why.

    Raises `ExistingWork` when code, packages, data, model or machine settings are not those it was begun with.
    """
    where = checkpoints.pack_folder(store.root, pack.id)
    newest = checkpoints.read_newest(where, lambda content: _check(content, pack, store, keep))
    if newest is None:
        return None
    tensors, state = newest
    first = pack.runs[0]
    now = facts(pack, preparation.model_fingerprint(first), precision.resolve_in_sweep(first, store))
    changed = checkpoints.drift(state["facts"], now)
    if changed and not accept_drift:
        differences = ", ".join(f"{name} {then}, here {now}" for name, (then, now) in changed.items())
        raise ExistingWork(
            "sweep.dir",
            str(store.root),
            f"the pack {pack.id} was begun ({state['step']} of {state['total']} steps) with {differences}; "
            f"sweep.accept_drift=true goes on nevertheless, without {where} the pack trains anew",
        )
    cpu = provenance.machine()["cpu"]
    if state["cpu"] != cpu:
        say(f"pack {pack.id} goes on on another CPU ({state['cpu']} then, {cpu} now)", error=True)
    return Checkpoint(tensors, state, {**state["changed"], **changed})


def _check(content: Content, pack: Pack, store: Store, keep: Collection[str]) -> None:
    """Raise `Unreadable` for a checkpoint that is not this pack's, or goes further than a history does."""
    state = content[1]
    if missing := STATE_FIELDS - state.keys():
        raise Unreadable(f"not as this version writes it: {', '.join(sorted(missing))} missing")
    if (state.get("pack"), state.get("runs"), state.get("prune")) != (pack.id, pack.run_ids, pack.prune):
        raise Unreadable("of other runs, or of a sweep that prunes otherwise")
    for run_id in set(pack.run_ids) - set(keep):
        size = state["history"].get(run_id)
        if size is None:
            raise Unreadable(f"run {run_id} only trained along then")
        if store.history_size(run_id) < size:
            raise Unreadable(f"the history of run {run_id} is shorter than it was")


def capture(s: Session, peak: int, known: Mapping[str, Any]) -> Content:
    """Return the content of a checkpoint between two steps. Its tensors share memory with the model.

    known: the `facts` the session began with. Collective where what trains is sharded: rank 0's result is the
    checkpoint.
    """
    m = s.module
    tensors = {"generator/cpu": torch.get_rng_state()}
    if s.resolved.device == "cuda":
        tensors["generator/cuda"] = torch.cuda.get_rng_state()
    moments = m.optimizer_state()
    for t in s.stack.named_trainables():
        tensors[f"trained/{t.name}"] = t.parameter
        tensors |= {f"moment/{key}/{t.name}": value for key, value in moments.get(t.name, {}).items()}
    slices = []
    for k, state in enumerate(m.slices):
        plain = {key: value for key, value in vars(state).items() if key != "best_weights"}
        present = state.best_weights is not None and state.best_step == m.steps_done == m.evaluated_at
        if state.best_weights is not None and not present:
            tensors |= {f"best/{k}/{name}": value for name, value in state.best_weights.items()}
        slices.append(plain | {"present_is_best": present})
    tensors = {name: fsdp.gather(t) for name, t in tensors.items()}
    history = {i: None if i in s.keep else s.store.sync_history(i) for i in s.pack.run_ids}
    return tensors, {
        "schema": 1,
        "pack": s.pack.id,
        "runs": s.pack.run_ids,
        "prune": s.pack.prune,
        "step": m.steps_done,
        "total": m.total_steps,
        "evaluated_at": m.evaluated_at,
        "slices": slices,
        "history": history,
        "seconds": dict(s.seconds),
        "peak_memory": peak,
        "reused": m.trunk_cache.decided,
        "resumed": s.resumed,
        "changed": s.changed,
        "facts": dict(known),
        "cpu": provenance.machine()["cpu"],
    }


def restore(s: Session, begun: Checkpoint) -> None:
    """Bring a fresh session to where its checkpoint was taken.

    Raises `Unreadable` for content that does not fit; the session is then of no use.
    """
    try:
        _restore(s, begun)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        raise Unreadable(f"not as this version writes it ({type(e).__name__}: {e})") from e


@torch.no_grad()
def _restore(s: Session, begun: Checkpoint) -> None:
    m, state, tensors = s.module, begun.state, begun.tensors
    trainables = s.stack.named_trainables()
    for t in trainables:
        t.parameter.copy_(fsdp.shard_like(t.parameter, tensors[f"trained/{t.name}"]))
    m.moments = {t.name: _moments(tensors, t) for t in trainables}  # for the optimizer, when it is made
    m.steps_done, m.evaluated_at = state["step"], state["evaluated_at"]
    for k, saved in enumerate(state["slices"]):
        plain = {key: value for key, value in saved.items() if key != "present_is_best"}
        now = s.stack.slice_state(k)
        best_weights = {
            name: fsdp.shard_like(t, best).cpu()
            for name, t in now.items()
            if (best := tensors.get(f"best/{k}/{name}")) is not None
        }
        if saved["present_is_best"]:
            best_weights = {name: t.cpu().clone() for name, t in now.items()}
        m.slices[k] = SliceState(**plain, best_weights=best_weights or None)
    m.trunk_cache.resume(state["reused"])
    s.seconds |= state["seconds"]
    s.peak_memory, s.resumed, s.changed = state["peak_memory"], [*state["resumed"], state["step"]], begun.changed
    torch.set_rng_state(tensors["generator/cpu"])
    if "generator/cuda" in tensors and s.resolved.device == "cuda":
        torch.cuda.set_rng_state(tensors["generator/cuda"])
    begun.tensors.clear()


def _moments(tensors: Mapping[str, Tensor], of: Trainable) -> dict[str, Tensor]:
    """Return the optimizer's tensors of a trainable, as this process holds them."""
    saved = {key: t for key in PackedAdamW.STATE if (t := tensors.get(f"moment/{key}/{of.name}")) is not None}
    return {key: t if key == "steps" else fsdp.shard_like(of.parameter, t) for key, t in saved.items()}


class Saver:
    """Writes a session's checkpoints when they are due.

    `trainer.checkpoint_interval`: every so many steps; 0: never; null: at evaluations, or every three minutes where
    these are rare, but never so often that checkpoints take more than 3 % of the time. A tuning pack has none at its
    last step: its records follow at once. peak: returns the peak memory so far, in bytes.
    """

    cost = 0.0  # seconds that the last checkpoint of this process took

    def __init__(self, session: Session, peak: Callable[[], int]) -> None:
        self.session, self._peak = session, peak
        self.interval = session.pack.runs[0].trainer.checkpoint_interval
        self._facts = facts(session.pack, session.base.fingerprint, session.resolved)
        self._together = any(fsdp.is_shard(t.parameter) for t in session.stack.named_trainables())
        self._last = time.monotonic()

    def peak(self) -> int:
        """Return the peak memory in bytes over all restarts."""
        return max(self._peak(), self.session.peak_memory or 0)

    def between_steps(self, *, evaluated: bool) -> None:
        """Write a checkpoint if one is due. Call it when a step and the evaluation after it are done."""
        m, since = self.session.module, time.monotonic() - self._last
        if self.interval is None:
            due = (evaluated or since >= MAX_SECONDS_BETWEEN) and since * MAX_TIME_SHARE >= Saver.cost
            due = distributed.gather_objects(due)[0] if self._together else due  # by one clock
        else:
            due = self.interval > 0 and m.steps_done % self.interval == 0
        if due and (m.steps_done < m.total_steps or self.session.pack.runs[0].role == "confirm"):
            self.save()

    def save(self) -> None:
        """Write a checkpoint now, unless they are off. Where that fails, stderr says so and training goes on."""
        if self.interval == 0 or not (distributed.is_rank_zero() or self._together):
            return
        s, start = self.session, time.monotonic()
        where = checkpoints.pack_folder(s.store.root, s.pack.id)
        leases.check_held(s.store.lease)
        try:
            content = capture(s, self.peak(), self._facts)
            if distributed.is_rank_zero():
                checkpoints.write(where, s.module.steps_done, *content)
        except OSError as e:
            say(f"pack {s.pack.id}: no checkpoint at step {s.module.steps_done}: {e}", error=True)
        self._last = time.monotonic()
        Saver.cost = self._last - start
