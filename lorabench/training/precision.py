"""Precision and device of a sweep: what `auto` resolves to, and what the manifest has noted.

The process that trains first notes the kind of device and the meaning of `trainer.precision=auto` in the manifest:
`"settled": {"device": "cpu", "precision": "bf16"}`. Both then hold on every machine, so no sweep compares runs of two
precisions because two machines took part in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.config.runs import RunConfig
from lorabench.config.settings import TrainerConfig
from lorabench.store.records import Store


@dataclass(frozen=True)
class Resolved:
    """What `auto` resolves to, from a fixed table of device, shape and type, never from a timing."""

    device: str  # cpu, cuda, mps
    precision: str  # 32, bf16, 64, or one of Lightning's names
    base_dtype: str  # float32, bfloat16, float64: how the frozen weights are held
    trainer_precision: str  # for the Trainer, which casts nothing except under autocast
    attention: str  # eager, sdpa
    part_tokens: int  # padded tokens that go through the base at once; one slice's micro-batch may be more


# Enough tokens for products at full speed, while memory does not grow with the pack. The CPU's is measured
# (benchmarks/README.md). A GPU needs more to be busy; its number is not measured.
PART_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 32768}


def resolve(run: RunConfig, auto: str | None = None) -> Resolved:
    """Return what `trainer.precision=auto` and `model.attention=auto` mean for a run.

    auto: what precision `auto` means in a sweep that has begun (`noted_precision`), whatever this machine would choose.

    bf16: CUDA devices that have it, CPUs with native bf16 products (AVX512-BF16, AMX); else float32. Frozen bases
    are held in bf16 with float32 adapters; a base that trains keeps float32 master weights under autocast.
    Attention: plain products for short sequences on a CPU (there SDPA's backward costs a third of the step), else SDPA
    where the base offers it.
    Parts: how many tokens go through the base at once, by device.
    """
    device = _device(run.trainer)
    asked = run.trainer.precision
    name = _canonical_precision(auto if auto and asked == "auto" else asked, device)
    full = run.method.trains_base
    names = {"32": ("float32", "32-true"), "64": ("float64", "32-true"), "bf16-mixed": ("float32", "bf16-mixed")}
    dtype, trainer = names.get(name, ("float32", "bf16-mixed") if full else ("bfloat16", "32-true"))
    attention = _attention(run, device)
    part = run.trainer.part_tokens or PART_TOKENS[device]
    return Resolved(device, name, dtype, trainer, attention, part)


def _attention(run: RunConfig, device: str) -> str:
    """Return eager or sdpa. Raises `ConfigError` where sdpa is asked for and the base does not offer it."""
    asked = run.model.attention
    if asked == "eager":
        return asked
    short = run.task.longest is not None and run.task.longest <= 256
    if asked == "auto" and device == "cpu" and short:
        return "eager"
    if "sdpa" in run.model.attentions():
        return "sdpa"
    if asked == "sdpa":
        raise ConfigError("model.attention", asked, "this base offers eager alone; allowed: auto, eager")
    return "eager"


def _device(trainer: TrainerConfig) -> str:
    """Return the kind of device a pack trains on. Raises `ConfigError` where there is none."""
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
    """Return how many devices, and so processes, train one pack, over all its nodes.

    Raises `ConfigError` for settings that are not supported.
    """
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
        allowed = (
            f"{tasks}, the tasks of a pack's job; "
            "with hydra/launcher=slurm these are hydra.launcher.nodes x tasks_per_node"
        )
        raise ConfigError("trainer.num_nodes", asked, allowed)


def _canonical_precision(name: str, device: str) -> str:
    """Return 32, 64, bf16 or bf16-mixed. Raises `ConfigError` for a name that is not supported."""
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
    """Return what `trainer.precision=auto` is on this machine in a sweep that has not begun."""
    return "bf16" if has_fast_bf16(device) else "32"


def has_fast_bf16(device: str) -> bool:
    """Return whether bfloat16 products run natively on this device."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def note_device(store: Store, run: RunConfig) -> None:
    """Note device and precision in the manifest: this machine's, or those of runs that have begun.

    Call it under `Store.locked`.
    """
    manifest, device = store.manifest(), resolve(run).device
    note = {"device": device, "precision": auto_precision(device)}
    if store.run_ids():  # a run's folder is made as its training begins
        note = manifest.get("settled") or _from_records(store, note)
    if note != manifest.get("settled"):
        store.write_manifest(manifest | {"settled": note})


def _from_records(store: Store, note: dict[str, str]) -> dict[str, str]:
    """Return the device and precision that most records name; `note` where none does.

    Used where the manifest was lost or has no note.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in note}
    for record in store.records():
        automatic = record.config.get("trainer", {}).get("precision") == "auto"
        for name in ("device", "precision") if automatic else ("device",):
            if value := record.provenance.get(name):
                counts[name][str(value)] += 1
    return note | {name: values.most_common(1)[0][0] for name, values in counts.items() if values}


def check_device(store: Store, runs: Sequence[RunConfig], *, accept_drift: bool) -> str | None:
    """Return one line for the user where this machine would choose another precision than the sweep has; else None.

    Raises `ExistingWork` where the sweep was begun on another kind of device, unless that is accepted.
    """
    trainer, note = runs[0].trainer, store.manifest().get("settled", {})
    device = resolve(runs[0]).device
    then = note.get("device", device)
    if device != then and not accept_drift:
        allowed = (
            f"{then}, on which runs of {store.root} were trained; it is {device} here, and results of two kinds of "
            f"device would be compared. Go on with {then} (trainer.accelerator={then}, where there is one), or with "
            f"sweep.accept_drift=true: the report then says which runs differ; another sweep.name trains all anew"
        )
        raise ExistingWork("trainer.accelerator", trainer.accelerator, allowed)
    here, noted = auto_precision(device), note.get("precision")
    if noted in (None, here) or all(run.trainer.precision != "auto" for run in runs):
        return None
    slow = ", slow here" if noted == "bf16" else ""
    return (
        f"{store.root}: trainer.precision=auto is {noted} as in the runs that are there{slow}; this machine's own "
        f"choice would be {here}, which trainer.precision={here} trains anew under another sweep.name"
    )


def noted_precision(store: Store) -> str | None:
    """Return what `trainer.precision=auto` means in a sweep; None: nothing has trained yet."""
    precision: str | None = store.manifest().get("settled", {}).get("precision")
    return precision


def resolve_in_sweep(run: RunConfig, store: Store) -> Resolved:
    """Return what `auto` means for a run of this sweep."""
    return resolve(run, noted_precision(store))
