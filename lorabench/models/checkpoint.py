"""What a checkpoint's tensors mean for a model: which the model lacks, which nobody takes, and what may be new."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lorabench.config.contracts.model import HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.models.folder import SOURCE_KEY

CLASSIFIER_HEADS = ("classifier", "score")  # names of a classifier's last layer, which always trains, as in PEFT
POOLERS = ("pooler",)  # parts of a body that only feed a classifier: masked language models are saved without them
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Loading:
    """Names of tensors, as a model's loading reports them.

    missing: the files lack them. mismatched: they have another shape. unexpected: no part of the model takes them.
    """

    missing: frozenset[str]
    mismatched: frozenset[str]
    unexpected: frozenset[str]

    @property
    def untrained(self) -> set[str]:
        """Parameters that no pretrained weights were found for."""
        return set(self.missing | self.mismatched)


def check_tensors(model: Any, loading: Loading) -> tuple[str, ...]:
    """Return what is left out of the files, in words. Raises `ConfigError` where the files do not fill the body.

    New may be what lies outside the body (a head) and a pooler that is wholly absent. Left out may be tensors of parts
    that the model does not have (another task's head) and of its buffers.
    """
    prefix, body = _body(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    inside = {name for name in parameters if name.startswith(prefix)} if prefix else parameters - _heads(model)
    lacking = inside & loading.untrained
    if inside and lacking == inside:
        reason = f"its weight files hold none of the weights of {type(model).__name__}"
        raise ConfigError(SOURCE_KEY, model.name_or_path, reason)
    poolers = {n for n in inside if n.removeprefix(prefix).startswith(tuple(f"{p}." for p in POOLERS))}
    if poolers <= loading.missing:
        lacking -= poolers
    parts = {name for name, _ in body.named_children()} | {name for name, _ in body.named_parameters(recurse=False)}
    buffers = {name for name, _ in model.named_buffers()}
    own = {n for n in loading.unexpected if n.removeprefix(prefix).split(".")[0] in parts} - buffers
    problems = [
        _listed("lack", lacking & loading.missing),
        _listed("hold in another shape", lacking & loading.mismatched),
        _listed("hold beyond what config.json describes", own),
    ]
    if any(problems):
        reason = f"only a new head may be missing; for {type(model).__name__} its weight files " + "; ".join(
            filter(None, problems)
        )
        raise ConfigError(SOURCE_KEY, model.name_or_path, reason + "; save the model again with its own config.json")
    others = sorted({n.split(".")[0] for n in loading.unexpected - buffers - own})
    return (f"left out of its files, as parts this task does not use: {', '.join(others)}",) if others else ()


def _listed(what: str, names: Collection[str]) -> str:
    """Return `lack 7: a, b, …`; empty for no names."""
    shown = ", ".join(sorted(names)[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{what} {len(names)}: {shown}" if names else ""


def _body(model: Any) -> tuple[str, Any]:
    """Return the prefix of a body's names, and the body. A model without a head is its own body: no prefix."""
    name = model.base_model_prefix
    body = getattr(model, name, None) if name else None
    return (f"{name}.", body) if body is not None else ("", model)


def _heads(model: Any) -> set[str]:
    """Return the parameters of a head where the model names no body: a classifier's, never an output embedding's."""
    heads = tuple(f"{name}." for name, _ in model.named_children() if name in CLASSIFIER_HEADS)
    return {name for name, _ in model.named_parameters() if name.startswith(heads)} if heads else set()


def label_layers(model: Any, head: HeadSpec) -> dict[str, Any]:
    """Return the layers outside the body that give one number a label, by name."""
    from torch import nn

    prefix, _ = _body(model)
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and head.label_names
        and layer.out_features == len(head.label_names)
        and (name.split(".")[0] in CLASSIFIER_HEADS or prefix and not name.startswith(prefix))
    }


def has_labels(id2label: Any, head: HeadSpec) -> bool:
    """Whether a configuration's labels are the task's: the same names in the same order, upper or lower case."""
    own = [str(name).casefold() for _, name in sorted((id2label or {}).items(), key=lambda item: int(item[0]))]
    return bool(head.label_names) and own == [name.casefold() for name in head.label_names]


def without_foreign_labels(model: Any, loading: Loading, id2label: Any, head: HeadSpec) -> Loading:
    """Return the loading with a head of other labels counted as missing.

    Its rows would be read as classes they were not trained for. id2label: the labels in the files.
    """
    if has_labels(id2label, head):
        return loading
    layers = label_layers(model, head)
    names = {f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters(recurse=False)}
    return Loading(loading.missing | names, loading.mismatched - names, loading.unexpected)


def head_note(model: Any, loading: Loading, head: HeadSpec) -> tuple[str, ...]:
    """Return whether the head is the files' own or new, in words; empty for a task without labels."""
    layers = label_layers(model, head)
    if not layers:
        return ()
    new = [name for name in layers if f"{name}.weight" in loading.untrained]
    if new:
        return (f"new head: {', '.join(new)}, drawn at random",)
    return (f"kept head: {', '.join(layers)}, whose labels are the task's",)
