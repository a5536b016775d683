"""What a run needs before it trains: its data, its base, its plan; and what `auto` means here.

Data and the one base in use are kept for the next pack of the process. `check` is what every run passes before
anything is written: it reads the data and builds the base on the meta device, but loads no weights.
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


@dataclass(frozen=True)
class Prepared:
    """A task's data for one base: raw, encoded, and what the task asks of the base."""

    data: TaskData
    encoded: Encoded
    processor: Any
    head: HeadSpec
    info: BaseInfo


_data: dict[str, TaskData] = {}


_prepared: dict[str, Prepared] = {}


_info: dict[str, BaseInfo] = {}


_base: dict[str, Base] = {}


_taught: dict[str, Prepared] = {}


def _key(*parts: Any) -> str:
    return digest([dataclasses.asdict(p) if dataclasses.is_dataclass(p) else p for p in parts])  # type: ignore[arg-type]


def load_data(task: Task) -> TaskData:
    key = _key(task)
    if key not in _data:
        _data[key] = task.load()
    return _data[key]


def prepare(run: RunConfig) -> Prepared:
    """Data, encoded examples and layers of a run; shared by all runs of the same task and model."""
    key = _key(run.task, run.model)
    if key not in _prepared:
        data = load_data(run.task)
        head = run.task.head(data)
        processor = run.model.processor()
        encoded = encode_cached(run.task, run.model, data, processor)
        run.task.check_base(encoded, layers(run))
        _prepared[key] = Prepared(data, encoded, processor, head, layers(run))
    return _prepared[key]


def layers(run: RunConfig) -> BaseInfo:
    """The base's layers without encoding the data: what a dry run needs."""
    head = run.task.head(load_data(run.task))
    key = _key(run.model, head)
    if key not in _info:
        _info[key] = run.model.info(head)
    return _info[key]


def model_fingerprint(run: RunConfig) -> str:
    return run.model.fingerprint()


def plan(run: RunConfig, info: BaseInfo) -> SlicePlan:
    """What a run trains. Raises `ConfigError` for unmatched targets and impossible ranks."""
    made: SlicePlan = run.method.plan(info, seed=run.seed)
    if made.trainable(info) == 0:
        raise ConfigError("method", run.method.name, "nothing would train with these settings")
    return made


MATCHED = 0.05  # how far from the number asked for the nearest rank may be


def matched_rank(run: RunConfig) -> int:
    """The rank at which the adapters (a new head left out) train nearest to `method.match_parameters`.

    Raises `ConfigError` where none comes within 5 %, and for ranks the layers cannot have.
    """
    wanted, info = run.method.match_parameters, layers(run)
    assert wanted is not None

    def adapters(r: int) -> int:
        made = plan(replace(run, method=run.method.replace(r=r, match_parameters=None)), info)
        known = info.by_name
        return sum(spec.trainable(known[name]) for name, spec in made.adapters.items())

    one = adapters(1)
    r = max(1, round(wanted / one))
    got = adapters(r)
    if abs(got - wanted) > MATCHED * wanted:
        allowed = f"a number near a multiple of {one}, what r = 1 trains on these layers; r = {r} trains {got}"
        raise ConfigError("method.match_parameters", wanted, allowed)
    return r


def check(run: RunConfig) -> SlicePlan:
    """Raise `ConfigError` for anything that would stop this run, before anything is written."""
    resolve(run)
    prepared = prepare(run)
    load_probe(run, prepared.head)
    prompts, held = run.task.style_prompts, len(prepared.encoded.splits["test"])
    if prompts > held:
        raise ConfigError("task.style_prompts", prompts, f"at most {held}, the pairs held out for testing")
    return plan(run, layers(run))


def base(run: RunConfig, head: HeadSpec, resolved: Resolved) -> Base:
    """The loaded base. One is kept for the next pack: every pack gives it back as it was."""
    key = _key(run.model, head, resolved.base_dtype, resolved.attention)
    if key not in _base:
        _base.clear()  # two bases at once are memory nobody asked for
        _base[key] = run.model.load(head, dtype=resolved.base_dtype, attention=resolved.attention)
    return _base[key]


def forget_base() -> None:
    """The base in use will not be given back as it was: the next pack loads its own."""
    _base.clear()


def taught(run: RunConfig, prepared: Prepared, base: Base) -> Prepared:
    """The same with targets that the base itself gives, for tasks that `teach`; once a task and base."""
    if not run.task.is_taught:
        return prepared
    key = _key(run.task, run.model, str(next(base.model.parameters()).dtype))
    if key not in _taught:
        _taught.clear()
        encoded = run.task.teach(
            copy.deepcopy(base.model).float(), prepared.encoded, lambda e: run.task.collate(e, prepared.processor)
        )
        _taught[key] = replace(prepared, encoded=encoded)
    return _taught[key]


def user_code(run: RunConfig) -> str | None:
    """SHA-256 prefix over the Python files of the user's own that a run names; None where it names none."""
    parts = (run.task, run.model, run.task.probe)
    named = [part.local_file for part in parts if part is not None and part.local_file]
    named += [spec.rpartition(":")[0] for spec in run.task.extra_metrics]
    if not named:
        return None
    return hashlib.sha256(b"".join(Path(f).expanduser().read_bytes() for f in named)).hexdigest()[:16]


def total_steps(run: RunConfig, examples: int) -> int:
    t = run.trainer
    per_epoch = steps_per_epoch(examples, t.batch_size, t.accumulate_grad_batches)
    return t.max_steps if t.max_steps is not None else per_epoch * (t.max_epochs or 1)
