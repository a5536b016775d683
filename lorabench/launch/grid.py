"""Grids of override values, and how a command line changes them. Pure: override text in, override sets out.

A grid is a product of axes. An axis is a key with values in Hydra's sweep syntax (`1,4,16`, `range(1,5)`) or a YAML
list; `zip` holds axes that advance together. A sweep is the union of its grids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from lorabench.config.errors import ConfigError
from lorabench.config.overrides import override_value
from lorabench.launch.compose import RATE, SEED

Axis = tuple[str, ...]  # override texts, e.g. ("method.r=1", "method.r=4")


@dataclass(frozen=True)
class Point:
    """One cell's overrides, its rates and its seeds (override texts)."""

    fixed: tuple[str, ...]
    rates: Axis
    seeds: Axis | None
    axes: Mapping[str, str]  # key -> value of every axis of this cell


def expand(grids: Mapping[str, Any], params: Mapping[str, Any], arguments: Sequence[str]) -> list[Point]:
    """All cells of a sweep. arguments: the command line's overrides, which win over the config's axes."""
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    named = grids or {"all": {}}
    for name, grid in named.items():
        if not isinstance(grid or {}, Mapping):
            raise ConfigError(f"hydra.sweeper.grids.{name}", grid, "a mapping of axes, key: values")
    tables = {name: _axes(name, {**params, **(grid or {})}) for name, grid in named.items()}
    constants: list[str] = []
    for override in parsed:
        key, texts = override.get_key_element(), _texts(override)
        owners = [t for t in tables.values() if any(_key(x[0]) == key for links in t for x in links)]
        if owners:
            for table in owners:
                _replace(table, key, texts)
        elif override.is_sweep_override():
            for table in tables.values():
                table.append([texts])
        else:
            constants.extend(texts)
    return [p for table in tables.values() for p in _points(table, constants)]


def _axes(name: str, grid: Mapping[str, Any]) -> list[list[Axis]]:
    """Each entry is a bundle of axes that advance together; a lone axis is a bundle of one."""
    if not isinstance(grid.get("zip") or {}, Mapping):
        raise ConfigError(f"hydra.sweeper.grids.{name}.zip", grid["zip"], "a mapping of axes, key: values")
    bundles = [[_axis(key, value)] for key, value in grid.items() if key != "zip"]
    zipped = grid.get("zip")
    if zipped:
        bundle = [_axis(key, value) for key, value in zipped.items()]
        lengths = {_key(a[0]): len(a) for a in bundle}
        if len(set(lengths.values())) != 1:
            raise ConfigError(f"hydra.sweeper.grids.{name}.zip", lengths, "axes of equal length")
        bundles.append(bundle)
    return bundles


def _axis(key: str, value: Any) -> Axis:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ConfigError(key, [], "at least one value, as an axis of a sweep")
        return tuple(f"{key}={override_value(v, floats_keep_point=True)}" for v in value)
    text = value if isinstance(value, str) else override_value(value, floats_keep_point=True)
    return _texts(OverridesParser.create().parse_override(f"{key}={text}"))


def _texts(override: Override) -> Axis:
    key = override.get_key_element()
    if override.is_sweep_override():
        return tuple(f"{key}={v}" for v in override.sweep_string_iterator())
    return (override.input_line,) if override.input_line else (f"{key}={override.get_value_element_as_str()}",)


def _key(text: str) -> str:
    return text.split("=", 1)[0]


def _replace(table: list[list[Axis]], key: str, texts: Axis) -> None:
    for i, bundle in enumerate(table):
        if any(_key(a[0]) == key for a in bundle):
            if len(bundle) > 1:
                raise ConfigError(
                    key, ",".join(texts), "this axis is zipped with others here; change it in the experiment's file"
                )
            table[i] = [texts]


def _points(table: Sequence[list[Axis]], constants: Sequence[str]) -> list[Point]:
    single = {_key(b[0][0]): b[0] for b in table if len(b) == 1}
    rates, seeds = single.get(RATE, ()), single.get(SEED)
    if not rates:
        rates = tuple(c for c in constants if _key(c) == RATE)[-1:]
    if seeds is None:
        seeds = tuple(c for c in constants if _key(c) == SEED)[-1:] or None
    rest = [b for b in table if not (len(b) == 1 and _key(b[0][0]) in (RATE, SEED))]
    fixed = [c for c in constants if _key(c) not in (RATE, SEED)]
    points = []
    for combo in product(*(tuple(zip(*bundle, strict=True)) for bundle in rest)):
        texts = [text for own in combo for text in own]
        chosen = [t for t in texts if _key(t) not in (RATE, SEED)]
        rate, seed = (tuple(t for t in texts if _key(t) == key) for key in (RATE, SEED))  # zipped: the only ones here
        axes = {_key(t): t.split("=", 1)[1] for t in chosen}
        points.append(Point((*fixed, *chosen), rate or rates, seed or seeds, axes))
    return points
