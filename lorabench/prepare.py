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

from lorabench import encoded_cache, probes
from lorabench.base import Base, BaseInfo, HeadSpec
from lorabench.batches import steps_per_epoch
from lorabench.config import RunConfig, digest
from lorabench.schema import ConfigError
from lorabench.settings import TrainerConfig
from lorabench.slice_plan import SlicePlan
from lorabench.tasks.encoding import check_positions


@dataclass(frozen=True)
class Pack:
    """Runs that train together, slice k being run k."""

    id: str
    runs: tuple[RunConfig, ...]
    prune: bool = False  # whether rates that fall behind may leave before the end

    @property
    def run_ids(self) -> list[str]:
        return [r.run_id for r in self.runs]


@dataclass(frozen=True)
class Prepared:
    """A task's data for one base: raw, encoded, and what the task asks of the base."""

    data: Any
    encoded: Any
    processor: Any
    head: HeadSpec
    info: BaseInfo


@dataclass(frozen=True)
class Resolved:
    """What `auto` became. From a fixed table of device, shape and type, never from a timing."""

    device: str  # cpu, cuda, mps
    precision: str  # 32, bf16, 64, or one of Lightning's names
    base_dtype: str  # float32, bfloat16, float64: how the frozen weights are held
    trainer_precision: str  # what the Trainer is told: it casts nothing, except under autocast
    attention: str  # eager, sdpa
    part_tokens: int  # the most padded tokens that go through the base at once, unless one slice's micro-batch is more


# Enough for products to run at full speed, and memory does not grow with the pack: benchmarks/README.md has the CPU's
# measurements. A GPU needs more to be busy; its number is not measured.
PART_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 32768}

_data: dict[str, Any] = {}
_prepared: dict[str, Prepared] = {}
_info: dict[str, BaseInfo] = {}
_base: dict[str, Base] = {}
_taught: dict[str, Prepared] = {}


def _key(*parts: Any) -> str:
    return digest([dataclasses.asdict(p) if dataclasses.is_dataclass(p) else p for p in parts])  # type: ignore[arg-type]


def load_data(task: Any) -> Any:
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
        encoded = encoded_cache.encoded(run.task, run.model, data, processor)
        check_positions(encoded.lengths, layers(run), getattr(run.task, "max_length", None))
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

    def adapters(r: int) -> int:
        made = plan(replace(run, method=replace(run.method, r=r, match_parameters=None)), info)
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
    probes.of(run, prepared.head)
    prompts, held = getattr(run.task, "style_prompts", 0), len(prepared.encoded.splits["test"])
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
    teach = getattr(run.task, "teach", None)
    if teach is None:
        return prepared
    key = _key(run.task, run.model, str(next(base.model.parameters()).dtype))
    if key not in _taught:
        _taught.clear()
        encoded = teach(
            copy.deepcopy(base.model).float(), prepared.encoded, lambda e: run.task.collate(e, prepared.processor)
        )
        _taught[key] = replace(prepared, encoded=encoded)
    return _taught[key]


def user_code(run: RunConfig) -> str | None:
    """SHA-256 prefix over the Python files of the user's own that a run names; None where it names none."""
    parts = (run.task, run.model, getattr(run.task, "probe", None))
    named = [s.file for s in parts if s is not None and getattr(s, "kind", None) == "local"]
    named += [spec.rpartition(":")[0] for spec in getattr(run.task, "extra_metrics", ())]
    if not named:
        return None
    return hashlib.sha256(b"".join(Path(f).expanduser().read_bytes() for f in named)).hexdigest()[:16]


def total_steps(run: RunConfig, examples: int) -> int:
    t = run.trainer
    per_epoch = steps_per_epoch(examples, t.batch_size, t.accumulate_grad_batches)
    return t.max_steps if t.max_steps is not None else per_epoch * (t.max_epochs or 1)


def resolve(run: RunConfig, auto: str | None = None) -> Resolved:
    """The table behind `trainer.precision=auto` and `model.attention=auto`. auto: what the first means in a sweep that has
    begun (`settled`), whatever this machine would choose.

    bf16: CUDA devices that have it, CPUs with native bf16 products (AVX512-BF16, AMX); else float32. Frozen bases
    are held in bf16 with float32 adapters; a base that trains keeps float32 master weights under autocast.
    Attention: plain products for short sequences on a CPU (there SDPA's backward costs a third of the step), else SDPA.
    Parts: how many tokens go through the base at once, by device.
    """
    device = _device(run.trainer)
    asked = run.trainer.precision
    precision = _precision(auto if auto and asked == "auto" else asked, device)
    full = run.method.name == "full"
    names = {"32": ("float32", "32-true"), "64": ("float64", "32-true"), "bf16-mixed": ("float32", "bf16-mixed")}
    dtype, trainer = names.get(precision, ("float32", "bf16-mixed") if full else ("bfloat16", "32-true"))
    attention = getattr(run.model, "attention", "auto")
    if attention == "auto":
        short = (getattr(run.task, "max_length", None) or 10**9) <= 256
        attention = "eager" if device == "cpu" and short else "sdpa"
    part = run.trainer.part_tokens or PART_TOKENS[device]
    return Resolved(device, precision, dtype, trainer, attention, part)


def _device(trainer: TrainerConfig) -> str:
    """The kind of device a pack trains on."""
    import torch

    device_count(trainer)
    accelerator = trainer.accelerator
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator", accelerator, "no such device here; allowed here: auto, cpu")
    if accelerator not in ("auto", "cpu", "cuda", "gpu", "mps"):
        raise ConfigError("trainer.accelerator", accelerator, "allowed: auto, cpu, gpu, cuda, mps")
    if accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return "cuda"
    return "mps" if accelerator == "mps" else "cpu"


def device_count(trainer: TrainerConfig) -> int:
    """How many devices, and so processes, train one pack, over all its nodes. Raises `ConfigError` for what is not built."""
    devices = trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 0
    if count < 1:
        raise ConfigError(
            "trainer.devices", devices, "a number of devices from 1 on, or a list of their indices such as [0]"
        )
    if trainer.strategy not in ("auto", "ddp", "fsdp"):
        raise ConfigError(
            "trainer.strategy",
            trainer.strategy,
            "allowed: auto, ddp (each device has the pack and its share of a batch), fsdp (and its share of the base)",
        )
    world = count * trainer.num_nodes
    if world > 1 and trainer.batch_size % world:
        nodes = f" x trainer.num_nodes={trainer.num_nodes}" if trainer.num_nodes > 1 else ""
        allowed = f"a multiple of trainer.devices={count}{nodes}: each takes its share"
        raise ConfigError("trainer.batch_size", trainer.batch_size, allowed)
    return world


def check_nodes(asked: int, tasks: int) -> None:
    """Raise `ConfigError` where a pack's job has another number of tasks than the pack has nodes."""
    if asked != tasks:
        raise ConfigError(
            "trainer.num_nodes", asked,
            f"{tasks}, the tasks of a pack's job; with hydra/launcher=slurm these are hydra.launcher.nodes x tasks_per_node",
        )  # fmt: skip


def _precision(name: str, device: str) -> str:
    known = {
        "32": "32",
        "32-true": "32",
        "64": "64",
        "64-true": "64",
        "bf16": "bf16",
        "bf16-true": "bf16",
        "bf16-mixed": "bf16-mixed",
    }
    if name == "auto":
        return auto_precision(device)
    if name not in known:
        why = "; fp16's loss scaling would couple the runs of a pack" if name.startswith("16") else ""
        raise ConfigError("trainer.precision", name, f"allowed: auto, {', '.join(known)}{why}")
    return known[name]


def auto_precision(device: str) -> str:
    """What `trainer.precision=auto` is on this machine, by itself."""
    return "bf16" if fast_bf16(device) else "32"


def fast_bf16(device: str) -> bool:
    """Whether bfloat16 products run natively on this device."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)
