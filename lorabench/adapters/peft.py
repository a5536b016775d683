"""A slice in PEFT's exchange format, written and read: tensors and an `adapter_config` dict.

Source: peft 0.21 (`tuners/lora/layer.py`, `utils/save_and_load.py`). Shapes are PEFT's throughout: A [r, I], B [O, r];
Conv2d of G groups A [r, I, kh, kw], B [O, r/G, 1, 1].
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorabench.adapters.init import projection
from lorabench.config import alpha_rules
from lorabench.config.contracts.method import AdapterSpec, SlicePlan
from lorabench.config.contracts.model import BaseInfo, LayerInfo
from lorabench.config.errors import ConfigError

PREFIX = "base_model.model."
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModel": "FEATURE_EXTRACTION",
}
# Modules PEFT wraps and expects in the file of its own accord: every module whose name ends so.
OWN_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
EMBEDDING_PARTS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
DORA_PARTS = {**PARTS, "magnitude": "lora_magnitude_vector"}
VERA_PARTS = {"vera_lambda_d": "vera_lambda_d", "vera_lambda_b": "vera_lambda_b"}


IA3_PARTS = {"ia3_l": "ia3_l"}
PARTS_OF_KIND = {"lora": PARTS, "dora": DORA_PARTS, "vera": VERA_PARTS, "ia3": IA3_PARTS, "ia3_input": IA3_PARTS}
PEFT_TYPES = {"lora": "LORA", "dora": "LORA", "vera": "VERA", "ia3": "IA3", "ia3_input": "IA3"}
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def to_peft(
    state: Mapping[str, Tensor],
    plan: SlicePlan,
    *,
    info: BaseInfo,
    task_type: str | None = None,
    base_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a slice as (adapter_config, tensors), for `adapter_config.json` and `adapter_model.safetensors`.

    state, plan: what `Stack.export_slice` gives. task_type: PEFT's; None for a plain PeftModel. base_name: what loads
    the base. Raises `ConfigError` where PEFT has no such thing: no adapters, or trained biases.
    """
    if not is_representable(plan):
        what = "full" if plan.full else "a run without adapters, or with trained biases"
        raise ConfigError("method", what, "PEFT's format holds adapters and whole modules only")
    layers = info.by_name
    tensors: dict[str, Tensor] = {}
    for name, spec in plan.adapters.items():
        own = {part: state[f"{name}.{part}"] for part in PARTS_OF_KIND[spec.kind]}
        tensors |= _layer_tensors(layers[name], spec, own)
    adapted = {f"{name}.{part}" for name, spec in plan.adapters.items() for part in PARTS_OF_KIND[spec.kind]}
    tensors |= {PREFIX + name: tensor for name, tensor in state.items() if name not in adapted}
    first = next(iter(plan.adapters.values()))
    if first.kind == "vera":
        tensors |= dict(zip(PROJECTIONS, projection({}, first, torch.empty(0)), strict=True))
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return _config(plan, layers, info, task_type, base_name), tensors


def is_representable(plan: SlicePlan) -> bool:
    """Whether one of PEFT's formats can hold what this plan trains."""
    types = {PEFT_TYPES.get(s.kind) for s in plan.adapters.values()}
    dora = {s.kind == "dora" for s in plan.adapters.values()}
    return len(types) == len(dora) == 1 and None not in types and not plan.full and not plan.biases


def _layer_tensors(layer: LayerInfo, spec: AdapterSpec, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    keys = EMBEDDING_PARTS if layer.kind == "Embedding" else PARTS_OF_KIND[spec.kind]
    if layer.kind == "Conv2d":  # A may come as [G, r/G, I, kh, kw], a view of the stack
        a, b = own["lora_A"], own["lora_B"]
        own = {"lora_A": a.reshape(-1, *a.shape[-3:]), "lora_B": b.reshape(*b.shape[:2], 1, 1)}
    if spec.kind.startswith("ia3"):
        own = {"ia3_l": own["ia3_l"].reshape((1, -1) if spec.kind == "ia3_input" else (-1, 1))}
    return {f"{PREFIX}{layer.name}.{keys[part]}": tensor for part, tensor in own.items()}


def _config(
    plan: SlicePlan, layers: Mapping[str, LayerInfo], info: BaseInfo, task_type: str | None, base_name: str | None
) -> dict[str, Any]:
    kind = PEFT_TYPES[next(iter(plan.adapters.values())).kind]
    common = {
        "peft_type": kind,
        "task_type": _task_type(task_type, plan, info),
        "base_model_name_or_path": base_name,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "fan_in_fan_out": all(layers[name].kind == "Conv1D" for name in plan.adapters),
        "target_modules": _targets(plan, info),
        "modules_to_save": list(plan.modules) or None,
    }
    return common | {"LORA": _lora, "VERA": _vera, "IA3": _ia3}[kind](plan)


def _lora(plan: SlicePlan) -> dict[str, Any]:
    rslora, alphas = _alphas(plan.adapters)
    ranks = {name: spec.r for name, spec in plan.adapters.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": r,
        "lora_alpha": _whole(alpha),
        "use_rslora": rslora,
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": all(spec.kind == "dora" for spec in plan.adapters.values()),
        "lora_dropout": _commonest(s.dropout for s in plan.adapters.values()),
        "rank_pattern": {_exactly(n): x for n, x in ranks.items() if x != r},
        "alpha_pattern": {_exactly(n): _whole(x) for n, x in alphas.items() if x != alpha},
    }


def _vera(plan: SlicePlan) -> dict[str, Any]:
    spec = next(iter(plan.adapters.values()))
    return {
        "r": spec.r,
        "vera_dropout": spec.dropout,
        "d_initial": spec.d_initial,
        "bias": "none",
        "init_weights": True,
        "projection_prng_key": spec.projection[0],
        "save_projection": True,
    }


def _ia3(plan: SlicePlan) -> dict[str, Any]:
    inputs = sorted(name for name, spec in plan.adapters.items() if spec.kind == "ia3_input")
    return {"feedforward_modules": inputs, "init_ia3_weights": True}


def _alphas(adapters: Mapping[str, AdapterSpec]) -> tuple[bool, dict[str, float]]:
    """Return use_rslora, and the alpha of each layer that gives its scaling under that rule."""
    for rslora in (False, True):
        if all(
            math.isclose(s.scaling, alpha_rules.scaling(s.alpha, s.r, use_rslora=rslora), rel_tol=1e-12)
            for s in adapters.values()
        ):
            return rslora, {name: s.alpha for name, s in adapters.items()}
    return False, {name: s.scaling * s.r for name, s in adapters.items()}


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


def _exactly(name: str) -> str:
    """Return a pattern key that matches one name: PEFT matches keys as regular expressions against name ends."""
    return "^" + re.escape(name)


def _targets(plan: SlicePlan, info: BaseInfo) -> list[str] | str:
    """Return the adapted names in full, or as one expression where a name is also the end of another layer's name.

    PEFT matches the ends of names.
    """
    others = [layer.name for layer in info.layers if layer.name not in plan.adapters]
    if any(other.endswith("." + name) for other in others for name in plan.adapters):
        return "|".join(map(re.escape, sorted(plan.adapters)))
    return sorted(plan.adapters)


def _task_type(task_type: str | None, plan: SlicePlan, info: BaseInfo) -> str | None:
    """Return the task type; None where PEFT would then wrap a module of its own accord that this slice does not
    hold."""
    heads = OWN_HEADS.get(task_type or "", ())
    for layer in info.layers:
        parts = layer.name.split(".")
        for prefix in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            if prefix.endswith(heads) and not any(f"{prefix}.".startswith(f"{m}.") for m in plan.modules):
                return None
    return task_type


TENSOR_NAME = re.compile(
    r"(?P<layer>.+)\.(?:(?P<factor>lora_[AB])\.weight|lora_embedding_(?P<table>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|(?P<vector>vera_lambda_[bd]|ia3_l))"
)
# What a config may say besides the numbers read below. Everything not listed must be empty: null, false, 0, "", [] or
# {}.
FREE_KEYS = {
    "d_initial",
    "feedforward_modules",
    "init_ia3_weights",
    "init_weights",
    "projection_prng_key",
    "save_projection",
    "use_dora",
    "vera_dropout",
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Starts that change A and B only. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base as well, which no adapter file
# holds.
ADAPTER_ONLY_STARTS = (True, False, "gaussian", "orthogonal", "eva")


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
    """Return the adapter that a PEFT folder's config and tensors hold. where: names the folder's config file in errors.

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
        if found := TENSOR_NAME.fullmatch(name):
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
    if set(parts) != set(PARTS_OF_KIND[kind]):
        said = f"use_dora {bool(config.get('use_dora'))}, peft_type {config['peft_type']}"
        allowed = f"with {said} a layer needs {', '.join(PARTS_OF_KIND[kind])}; it has {', '.join(sorted(parts))}"
        raise ConfigError(where, name, allowed)
    if kind == "vera":
        return _vera_spec(name, parts, config, shared, where)
    if kind == "ia3":
        on_input = parts["ia3_l"].dim() == 2 and parts["ia3_l"].shape[0] == 1  # [1, I] there, [O, 1] on the output
        return AdapterSpec(r=1, scaling=1.0, alpha=1.0, kind="ia3_input" if on_input else "ia3")
    spec = _read_layer(name, parts, config, where)
    return replace(spec, kind=kind)


def _projection(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> tuple[int, int, int]:
    """Return (seed, I, O) of VeRA's shared pair. Raises `ConfigError` unless the file holds it as this version draws
    it."""
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
    return AdapterSpec(r=r, scaling=1.0, alpha=1.0, dropout=dropout, kind="vera", d_initial=initial, projection=shared)


def _check_supported(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") not in PEFT_TYPES.values():
        raise ConfigError(
            f"{where}:peft_type", config.get("peft_type"), f"allowed: {', '.join(sorted({*PEFT_TYPES.values()}))}"
        )
    for key, value in config.items():
        if key == "init_lora_weights":
            if value is not None and value not in ADAPTER_ONLY_STARTS:
                allowed = f"allowed: {', '.join(map(str, ADAPTER_ONLY_STARTS))}; others change the base's weights too"
                raise ConfigError(f"{where}:{key}", value, allowed)
        elif key == "bias":
            if value not in (None, "none"):
                raise ConfigError(f"{where}:{key}", value, "allowed: none")
        elif key not in FREE_KEYS and value not in (None, False, 0, "", [], {}):
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
    scaling = alpha_rules.scaling(alpha, int(r), use_rslora=bool(config.get("use_rslora")))
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
