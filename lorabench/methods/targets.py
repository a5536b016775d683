"""Which layers of a base a method means: suffixes, a regex, portable words, `all-linear`; and whole modules by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lorabench.config.contracts.model import ADAPTABLE, BaseInfo, LayerInfo
from lorabench.config.errors import ConfigError

KEY = "method.target_modules"
ALL_LINEAR = "all-linear"

# What a projection is called: BERT, RoBERTa, ELECTRA | DeBERTa | DistilBERT | Llama, Qwen, OPT, Whisper, ViT | T5 |
# diffusers | GPT-2, GPT-NeoX, Falcon, Phi-3, ModernBERT (fused). A suffix is anchored at a dot.
_OF = r"(?:SelfAttention|EncDecAttention)\."
WORDS: dict[str, tuple[str, ...]] = {
    "q": ("query", "query_proj", "q_lin", "q_proj", _OF + "q", "to_q"),
    "k": ("key", "key_proj", "k_lin", "k_proj", _OF + "k", "to_k"),
    "v": ("value", "value_proj", "v_lin", "v_proj", _OF + "v", "to_v"),
    "o": (
        r"attention\.output\.dense", "out_lin", "o(?:ut)?_proj", _OF + "o", r"to_out\.0",
        r"(?:attn|crossattention)\.c_proj", r"(?:self_)?attention\.dense", r"attn\.Wo",
    ),
    "fused": (r"(?:attn|crossattention)\.(?:c|q)_attn", "query_key_value", "qkv_proj", r"attn\.Wqkv", r"attn\.qkv"),
    "mlp": (
        r"intermediate\.dense", r"(?<!attention\.)output\.dense", r"ffn\.lin[12]", r"mlp\.c_(?:fc|proj)", "fc[12]",
        "(?:gate|up|down|gate_up)_proj", r"DenseReluDense\.w[io](?:_[01])?", "dense_h_to_4h", "dense_4h_to_h",
        r"mlp\.W[io]", r"ff\.net\.(?:0\.proj|2)",
    ),
    "down": (
        r"(?<!attention\.)output\.dense", r"ffn\.lin2", r"mlp\.c_proj", "fc2", "down_proj", r"DenseReluDense\.wo",
        "dense_4h_to_h", r"mlp\.Wo", r"ff\.net\.2",
    ),
}  # fmt: skip
_UNIONS = {"attention": ("q", "k", "v", "o", "fused"), "all": ("q", "k", "v", "o", "fused", "mlp")}
PORTABLE = ("q", "k", "v", "o", "attention", "mlp", "down", "all")


def resolve(base: BaseInfo, target: Any, layers: Sequence[int] | None, modules: Sequence[str]) -> list[LayerInfo]:
    """Layers to adapt, in the base's order.

    target: a list of name suffixes; `all-linear` (every Linear and Conv1D but the output embedding); portable words
    joined by `+`; else a regex for the whole name. A list and a regex follow PEFT's rules. Layers inside `modules`, which
    train whole, are left out. layers: block indices to keep (the first number in a name).
    Raises `ConfigError` for a target that matches nothing, naming what exists, and for a layer that cannot be adapted.
    """
    open_ = [x for x in base.layers if not within(x.name, modules)]
    found = _by_list(open_, target) if isinstance(target, list) else _by_string(open_, base, target)
    for layer in found:
        if layer.kind not in ADAPTABLE:
            raise ConfigError(KEY, target, f"layers of kind {', '.join(ADAPTABLE)}; {layer.name} is {layer.kind}")
    return found if layers is None else _of_blocks(found, layers)


def within(name: str, modules: Iterable[str]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)


def _by_list(layers: list[LayerInfo], target: list[Any]) -> list[LayerInfo]:
    chosen = set()
    for suffix in target:
        names = {x.name for x in layers if x.name == suffix or x.name.endswith(f".{suffix}")}
        if not names:
            raise _unmatched(layers, target, suffix)
        chosen |= names
    return [x for x in layers if x.name in chosen]


def _by_string(layers: list[LayerInfo], base: BaseInfo, target: str) -> list[LayerInfo]:
    if target.lower() == ALL_LINEAR:
        found = [x for x in layers if x.kind in ("Linear", "Conv1D") and x.name not in base.output]
    elif all(word in PORTABLE for word in target.split("+")):
        return _by_words(layers, target)
    else:
        found = [x for x in layers if re.fullmatch(target, x.name)]
    if not found:
        raise _unmatched(layers, target, target)
    return found


def _by_words(layers: list[LayerInfo], target: str) -> list[LayerInfo]:
    chosen: set[str] = set()
    for word in target.split("+"):
        patterns = [p for part in _UNIONS.get(word, (word,)) for p in WORDS[part]]
        suffix = re.compile(rf"(?:.*\.)?(?:{'|'.join(patterns)})")
        names = {x.name for x in layers if x.kind in ADAPTABLE and suffix.fullmatch(x.name)}
        if not names:
            raise _unmatched(layers, target, word)
        chosen |= names
    return [x for x in layers if x.name in chosen]


def _of_blocks(found: list[LayerInfo], wanted: Sequence[int]) -> list[LayerInfo]:
    numbers = {x.name: int(m.group(1)) for x in found if (m := re.search(r"(?:^|\.)(\d+)\.", x.name))}
    missing = sorted(set(wanted) - set(numbers.values()))
    if missing:
        have = sorted(set(numbers.values()))
        span = f"{have[0]} to {have[-1]}" if have else "none"
        raise ConfigError(
            "method.layers", list(wanted), f"indices of blocks that hold targeted layers ({span}); not {missing}"
        )
    return [x for x in found if numbers.get(x.name) in wanted]


def _unmatched(layers: list[LayerInfo], target: Any, part: str) -> ConfigError:
    names = suffixes(layers)
    what = f"{part!r} matches no layer of this base; names that exist: {', '.join(names)}"
    if target in names:  # the common slip: a suffix as a string, which PEFT too takes for a regex
        what += f". A string is a regex for the whole name; a list means suffixes: [{target}]"
    return ConfigError(KEY, target, what)


def suffixes(layers: Iterable[LayerInfo]) -> list[str]:
    """The shortest suffixes that tell the kinds of adaptable layers apart: `query`, but `output.dense`."""
    parents: dict[str, dict[str, None]] = {}
    for layer in layers:
        if layer.kind in ADAPTABLE:
            *above, last = layer.name.split(".")
            named = [part for part in above if not part.isdigit()]
            parents.setdefault(last, {})[".".join([*named[-1:], last])] = None
    return [name for last, full in parents.items() for name in (full if len(full) > 1 or last.isdigit() else [last])]


def whole_modules(base: BaseInfo, names: Sequence[str] | None) -> tuple[str, ...]:
    """Modules that train whole: the base's head, and those named (exactly or by suffix), outermost only.

    Raises `ConfigError` under method.modules_to_save for a name that matches nothing.
    """
    paths = dict.fromkeys(path for x in base.layers for path in _prefixes(x.name))
    found = dict.fromkeys(base.head)
    for name in names or ():
        matched = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not matched:
            outer = sorted({path.split(".")[-1] for path in paths if not path.split(".")[-1].isdigit()})
            raise ConfigError(
                "method.modules_to_save",
                list(names or ()),
                f"{name!r} is no module of this base; there are: {', '.join(outer)}",
            )
        found |= dict.fromkeys(matched)
    return tuple(m for m in found if not any(m.startswith(other + ".") for other in found))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first key that is the name or a regex for its end."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
