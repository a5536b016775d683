"""A cell: one thing compared, of whatever rate and seed. Its id, and the settings that its runs have in common."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from lorabench.config.components import load_component
from lorabench.config.errors import ConfigError
from lorabench.config.settings import OptimizerConfig, TrainerConfig

VARIES_INSIDE = frozenset({"optimizer.lr", "seed", "role"})  # of the settings that may change a result
SELECTORS = {"model": "kind", "task": "kind", "method": "name"}  # which setting names a section's dataclass


def cell_id(label: Mapping[str, Any]) -> str:
    """Return a readable, stable id, such as `lora-r4-a2r-query+value`.

    label: method, r, alpha_rule and targets (None where there is none), and `extra`, the values of other axes.
    """
    parts = [str(label["method"]).lower()]
    for letter, key in (("r", "r"), ("a", "alpha_rule"), ("", "targets")):
        if label.get(key) is not None:
            parts.append(f"{letter}{label[key]}")
    parts += [f"{axis}={value}" for axis, value in sorted(label["extra"].items())]
    return "-".join(parts).replace(" ", "")


def cell_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that all runs of one cell share: what is in `run_id`, without rate, seed and role.

    config: a run's, as `RunConfig.to_dict` gives it and a record holds it. Keys are `section.field`. A setting that an
    older record lacks has its default. Nothing of a user's own Python file is run: its settings count as they stand.
    """
    settings: dict[str, Any] = {}
    for section, values in config.items():
        if not isinstance(values, Mapping):
            continue
        fields = _fields(section, values)
        known = {name: _default(f) for name, f in fields.items() if f.metadata.get("added")} | dict(values)
        for name, value in known.items():
            if name not in fields or fields[name].metadata.get("identity", True):
                settings[f"{section}.{name}"] = value
    return {key: value for key, value in settings.items() if key not in VARIES_INSIDE}


def canonical(value: Any) -> str:
    """Return a text that equal settings share: 16 and 16.0, a list and a tuple."""

    def plain(inner: Any) -> Any:
        if isinstance(inner, Mapping):
            return {str(key): plain(x) for key, x in inner.items()}
        if isinstance(inner, (list, tuple)):
            return [plain(x) for x in inner]
        return int(inner) if isinstance(inner, float) and inner.is_integer() else inner

    return json.dumps(plain(value), sort_keys=True, default=str)


def _fields(section: str, values: Mapping[str, Any]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a section's dataclass; none of one that is not ours."""
    name = values.get(SELECTORS.get(section, ""))
    return _fields_of(section, name if isinstance(name, str) else "")


@cache
def _fields_of(section: str, name: str) -> dict[str, dataclasses.Field[Any]]:
    found: Any = {"optimizer": OptimizerConfig, "trainer": TrainerConfig}.get(section)
    if section in SELECTORS and name != "local":
        try:
            found = load_component(section, name, None)
        except ConfigError:
            return {}  # a record of another tool or version
    return {f.name: f for f in dataclasses.fields(found)} if found else {}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default
