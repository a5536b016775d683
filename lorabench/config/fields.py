"""The smallest layer: what a setting is, and what an error about one says. No torch, no Hydra."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, field
from typing import Any

from lorabench.config.errors import ConfigError


def knob(
    default: Any = MISSING,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[Any] | None = None,
    varies: bool = False,
    identity: bool = True,
    added: str | None = None,
) -> Any:
    """A dataclass field with its range and its role.

    varies: may differ between the slices of one pack (everything else is part of the pack key).
    identity: part of `run_id`. added: the version that introduced the field; at its default it is
    left out of the hash, so that older records keep their `run_id`.
    """
    meta = {
        "help": help, "low": low, "high": high, "above": above, "choices": tuple(choices) if choices else None,
        "varies": varies, "identity": identity, "added": added,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    if default is MISSING:
        return field(metadata=meta)
    return field(default=default, metadata=meta)


def check_ranges(section: Any, prefix: str) -> None:
    """Raise `ConfigError` for the first field of a dataclass that lies outside its declared range."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if value is None or not f.metadata:
            continue
        _check_one(f, value, f"{prefix}.{f.name}" if prefix else f.name)


def _check_one(f: Field[Any], value: Any, key: str) -> None:
    meta = f.metadata
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(key, value, f"allowed: {', '.join(map(str, meta['choices']))}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ConfigError(key, value, "must be a finite number")
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(key, value, f"must be at least {meta['low']:g}")
    if meta["above"] is not None and value <= meta["above"]:
        raise ConfigError(key, value, f"must be greater than {meta['above']:g}")
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(key, value, f"must be at most {meta['high']:g}")


def field_dict(section: Any, *, role: str) -> dict[str, Any]:
    """Fields of a dataclass by role: `identity`, `varies` or `fixed` (everything that is not `varies`).

    A field that holds a section of its own (a task's probe) is that section's fields, by the same role.
    """
    out: dict[str, Any] = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        varies, identity = f.metadata.get("varies", False), f.metadata.get("identity", True)
        if role == "identity":
            if not identity or (f.metadata.get("added") and value == _default(f)):
                continue
        elif role == "varies" and not varies or role == "fixed" and varies:
            continue
        out[f.name] = field_dict(value, role=role) if dataclasses.is_dataclass(value) else value
    return out


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default
