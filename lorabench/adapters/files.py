"""What a slice trained, on disk: written whole or not at all, read without running anything it holds.

    adapter_config.json, adapter_model.safetensors   adapters (and whole modules beside them) in PEFT's own format
    weights.safetensors                              everything else: head, biases, a full model
    plan.json                                        the slice's plan, for exact reload

A folder that PEFT wrote (no plan.json) loads as well. Pickle files are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorabench.adapters.peft import PARTS_OF_KIND, TASK_TYPES, PeftAdapter, from_peft, is_representable, to_peft
from lorabench.config.contracts.method import AdapterSpec, SlicePlan
from lorabench.config.contracts.model import BaseInfo, HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.runtime.files import aside_path, atomic_folder, remove_temporaries, write_tensors

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_FILE, PLAN_FILE = "weights.safetensors", "plan.json"


def save_slice(
    folder: str | Path,
    state: Mapping[str, Tensor],
    plan: SlicePlan,
    *,
    info: BaseInfo,
    run: Mapping[str, Any] | None = None,
    head: HeadSpec | None = None,
) -> None:
    """Write what a slice trained (`Stack.export_slice`) into `folder`, replacing what was there once all is on disk.

    run: `RunConfig.to_dict()`, for the base's name; head: for PEFT's task type.
    """
    folder = Path(folder)
    remove_temporaries(folder)
    with atomic_folder(folder) as tmp:
        tied: dict[str, str] = {}
        if is_representable(plan):
            write_peft(tmp, state, plan, info=info, run=run, head=head)
        else:
            tensors, tied = _split_tied(state)
            write_tensors(tmp / WEIGHTS_FILE, tensors, {"format": "pt"})
        _write_json(tmp / PLAN_FILE, {"schema": 1, "plan": asdict(plan), "tied": tied})


def write_peft(
    folder: Path,
    state: Mapping[str, Tensor],
    plan: SlicePlan,
    *,
    info: BaseInfo,
    run: Mapping[str, Any] | None = None,
    head: HeadSpec | None = None,
) -> None:
    """PEFT's two files, into an existing folder. Raises `ConfigError` for a plan that PEFT's LoRA cannot hold."""
    task_type = TASK_TYPES.get(head.auto_class) if head else None
    model = (run or {}).get("model", {})
    source = model.get("source")
    config, tensors = to_peft(state, plan, info=info, task_type=task_type, base_name=source and str(source))
    config["revision"] = model.get("revision")
    _write_json(folder / PEFT_CONFIG, config)
    write_tensors(folder / PEFT_TENSORS, tensors, {"format": "pt"})


def load_slice(folder: str | Path) -> tuple[dict[str, Tensor], SlicePlan]:
    """(state, plan) of a folder that `save_slice` or PEFT wrote; `Stack.load_slice` takes the state.

    Raises `ConfigError` with the path for anything missing, torn or foreign.
    """
    folder = _existing(Path(folder))
    if not (folder / PLAN_FILE).is_file():
        adapter = read_peft(folder)
        return adapter.state, adapter.plan
    saved = _read_json(folder / PLAN_FILE)
    plan = _plan(saved, folder / PLAN_FILE)
    if is_representable(plan):
        state = read_peft(folder).state
    else:
        state = read_tensors(folder / WEIGHTS_FILE)
        for alias, name in dict(saved.get("tied") or {}).items():
            if name not in state:
                raise ConfigError(
                    "adapter", str(folder / PLAN_FILE), f"a plan that fits its tensors; {name} is not among them"
                )
            state[alias] = state[name]
    _check_complete(state, plan, folder)
    return state, plan


def read_peft(folder: str | Path) -> PeftAdapter:
    """Return the adapter in a PEFT folder. Raises `ConfigError` for other formats, torn files and unsupported
    settings."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError("adapter", str(folder), "an existing folder")
    if not (folder / PEFT_TENSORS).is_file() and (folder / "adapter_model.bin").exists():
        why = "a pickle file can run code when opened; save it again with PEFT's safe_serialization=True"
        raise ConfigError("adapter", str(folder / "adapter_model.bin"), f"{PEFT_TENSORS}: {why}")
    config = _read_json(folder / PEFT_CONFIG)
    return from_peft(config, read_tensors(folder / PEFT_TENSORS), where=str(folder / PEFT_CONFIG))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, on the CPU. Raises `ConfigError` for one that is missing or torn."""
    try:
        return load_file(path)
    except FileNotFoundError as e:
        raise ConfigError("adapter", str(path), "an existing file") from e
    except (SafetensorError, OSError, ValueError) as e:
        raise ConfigError("adapter", str(path), f"a whole safetensors file ({e})") from e


def _existing(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if aside_path(folder).is_dir():
        return aside_path(folder)
    raise ConfigError("adapter", str(folder), "an existing folder with trained weights")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConfigError("adapter", str(path), "an existing file") from e
    except (OSError, ValueError, RecursionError) as e:  # ValueError: bad JSON, bad UTF-8
        raise ConfigError("adapter", str(path), f"a whole JSON file ({e})") from e
    if not isinstance(value, dict):
        raise ConfigError("adapter", str(path), "a JSON object")
    return value


def _plan(saved: Mapping[str, Any], path: Path) -> SlicePlan:
    if saved.get("schema") != 1:
        raise ConfigError("adapter", str(path), f"schema 1, got {saved.get('schema')!r}")
    try:
        plan = dict(saved["plan"])
        adapters = {name: _spec(spec) for name, spec in plan.pop("adapters").items()}
        modules, biases = tuple(plan.pop("modules")), tuple(plan.pop("biases"))
        return SlicePlan(adapters=adapters, modules=modules, biases=biases, **plan)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError("adapter", str(path), f"a plan as this version writes it ({type(e).__name__}: {e})") from e


def _spec(saved: Mapping[str, Any]) -> AdapterSpec:
    spec = AdapterSpec(**saved)
    seed, inputs, outputs = spec.projection  # a list, from JSON
    return replace(spec, projection=(seed, inputs, outputs))


def _check_complete(state: Mapping[str, Tensor], plan: SlicePlan, folder: Path) -> None:
    """Raise `ConfigError` unless every tensor that the plan names is there, adapters with their rank."""
    missing = [m for m in plan.modules if not any(name.startswith(m + ".") for name in state)]
    missing += [b for b in plan.biases if f"{b}.bias" not in state]
    for name, spec in plan.adapters.items():
        first, *rest = (state.get(f"{name}.{part}") for part in PARTS_OF_KIND[spec.kind])
        ranked = not spec.kind.startswith("ia3")  # lora_A and vera_lambda_d have their rank in front
        if first is None or any(t is None for t in rest) or (ranked and first.shape[0] != spec.r):
            missing.append(f"{name} (rank {spec.r})")
    if missing:
        raise ConfigError(
            "adapter",
            str(folder),
            f"tensors that fit {PLAN_FILE}; missing or of another rank: {', '.join(missing[:3])}",
        )


def _split_tied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors to save, one name each, and {other name: that name} for those that share their memory."""
    first: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and key in first and tensor.is_contiguous():
            tied[name] = first[key]
        else:
            first.setdefault(key, name)
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied
