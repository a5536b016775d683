"""An adapter in PEFT's exchange format, read: tensors and an `adapter_config` dict in, a state in our names out.

The tensors name the layers, so the target patterns of a file need no resolving; rank and scaling follow from r,
lora_alpha, rank_pattern, alpha_pattern and use_rslora. Settings that would change the result are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorabench.adapters.peft_format import OWN_HEADS, PREFIX, scaling_of
from lorabench.schema import ConfigError
from lorabench.slice_plan import AdapterSpec, SlicePlan

_TENSOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")

# What a config may say besides the numbers read below. Everything not listed must be empty: null, false, 0, "", [] or {}.
_FREE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Starts that change A and B only. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base as well, which no adapter file holds.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter read from PEFT's format."""

    state: dict[str, Tensor]  # `<layer>.lora_A`, `<layer>.lora_B`, `<module>.<param>` of whole modules
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
        if name == key:
            raise ConfigError(where, key, f"tensors named {PREFIX}<layer>, as PEFT writes them")
        if found := _TENSOR.fullmatch(name):
            layers.setdefault(found[1], {})[found[2] or found[3]] = tensor
        elif module := _saved_module(name, saved):
            modules[module] = None
            state[name] = tensor
        else:
            carried[name.replace(".base_layer.", ".")] = tensor
    specs = {}
    for name, parts in sorted(layers.items()):
        specs[name], state[f"{name}.lora_A"], state[f"{name}.lora_B"] = _read_layer(name, parts, config, where)
    if not specs:
        raise ConfigError(where, "no lora_A, lora_B tensors", "a LoRA adapter as PEFT saves it")
    return PeftAdapter(state, SlicePlan(seed=0, adapters=specs, modules=tuple(modules)), dict(config), carried)


def _check_supported(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where}:peft_type", config.get("peft_type"), "allowed: LORA")
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


def _read_layer(
    name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> tuple[AdapterSpec, Tensor, Tensor]:
    if set(parts) != {"A", "B"}:
        raise ConfigError(where, name, "a layer needs both lora_A and lora_B")
    a, b = parts["A"], parts["B"]
    r = _pattern(config, "rank_pattern", "r", name, where)
    alpha = _pattern(config, "alpha_pattern", "lora_alpha", name, where)
    if a.shape[:1] != (r,) or not (_conv_fits(a, b) if a.dim() == 4 else a.dim() == b.dim() == 2 and b.shape[1] == r):
        shapes = f"lora_A {list(a.shape)}, lora_B {list(b.shape)}"
        raise ConfigError(where, f"{name}: {shapes}", f"shapes of rank {r:g}, which the config gives this layer")
    scaling = scaling_of(alpha, int(r), bool(config.get("use_rslora")))
    dropout = _number(config.get("lora_dropout", 0.0), f"{where}:lora_dropout", low=0.0)
    return AdapterSpec(r=int(r), scaling=scaling, alpha=alpha, dropout=dropout), a, b


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
