"""A slice in PEFT's exchange format, written: a pure function to tensors and an `adapter_config` dict.

Source: peft 0.21 (`tuners/lora/layer.py`, `utils/save_and_load.py`). Reading is in `peft_read.py`.
Shapes are PEFT's throughout: A [r, I], B [O, r]; Conv2d of G groups A [r, I, kh, kw], B [O, r/G, 1, 1].
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorabench.adapters.draw import projection
from lorabench.base import BaseInfo, LayerInfo
from lorabench.schema import ConfigError
from lorabench.slice_plan import AdapterSpec, SlicePlan

PREFIX = "base_model.model."
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM", "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS", "AutoModel": "FEATURE_EXTRACTION",
}  # fmt: skip
# Modules PEFT wraps and expects in the file of its own accord: every module whose name ends so.
OWN_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
EMBEDDING_PARTS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
DORA_PARTS = {**PARTS, "magnitude": "lora_magnitude_vector"}
VERA_PARTS = {"vera_lambda_d": "vera_lambda_d", "vera_lambda_b": "vera_lambda_b"}
IA3_PARTS = {"ia3_l": "ia3_l"}
OF_KIND = {"lora": PARTS, "dora": DORA_PARTS, "vera": VERA_PARTS, "ia3": IA3_PARTS, "ia3_input": IA3_PARTS}
TYPES = {"lora": "LORA", "dora": "LORA", "vera": "VERA", "ia3": "IA3", "ia3_input": "IA3"}
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def to_peft(
    state: Mapping[str, Tensor],
    plan: SlicePlan,
    *,
    info: BaseInfo,
    task_type: str | None = None,
    base_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A slice as (adapter_config, tensors), ready for `adapter_config.json` and `adapter_model.safetensors`.

    state, plan: `Stack.exported`. Raises `ConfigError` where PEFT has no such thing (no adapters, trained biases).
    """
    if not representable(plan):
        what = "full" if plan.full else "a run without adapters, or with trained biases"
        raise ConfigError("method", what, "PEFT's format holds adapters and whole modules only")
    layers = info.by_name
    tensors: dict[str, Tensor] = {}
    for name, spec in plan.adapters.items():
        own = {part: state[f"{name}.{part}"] for part in OF_KIND[spec.kind]}
        tensors |= _layer_tensors(layers[name], spec, own)
    adapted = {f"{name}.{part}" for name, spec in plan.adapters.items() for part in OF_KIND[spec.kind]}
    tensors |= {PREFIX + name: tensor for name, tensor in state.items() if name not in adapted}
    first = next(iter(plan.adapters.values()))
    if first.kind == "vera":
        tensors |= dict(zip(PROJECTIONS, projection({}, first, torch.empty(0)), strict=True))
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return _config(plan, layers, info, task_type, base_name), tensors


def representable(plan: SlicePlan) -> bool:
    """Whether one of PEFT's formats can hold what this plan trains."""
    types = {TYPES.get(s.kind) for s in plan.adapters.values()}
    dora = {s.kind == "dora" for s in plan.adapters.values()}
    return len(types) == len(dora) == 1 and None not in types and not plan.full and not plan.biases


def _layer_tensors(layer: LayerInfo, spec: AdapterSpec, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    keys = EMBEDDING_PARTS if layer.kind == "Embedding" else OF_KIND[spec.kind]
    if layer.kind == "Conv2d":  # A may come as [G, r/G, I, kh, kw], a view of the stack
        a, b = own["lora_A"], own["lora_B"]
        own = {"lora_A": a.reshape(-1, *a.shape[-3:]), "lora_B": b.reshape(*b.shape[:2], 1, 1)}
    if spec.kind.startswith("ia3"):
        own = {"ia3_l": own["ia3_l"].reshape((1, -1) if spec.kind == "ia3_input" else (-1, 1))}
    return {f"{PREFIX}{layer.name}.{keys[part]}": tensor for part, tensor in own.items()}


def _config(
    plan: SlicePlan, layers: Mapping[str, LayerInfo], info: BaseInfo, task_type: str | None, base_name: str | None
) -> dict[str, Any]:
    kind = TYPES[next(iter(plan.adapters.values())).kind]
    common = {
        "peft_type": kind, "task_type": _task_type(task_type, plan, info),
        "base_model_name_or_path": base_name, "revision": None, "auto_mapping": None, "inference_mode": True,
        "fan_in_fan_out": all(layers[name].kind == "Conv1D" for name in plan.adapters),
        "target_modules": _targets(plan, info), "modules_to_save": list(plan.modules) or None,
    }  # fmt: skip
    return common | {"LORA": _lora, "VERA": _vera, "IA3": _ia3}[kind](plan)


def _lora(plan: SlicePlan) -> dict[str, Any]:
    rslora, alphas = _alphas(plan.adapters)
    ranks = {name: spec.r for name, spec in plan.adapters.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": r, "lora_alpha": _whole(alpha), "use_rslora": rslora, "bias": "none", "init_lora_weights": True,
        "use_dora": all(spec.kind == "dora" for spec in plan.adapters.values()),
        "lora_dropout": _commonest(s.dropout for s in plan.adapters.values()),
        "rank_pattern": {_exactly(n): x for n, x in ranks.items() if x != r},
        "alpha_pattern": {_exactly(n): _whole(x) for n, x in alphas.items() if x != alpha},
    }  # fmt: skip


def _vera(plan: SlicePlan) -> dict[str, Any]:
    spec = next(iter(plan.adapters.values()))
    return {
        "r": spec.r, "vera_dropout": spec.dropout, "d_initial": spec.d_initial, "bias": "none", "init_weights": True,
        "projection_prng_key": spec.projection[0], "save_projection": True,
    }  # fmt: skip


def _ia3(plan: SlicePlan) -> dict[str, Any]:
    inputs = sorted(name for name, spec in plan.adapters.items() if spec.kind == "ia3_input")
    return {"feedforward_modules": inputs, "init_ia3_weights": True}


def _alphas(adapters: Mapping[str, AdapterSpec]) -> tuple[bool, dict[str, float]]:
    """use_rslora, and the alpha of each layer that gives its scaling under that rule."""
    for rslora in (False, True):
        if all(math.isclose(s.scaling, scaling_of(s.alpha, s.r, rslora), rel_tol=1e-12) for s in adapters.values()):
            return rslora, {name: s.alpha for name, s in adapters.items()}
    return False, {name: s.scaling * s.r for name, s in adapters.items()}


def scaling_of(alpha: float, r: int, rslora: bool) -> float:
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
        for prefix in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            if prefix.endswith(heads) and not any(f"{prefix}.".startswith(f"{m}.") for m in plan.modules):
                return None
    return task_type
