"""What a setting is: a dataclass field with a range and a role."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, field
from typing import Any, Literal

from lorabench.config.errors import ConfigError

Role = Literal["identity", "varies", "fixed"]


class Section:
    """A section of the config: a frozen dataclass whose fields are settings."""

    def validate(self, key: str) -> None:
        """Raise `ConfigError` for settings that do not fit together. key: the section's name, such as `task`."""


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
    """Return a dataclass field that is a setting. Without a default it must be set.

    low, high: bounds that are allowed; above: one that is not. choices: the only values allowed.
    varies: may differ between the slices of one pack; everything else is part of the pack key.
    identity: part of `run_id`. added: the version that introduced the field; at its default it is left out of the hash,
    so that older records keep their `run_id`.
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "choices": tuple(choices) if choices else None,
        "varies": varies,
        "identity": identity,
        "added": added,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(section: Any, key: str) -> None:
    """Raise `ConfigError` for the first field outside its declared range. key: the section's dotted name, or empty."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if value is not None and f.metadata:
            _check_range(f, value, f"{key}.{f.name}" if key else f.name)


def _check_range(f: Field[Any], value: Any, key: str) -> None:
    bounds = f.metadata
    if bounds["choices"] and value not in bounds["choices"]:
        raise ConfigError(key, value, f"allowed: {', '.join(map(str, bounds['choices']))}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ConfigError(key, value, "must be a finite number")
    if bounds["low"] is not None and value < bounds["low"]:
        raise ConfigError(key, value, f"must be at least {bounds['low']:g}")
    if bounds["above"] is not None and value <= bounds["above"]:
        raise ConfigError(key, value, f"must be greater than {bounds['above']:g}")
    if bounds["high"] is not None and value > bounds["high"]:
        raise ConfigError(key, value, f"must be at most {bounds['high']:g}")


def field_dict(section: Any, *, role: Role) -> dict[str, Any]:
    """Return the fields of a dataclass that have a role. `fixed`: all that do not vary between slices.

    A field that holds a section of its own (a task's probe) becomes that section's fields of the same role.
    """
    out: dict[str, Any] = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if _has_role(f, value, role):
            out[f.name] = field_dict(value, role=role) if dataclasses.is_dataclass(value) else value
    return out


def _has_role(f: Field[Any], value: Any, role: Role) -> bool:
    if role == "identity":
        is_new_at_default = bool(f.metadata.get("added")) and value == _default(f)
        return f.metadata.get("identity", True) and not is_new_at_default
    varies: bool = f.metadata.get("varies", False)
    return varies if role == "varies" else not varies


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default
