"""What a run needs before it trains: its data, its base and its plan.

Data and the one base in use are kept for the next pack of the process. Every run passes `check_run` before anything is
written: it reads the data and builds the base on the meta device, but loads no weights.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import Base, BaseInfo, HeadSpec
from lorabench.config.contracts.task import Encoded, Task, TaskData
from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig, digest
from lorabench.tasks.cache import encode_cached
from lorabench.tasks.probe import load_probe
from lorabench.training.batches import steps_per_epoch
from lorabench.training.precision import Resolved, resolve

MATCH_TOLERANCE = 0.05  # share by which a matched rank may miss the number of parameters asked for


@dataclass(frozen=True)
class Prepared:
    """A task's data for one base.

    data: raw rows. encoded: examples as the base's processor makes them. head: what the task asks of the base.
    """

    data: TaskData
    encoded: Encoded
    processor: Any
    head: HeadSpec
    info: BaseInfo


# What this process keeps, by a hash of all that it depends on.
_data: dict[str, TaskData] = {}
_prepared: dict[str, Prepared] = {}
_infos: dict[str, BaseInfo] = {}
_processors: dict[str, str | None] = {}  # fingerprints
_base: dict[str, Base] = {}  # one at most
_with_targets: dict[str, Prepared] = {}  # one at most


def forget_data() -> None:
    """Forget all data and layers that are kept, as if this were another process. The base in use is kept."""
    for kept in (_data, _prepared, _infos, _processors, _with_targets):
        kept.clear()


def _key(*parts: Any) -> str:
    """Return a hash of dataclasses and plain values."""
    return digest([dataclasses.asdict(p) if dataclasses.is_dataclass(p) else p for p in parts])  # type: ignore[arg-type]


def load_data(task: Task) -> TaskData:
    """Read and split a task's data, once a process. Raises `ConfigError` for every fault of the data."""
    key = _key(task)
    if key not in _data:
        _data[key] = task.load()
    return _data[key]


def prepare(run: RunConfig) -> Prepared:
    """Read and encode a run's data, once for each task and model in a process. Raises `ConfigError`."""
    key = _key(run.task, run.model)
    if key not in _prepared:
        data = load_data(run.task)
        head = run.task.head(data)
        processor = run.model.processor()
        encoded = encode_cached(run.task, run.model, data, processor)
        run.task.check_base(encoded, base_info(run))
        _prepared[key] = Prepared(data, encoded, processor, head, base_info(run))
    return _prepared[key]


def base_info(run: RunConfig) -> BaseInfo:
    """Return the base's layers. Loads no weights and encodes no data."""
    head = run.task.head(load_data(run.task))
    key = _key(run.model, head)
    if key not in _infos:
        _infos[key] = run.model.info(head)
    return _infos[key]


def model_fingerprint(run: RunConfig) -> str:
    """Return the fingerprint of the base's weights and processor."""
    return run.model.fingerprint()


def processor_fingerprint(run: RunConfig) -> str | None:
    """Return the hash of what the processor does beside `model_fingerprint`, once for each model in a process."""
    key = _key(run.model)
    if key not in _processors:
        _processors[key] = run.model.processor_fingerprint()
    return _processors[key]


def slice_plan(run: RunConfig, info: BaseInfo) -> SlicePlan:
    """Return what a run trains. Raises `ConfigError` for unmatched targets, impossible ranks and empty plans."""
    plan = run.method.plan(info, seed=run.seed)
    if plan.trainable(info) == 0:
        raise ConfigError("method", run.method.name, "nothing would train with these settings")
    return plan


def matched_rank(run: RunConfig) -> int:
    """Return the rank whose adapters, a new head left out, train nearest to `method.match_parameters`.

    Raises `ConfigError` where none comes within 5 %, and for ranks the layers cannot have.
    """
    wanted, info = run.method.match_parameters, base_info(run)
    assert wanted is not None
    layers = info.by_name

    def adapter_parameters(r: int) -> int:
        plan = slice_plan(replace(run, method=run.method.replace(r=r, match_parameters=None)), info)
        return sum(spec.trainable(layers[name]) for name, spec in plan.adapters.items())

    of_one = adapter_parameters(1)
    r = max(1, round(wanted / of_one))
    matched = adapter_parameters(r)
    if abs(matched - wanted) > MATCH_TOLERANCE * wanted:
        allowed = f"a number near a multiple of {of_one}, what r = 1 trains on these layers; r = {r} trains {matched}"
        raise ConfigError("method.match_parameters", wanted, allowed)
    return r


def check_run(run: RunConfig) -> SlicePlan:
    """Return what a run trains. Raises `ConfigError` for anything that would stop it, before anything is written."""
    resolve(run)
    prepared = prepare(run)
    load_probe(run, prepared.head)
    prompts, held_out = run.task.style_prompts, len(prepared.encoded.splits["test"])
    if prompts > held_out:
        raise ConfigError("task.style_prompts", prompts, f"at most {held_out}, the pairs held out for testing")
    return slice_plan(run, base_info(run))


def load_base(run: RunConfig, head: HeadSpec, resolved: Resolved) -> Base:
    """Load the base, or return the one that is kept: every pack gives it back as it was."""
    key = _key(run.model, head, resolved.base_dtype, resolved.attention)
    if key not in _base:
        _base.clear()  # two bases at once are memory nobody asked for
        base = run.model.load(head, dtype=resolved.base_dtype, attention=resolved.attention)
        _check_as_described(run, base, base_info(run))
        _base[key] = base
    return _base[key]


def _check_as_described(run: RunConfig, base: Base, described: BaseInfo) -> None:
    """Raise `ConfigError` where a loaded base has other layers than those the run's plan was made from."""
    if base.info == described:
        return
    now, then = set(base.info.layers), set(described.layers)
    names = sorted({layer.name for layer in now ^ then}) or ["its head or output"]
    reason = f"the layers that info() describes; load() gives others at: {', '.join(names[:5])}"
    raise ConfigError("model.source", run.model.source or run.model.kind, reason)


def forget_base() -> None:
    """Forget the base in use, for a pack that cannot give it back as it was."""
    _base.clear()


def teach(run: RunConfig, prepared: Prepared, base: Base) -> Prepared:
    """Return the data with targets that the base itself gives, once for each task and base, if the task is taught."""
    if not run.task.is_taught:
        return prepared
    key = _key(run.task, run.model, str(next(base.model.parameters()).dtype))
    if key not in _with_targets:
        _with_targets.clear()
        model = copy.deepcopy(base.model).float()
        encoded = run.task.teach(model, prepared.encoded, lambda e: run.task.collate(e, prepared.processor))
        _with_targets[key] = replace(prepared, encoded=encoded)
    return _with_targets[key]


def user_code_fingerprint(run: RunConfig) -> str | None:
    """Return a prefix of the SHA-256 over the user's own Python files that a run names; None where it names none."""
    parts = (run.task, run.model, run.task.probe)
    files = [part.local_file for part in parts if part is not None and part.local_file]
    files += [spec.rpartition(":")[0] for spec in run.task.extra_metrics]
    if not files:
        return None
    return hashlib.sha256(b"".join(Path(f).expanduser().read_bytes() for f in files)).hexdigest()[:16]


def total_steps(run: RunConfig, examples: int) -> int:
    """Return the optimizer steps of a run. examples: size of its training split."""
    t = run.trainer
    per_epoch = steps_per_epoch(examples, t.batch_size, t.accumulate_grad_batches)
    return t.max_steps if t.max_steps is not None else per_epoch * (t.max_epochs or 1)
