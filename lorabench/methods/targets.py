"""Which layers of a base a method targets, and which modules train whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lorabench.config.contracts.model import ADAPTABLE, BaseInfo, LayerInfo, is_inside
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


def match_layers(base: BaseInfo, target: Any, blocks: Sequence[int] | None, modules: Sequence[str]) -> list[LayerInfo]:
    """Return the layers to adapt, in the base's order.

    target: a list of name suffixes; `all-linear` (every Linear and Conv1D but the output embedding); portable words
    joined by `+`; else a regex for the whole name. A list and a regex follow PEFT's rules.
    blocks: indices to keep (the first number in a name); None: all.
    modules: train whole, so layers inside are left out.
    Raises `ConfigError` for a target that matches nothing, naming what exists, and for a layer that cannot be adapted.
    """
    candidates = [x for x in base.layers if not is_inside(x.name, modules)]
    if isinstance(target, list):
        matched = _match_suffixes(candidates, target)
    else:
        matched = _match_text(candidates, base, target)
    for layer in matched:
        if layer.kind not in ADAPTABLE:
            raise ConfigError(KEY, target, f"layers of kind {', '.join(ADAPTABLE)}; {layer.name} is {layer.kind}")
    return matched if blocks is None else _keep_blocks(matched, blocks)


def _match_suffixes(layers: list[LayerInfo], target: list[Any]) -> list[LayerInfo]:
    matched = set()
    for suffix in target:
        names = {x.name for x in layers if x.name == suffix or x.name.endswith(f".{suffix}")}
        if not names:
            raise _unmatched_error(layers, target, suffix)
        matched |= names
    return [x for x in layers if x.name in matched]


def _match_text(layers: list[LayerInfo], base: BaseInfo, target: str) -> list[LayerInfo]:
    if target.lower() == ALL_LINEAR:
        matched = [x for x in layers if x.kind in ("Linear", "Conv1D") and x.name not in base.output]
    elif all(word in PORTABLE for word in target.split("+")):
        return _match_words(layers, target)
    else:
        matched = [x for x in layers if re.fullmatch(target, x.name)]
    if not matched:
        raise _unmatched_error(layers, target, target)
    return matched


def _match_words(layers: list[LayerInfo], target: str) -> list[LayerInfo]:
    matched: set[str] = set()
    for word in target.split("+"):
        patterns = [p for part in _UNIONS.get(word, (word,)) for p in WORDS[part]]
        suffix = re.compile(rf"(?:.*\.)?(?:{'|'.join(patterns)})")
        names = {x.name for x in layers if x.kind in ADAPTABLE and suffix.fullmatch(x.name)}
        if not names:
            raise _unmatched_error(layers, target, word)
        matched |= names
    return [x for x in layers if x.name in matched]


def _keep_blocks(layers: list[LayerInfo], blocks: Sequence[int]) -> list[LayerInfo]:
    numbers = {x.name: int(m.group(1)) for x in layers if (m := re.search(r"(?:^|\.)(\d+)\.", x.name))}
    missing = sorted(set(blocks) - set(numbers.values()))
    if missing:
        present = sorted(set(numbers.values()))
        span = f"{present[0]} to {present[-1]}" if present else "none"
        allowed = f"indices of blocks that hold targeted layers ({span}); not {missing}"
        raise ConfigError("method.layers", list(blocks), allowed)
    return [x for x in layers if numbers.get(x.name) in blocks]


def _unmatched_error(layers: list[LayerInfo], target: Any, part: str) -> ConfigError:
    names = suffixes(layers)
    allowed = f"{part!r} matches no layer of this base; names that exist: {', '.join(names)}"
    if target in names:  # the common slip: a suffix as a string, which PEFT too takes for a regex
        allowed += f". A string is a regex for the whole name; a list means suffixes: [{target}]"
    return ConfigError(KEY, target, allowed)


def suffixes(layers: Iterable[LayerInfo]) -> list[str]:
    """Return the shortest suffixes that tell the kinds of adaptable layers apart: `query`, but `output.dense`."""
    with_parent: dict[str, dict[str, None]] = {}  # a name's last part -> that with its parent's name
    for layer in layers:
        if layer.kind in ADAPTABLE:
            *above, last = layer.name.split(".")
            parents = [part for part in above if not part.isdigit()]
            with_parent.setdefault(last, {})[".".join([*parents[-1:], last])] = None
    return [
        name
        for last, longer in with_parent.items()
        for name in (longer if len(longer) > 1 or last.isdigit() else [last])
    ]


def targets_text(target: Any) -> str:
    """Return a target as tables show it, a list joined by `+`."""
    return target if isinstance(target, str) else "+".join(target)


def check_targets(key: str, target: Any, blocks: list[int] | None, *, field: str = "target_modules") -> None:
    """Raise `ConfigError` unless settings can name layers (a string, a list of strings) and blocks (indices, None).

    key: the section's name. field: the setting's.
    """
    names = target if isinstance(target, list) else [target]
    if not names or not all(isinstance(x, str) and x for x in names):
        raise ConfigError(f"{key}.{field}", target, "a non-empty list of names, or a string")
    check_regex(f"{key}.{field}", target)
    if blocks == []:
        raise ConfigError(f"{key}.layers", [], "indices of blocks, or null for all")


def check_regex(key: str, pattern: Any) -> None:
    """Raise `ConfigError` for a string that is no regular expression. key: the setting's dotted name."""
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConfigError(key, pattern, f"a valid regular expression ({e})") from e


def whole_modules(base: BaseInfo, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the modules that train whole: the base's head, and those named (exactly or by suffix), outermost only.

    Raises `ConfigError` under method.modules_to_save for a name that matches nothing.
    """
    paths = dict.fromkeys(path for x in base.layers for path in _paths(x.name))
    modules = dict.fromkeys(base.head)
    for name in names or ():
        matched = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not matched:
            present = sorted({path.split(".")[-1] for path in paths if not path.split(".")[-1].isdigit()})
            allowed = f"{name!r} is no module of this base; there are: {', '.join(present)}"
            raise ConfigError("method.modules_to_save", list(names or ()), allowed)
        modules |= dict.fromkeys(matched)
    return tuple(m for m in modules if not any(m.startswith(f"{other}.") for other in modules))


def _paths(name: str) -> list[str]:
    """Return a layer's name and those of all modules around it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first key that is the name or a regex for its end, as PEFT reads rank_pattern."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
