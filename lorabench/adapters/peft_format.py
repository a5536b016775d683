"""A slice in PEFT's exchange format and back: pure functions of tensors and an `adapter_config` dict.

Source: peft 0.21 (`tuners/lora/layer.py`, `utils/save_and_load.py`). The tensors name the layers, so target patterns
of a file need no resolving; rank and scaling follow from the config's r, lora_alpha, patterns and use_rslora.
Shapes: I in, O out, r rank, G groups of a Conv2d; our names are `<layer>.lora_A` and `<layer>.lora_B`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorabench.base import BaseInfo, LayerInfo
from lorabench.plan import AdapterSpec, SlicePlan
from lorabench.schema import ConfigError

PREFIX = "base_model.model."
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForTokenClassification": "TOKEN_CLS", "AutoModelForQuestionAnswering": "QUESTION_ANS", "AutoModel": "FEATURE_EXTRACTION",
}  # fmt: skip
# Modules PEFT wraps and expects in the file of its own accord: every module whose name ends so.
OWN_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
EMBEDDING_PARTS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_TENSOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")

# What a config may say besides the numbers read below. Everything not listed must be empty: null, false, 0, "", [] or {}.
_FREE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
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


def to_peft(
    state: Mapping[str, Tensor],
    plan: SlicePlan,
    *,
    info: BaseInfo,
    task_type: str | None = None,
    base_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A slice as (adapter_config, tensors), ready for `adapter_config.json` and `adapter_model.safetensors`.

    Raises `ConfigError` where PEFT's LoRA has no such thing (no adapters, trained biases). An adapter on a grouped
    Conv2d becomes one of rank G * r: PEFT's A sees all I channels, ours those of one group.
    """
    if not representable(plan):
        raise ConfigError(
            "method", "full" if plan.full else "this run", "PEFT's format holds LoRA adapters and whole modules only"
        )
    layers = info.by_name
    tensors: dict[str, Tensor] = {}
    for name in plan.adapters:
        tensors |= _layer_tensors(layers[name], state[f"{name}.lora_A"], state[f"{name}.lora_B"])
    adapted = {f"{name}.{part}" for name in plan.adapters for part in PARTS}
    tensors |= {PREFIX + name: tensor for name, tensor in state.items() if name not in adapted}
    return _config(plan, layers, info, task_type, base_name), {
        name: t.detach().cpu().contiguous() for name, t in tensors.items()
    }


def representable(plan: SlicePlan) -> bool:
    """Whether PEFT's LoRA format can hold what this plan trains."""
    return (
        bool(plan.adapters)
        and not plan.full
        and not plan.biases
        and all(s.kind == "lora" for s in plan.adapters.values())
    )


def _layer_tensors(layer: LayerInfo, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    keys = EMBEDDING_PARTS if layer.kind == "Embedding" else PARTS
    if layer.kind == "Conv2d":
        a, b = _conv_to_peft(a, b, layer.groups)
    return {f"{PREFIX}{layer.name}.{keys['lora_A']}": a, f"{PREFIX}{layer.name}.{keys['lora_B']}": b}


def _conv_to_peft(a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """A [r, I/G, kh, kw] -> [G*r, I, kh, kw], zero off its group; B [O, r] -> [O, r, 1, 1] (a grouped 1x1 convolution)."""
    r, channels = a.shape[:2]
    wide = a.new_zeros(groups, r, groups, *a.shape[1:])
    wide[torch.arange(groups), :, torch.arange(groups)] = a
    return wide.reshape(groups * r, groups * channels, *a.shape[2:]), b.reshape(-1, r, 1, 1)


def _conv_from_peft(a: Tensor, b: Tensor, where: str) -> tuple[Tensor, Tensor]:
    groups = a.shape[0] // b.shape[1]
    r, channels = a.shape[0] // groups, a.shape[1] // groups
    ours = a[:r, :channels].contiguous()
    if groups > 1 and not torch.equal(_conv_to_peft(ours, b, groups)[0], a):
        raise ConfigError(
            where, "lora_A", "an adapter on a grouped Conv2d whose A stays inside its groups; this one mixes them"
        )
    return ours, b.reshape(b.shape[0], r)


def _config(
    plan: SlicePlan, layers: Mapping[str, LayerInfo], info: BaseInfo, task_type: str | None, base_name: str | None
) -> dict[str, Any]:
    rslora, alphas = _alphas(plan.adapters)
    ranks = {}
    for name, spec in plan.adapters.items():
        wide = layers[name].groups if layers[name].kind == "Conv2d" else 1
        ranks[name] = spec.r * wide
        alphas[name] *= math.sqrt(wide) if rslora else wide
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "peft_type": "LORA", "task_type": _task_type(task_type, plan, info), "base_model_name_or_path": base_name, "revision": None,
        "auto_mapping": None, "inference_mode": True, "r": r, "lora_alpha": _whole(alpha), "use_rslora": rslora, "use_dora": False,
        "lora_dropout": _commonest(s.dropout for s in plan.adapters.values()), "bias": "none", "init_lora_weights": True,
        "fan_in_fan_out": all(layers[name].kind == "Conv1D" for name in plan.adapters),
        "target_modules": _targets(plan, info), "modules_to_save": list(plan.modules) or None,
        "rank_pattern": {_exactly(n): x for n, x in ranks.items() if x != r},
        "alpha_pattern": {_exactly(n): _whole(x) for n, x in alphas.items() if x != alpha},
    }  # fmt: skip


def _alphas(adapters: Mapping[str, AdapterSpec]) -> tuple[bool, dict[str, float]]:
    """use_rslora, and the alpha of each layer that gives its scaling under that rule."""
    for rslora in (False, True):
        if all(math.isclose(s.scaling, _scaling(s.alpha, s.r, rslora), rel_tol=1e-12) for s in adapters.values()):
            return rslora, {name: s.alpha for name, s in adapters.items()}
    return False, {name: s.scaling * s.r for name, s in adapters.items()}


def _scaling(alpha: float, r: int, rslora: bool) -> float:
    return alpha / math.sqrt(r) if rslora else alpha / r


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


def _exactly(name: str) -> str:
    """PEFT matches pattern keys as regular expressions against name ends: this one matches a single name."""
    return "^" + re.escape(name)


def _targets(plan: SlicePlan, info: BaseInfo) -> list[str] | str:
    """Names in full; as one expression where a name is also the end of another layer's name (PEFT matches ends)."""
    others = [layer.name for layer in info.layers if layer.name not in plan.adapters]
    if any(other.endswith("." + name) for other in others for name in plan.adapters):
        return "|".join(map(re.escape, sorted(plan.adapters)))
    return sorted(plan.adapters)


def _task_type(task_type: str | None, plan: SlicePlan, info: BaseInfo) -> str | None:
    """None (PEFT's plain PeftModel) where PEFT would wrap a module of its own accord that this slice does not hold."""
    heads = OWN_HEADS.get(task_type or "", ())
    for layer in info.layers:
        parts = layer.name.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        wrapped = any(p.endswith(heads) for p in prefixes) if heads else False
        if wrapped and not any(p in plan.modules for p in prefixes):
            return None
    return task_type


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
                raise ConfigError(
                    f"{where}:{key}",
                    value,
                    f"allowed: {', '.join(map(str, _STARTS))}; others change the base's weights too",
                )
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
    conv = (
        a.dim() == b.dim() == 4
        and b.shape[1] > 0
        and a.shape[0] % b.shape[1] == 0
        and a.shape[1] % (a.shape[0] // b.shape[1]) == 0
    )
    if a.shape[:1] != (r,) or not (conv or a.dim() == b.dim() == 2 and b.shape[1] == r):
        shapes = f"lora_A {list(a.shape)}, lora_B {list(b.shape)}"
        raise ConfigError(where, f"{name}: {shapes}", f"shapes of rank {r:g}, which the config gives this layer")
    scaling = _scaling(alpha, int(r), bool(config.get("use_rslora")))
    dropout = _number(config.get("lora_dropout", 0.0), f"{where}:lora_dropout", low=0.0)
    if conv:
        a, b = _conv_from_peft(a, b, f"{where} {name}")
        wide = int(r) // a.shape[0]  # the rank PEFT needs for a grouped convolution, over ours
        alpha /= math.sqrt(wide) if config.get("use_rslora") else wide
    return AdapterSpec(r=a.shape[0], scaling=scaling, alpha=alpha, dropout=dropout), a, b


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
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < low
        or value <= above
    ):
        raise ConfigError(
            key, value, "a number" + (f" of at least {low:g}" if low > -math.inf else f" greater than {above:g}")
        )
    return float(value)


def _names(config: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
        raise ConfigError(f"{where}:{key}", value, "a list of module names")
    return value
