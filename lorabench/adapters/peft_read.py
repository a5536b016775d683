"""An adapter in PEFT's exchange format, read: tensors and an `adapter_config` dict in, a state in our names out.

The tensors name the layers, so the target patterns of a file need no resolving; rank and scaling follow from r,
lora_alpha, rank_pattern, alpha_pattern and use_rslora. Settings that would change the result are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorabench.adapters.draw import projection
from lorabench.adapters.peft_format import OF_KIND, OWN_HEADS, PREFIX, PROJECTIONS, TYPES, scaling_of
from lorabench.schema import ConfigError
from lorabench.slice_plan import AdapterSpec, SlicePlan

_TENSOR = re.compile(
    r"(?P<layer>.+)\.(?:(?P<factor>lora_[AB])\.weight|lora_embedding_(?P<table>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|(?P<vector>vera_lambda_[bd]|ia3_l))"
)

# What a config may say besides the numbers read below. Everything not listed must be empty: null, false, 0, "", [] or {}.
_FREE = {
    "d_initial", "feedforward_modules", "init_ia3_weights", "init_weights", "projection_prng_key", "save_projection",
    "use_dora", "vera_dropout", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Starts that change A and B only. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base as well, which no adapter file holds.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter read from PEFT's format."""

    state: dict[str, Tensor]  # `<layer>.lora_A`, `<layer>.lora_B` and the like, `<module>.<param>` of whole modules
    plan: SlicePlan
    config: dict[str, Any]  # adapter_config.json
    carried: dict[str, Tensor] = field(
        default_factory=dict
    )  # base weights PEFT stored along: the base's must equal them


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str) -> PeftAdapter:
    """The adapter of a PEFT folder's config and tensors; `where` names the folder's config file in errors.

    Raises `ConfigError` naming the key of the config, or the tensor, and what is allowed.
    """
    _check_supported(config, where)
    saved = tuple(_names(config, "modules_to_save", where)) + OWN_HEADS.get(str(config.get("task_type")), ())
    layers: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    modules: dict[str, None] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if key in PROJECTIONS:
            continue
        if name == key:
            raise ConfigError(where, key, f"tensors named {PREFIX}<layer>, as PEFT writes them")
        if found := _TENSOR.fullmatch(name):
            layers.setdefault(found["layer"], {})[_part(found)] = tensor
        elif module := _saved_module(name, saved):
            modules[module] = None
            state[name] = tensor
        else:
            carried[name.replace(".base_layer.", ".")] = tensor
    shared = _projection(config, tensors, where) if config["peft_type"] == "VERA" else (0, 0, 0)
    specs = {}
    for name, parts in sorted(layers.items()):
        specs[name] = _spec(name, parts, config, shared, where)
        state |= {f"{name}.{part}": t.flatten() if part == "ia3_l" else t for part, t in parts.items()}
    if not specs:
        raise ConfigError(where, "no adapter's tensors", "an adapter as PEFT saves it")
    return PeftAdapter(state, SlicePlan(seed=0, adapters=specs, modules=tuple(modules)), dict(config), carried)


def _part(found: re.Match[str]) -> str:
    if found["table"]:
        return f"lora_{found['table']}"
    return "magnitude" if found["magnitude"] else found["factor"] or found["vector"]


def _spec(
    name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], shared: tuple[int, int, int], where: str
) -> AdapterSpec:
    kind = {"VERA": "vera", "IA3": "ia3"}.get(config["peft_type"], "dora" if config.get("use_dora") else "lora")
    if set(parts) != set(OF_KIND[kind]):
        said = f"use_dora {bool(config.get('use_dora'))}, peft_type {config['peft_type']}"
        allowed = f"with {said} a layer needs {', '.join(OF_KIND[kind])}; it has {', '.join(sorted(parts))}"
        raise ConfigError(where, name, allowed)
    if kind == "vera":
        return _vera_spec(name, parts, config, shared, where)
    if kind == "ia3":
        on_input = parts["ia3_l"].dim() == 2 and parts["ia3_l"].shape[0] == 1  # [1, I] there, [O, 1] on the output
        return AdapterSpec(r=1, scaling=1.0, alpha=1.0, kind="ia3_input" if on_input else "ia3")
    spec = _read_layer(name, parts, config, where)
    return replace(spec, kind=kind)


def _projection(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> tuple[int, int, int]:
    """(seed, I, O) of VeRA's shared pair. Raises `ConfigError` unless the file holds it, as this version draws it."""
    if any(name not in tensors for name in PROJECTIONS):
        raise ConfigError(
            f"{where}:save_projection", config.get("save_projection"), "true: the file must hold vera_A, vera_B"
        )
    seed = int(_number(config.get("projection_prng_key", 0), f"{where}:projection_prng_key", low=0))
    a, b = (tensors[name] for name in PROJECTIONS)
    spec = AdapterSpec(r=a.shape[0], scaling=1.0, alpha=1.0, projection=(seed, a.shape[-1], b.shape[0]))
    drawn = projection({}, spec, a)
    if any(not torch.equal(x, y) for x, y in zip((a, b), drawn, strict=True)):
        raise ConfigError(f"{where}:projection_prng_key", seed, "the seed that vera_A and vera_B were drawn with")
    return spec.projection


def _vera_spec(
    name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], shared: tuple[int, int, int], where: str
) -> AdapterSpec:
    r = int(_number(config.get("r", 256), f"{where}:r", above=0))
    if parts["vera_lambda_d"].shape != (r,) or parts["vera_lambda_b"].dim() != 1:
        raise ConfigError(where, f"{name}: vera_lambda_d {list(parts['vera_lambda_d'].shape)}", f"vectors of rank {r}")
    dropout = _number(config.get("vera_dropout", 0.0), f"{where}:vera_dropout", low=0.0)
    initial = _number(config.get("d_initial", 0.1), f"{where}:d_initial")
    return AdapterSpec(
        r=r, scaling=1.0, alpha=1.0, dropout=dropout, kind="vera", d_initial=initial, projection=shared
    )  # fmt: skip


def _check_supported(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") not in TYPES.values():
        raise ConfigError(
            f"{where}:peft_type", config.get("peft_type"), f"allowed: {', '.join(sorted({*TYPES.values()}))}"
        )
    for key, value in config.items():
        if key == "init_lora_weights":
            if value is not None and value not in _STARTS:
                allowed = f"allowed: {', '.join(map(str, _STARTS))}; others change the base's weights too"
                raise ConfigError(f"{where}:{key}", value, allowed)
        elif key == "bias":
            if value not in (None, "none"):
                raise ConfigError(f"{where}:{key}", value, "allowed: none")
        elif key not in _FREE and value not in (None, False, 0, "", [], {}):
            raise ConfigError(f"{where}:{key}", value, "not supported here; allowed: null, false or empty")


def _saved_module(name: str, saved: tuple[str, ...]) -> str | None:
    """The module of a tensor's name that `modules_to_save` names by its end, as PEFT matches it."""
    parts = name.split(".")[:-1]
    prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((p for p in prefixes if saved and p.endswith(saved)), None)


def _read_layer(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> AdapterSpec:
    a, b = parts["lora_A"], parts["lora_B"]
    r = _pattern(config, "rank_pattern", "r", name, where)
    alpha = _pattern(config, "alpha_pattern", "lora_alpha", name, where)
    if a.shape[:1] != (r,) or not (_conv_fits(a, b) if a.dim() == 4 else a.dim() == b.dim() == 2 and b.shape[1] == r):
        shapes = f"lora_A {list(a.shape)}, lora_B {list(b.shape)}"
        raise ConfigError(where, f"{name}: {shapes}", f"shapes of rank {r:g}, which the config gives this layer")
    scaling = scaling_of(alpha, int(r), bool(config.get("use_rslora")))
    dropout = _number(config.get("lora_dropout", 0.0), f"{where}:lora_dropout", low=0.0)
    return AdapterSpec(r=int(r), scaling=scaling, alpha=alpha, dropout=dropout)


def _pattern(config: Mapping[str, Any], pattern_key: str, key: str, name: str, where: str) -> float:
    """A layer's own value where a pattern matches its name's end, first match first (PEFT's get_pattern_key)."""
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"{where}:{pattern_key}", patterns, "a mapping of layer patterns to numbers")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as e:
            raise ConfigError(f"{where}:{pattern_key}", pattern, f"a regular expression ({e})") from e
        if matches:
            return _number(value, f"{where}:{pattern_key}.{pattern}", above=0)
    return _number(config.get(key, 8), f"{where}:{key}", above=0)


def _number(value: Any, key: str, *, low: float = -math.inf, above: float = -math.inf) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < low or value <= above:
        bound = f"of at least {low:g}" if low > -math.inf else f"greater than {above:g}"
        raise ConfigError(key, value, f"a number {bound}")
    return float(value)


def _names(config: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
        raise ConfigError(f"{where}:{key}", value, "a list of module names")
    return value


def _conv_fits(a: Tensor, b: Tensor) -> bool:
    """A [r, I, kh, kw] and B [O, r/G, 1, 1] for some number of groups G."""
    return b.dim() == 4 and b.shape[2:] == (1, 1) and b.shape[1] > 0 and a.shape[0] % b.shape[1] == 0
