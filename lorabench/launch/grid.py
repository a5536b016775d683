"""Grids of override values, and how a command line changes them.

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

Axis = tuple[str, ...]  # override texts, such as ("method.r=1", "method.r=4")
Bundle = list[Axis]  # axes that advance together; a lone axis is a bundle of one


@dataclass(frozen=True)
class Point:
    """One cell: its overrides, rates and seeds as override texts. axes: values of the cell's axes by key."""

    fixed: tuple[str, ...]
    rates: Axis
    seeds: Axis | None
    axes: Mapping[str, str]


def expand(grids: Mapping[str, Any], params: Mapping[str, Any], arguments: Sequence[str]) -> list[Point]:
    """Return all cells of a sweep. Raises `ConfigError` for a grid that is no mapping of axes.

    params: axes of every grid. arguments: the command line's overrides, which win over the config's axes.
    """
    named = grids or {"all": {}}
    for name, grid in named.items():
        if not isinstance(grid or {}, Mapping):
            raise ConfigError(f"hydra.sweeper.grids.{name}", grid, "a mapping of axes, key: values")
    tables = [_parse_grid(name, {**params, **(grid or {})}) for name, grid in named.items()]
    constants = _apply_arguments(tables, arguments)
    return [point for table in tables for point in _points(table, constants)]


def _apply_arguments(tables: Sequence[list[Bundle]], arguments: Sequence[str]) -> list[str]:
    """Replace axes by those of the command line, in place, and return its overrides that are no axis.

    An axis that some grids have is replaced in those; a new one goes to every grid.
    """
    constants: list[str] = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key, texts = override.get_key_element(), _axis_of(override)
        having = [table for table in tables if any(_key(axis[0]) == key for bundle in table for axis in bundle)]
        if having:
            for table in having:
                _replace_axis(table, key, texts)
        elif override.is_sweep_override():
            for table in tables:
                table.append([texts])
        else:
            constants.extend(texts)
    return constants


def _parse_grid(name: str, grid: Mapping[str, Any]) -> list[Bundle]:
    zipped = grid.get("zip")
    if not isinstance(zipped or {}, Mapping):
        raise ConfigError(f"hydra.sweeper.grids.{name}.zip", zipped, "a mapping of axes, key: values")
    bundles = [[_parse_axis(key, value)] for key, value in grid.items() if key != "zip"]
    if zipped:
        bundle = [_parse_axis(key, value) for key, value in zipped.items()]
        lengths = {_key(axis[0]): len(axis) for axis in bundle}
        if len(set(lengths.values())) != 1:
            raise ConfigError(f"hydra.sweeper.grids.{name}.zip", lengths, "axes of equal length")
        bundles.append(bundle)
    return bundles


def _parse_axis(key: str, value: Any) -> Axis:
    """Return an axis of a YAML list, or of a text in Hydra's sweep grammar."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ConfigError(key, [], "at least one value, as an axis of a sweep")
        return tuple(f"{key}={override_value(v, floats_keep_point=True)}" for v in value)
    text = value if isinstance(value, str) else override_value(value, floats_keep_point=True)
    return _axis_of(OverridesParser.create().parse_override(f"{key}={text}"))


def _axis_of(override: Override) -> Axis:
    key = override.get_key_element()
    if override.is_sweep_override():
        return tuple(f"{key}={v}" for v in override.sweep_string_iterator())
    return (override.input_line,) if override.input_line else (f"{key}={override.get_value_element_as_str()}",)


def _key(text: str) -> str:
    return text.split("=", 1)[0]


def _replace_axis(table: list[Bundle], key: str, texts: Axis) -> None:
    for i, bundle in enumerate(table):
        if any(_key(axis[0]) == key for axis in bundle):
            if len(bundle) > 1:
                allowed = "this axis is zipped with others here; change it in the experiment's file"
                raise ConfigError(key, ",".join(texts), allowed)
            table[i] = [texts]


def _points(table: Sequence[Bundle], constants: Sequence[str]) -> list[Point]:
    """Return the product of a grid's bundles. Rates and seeds are no axes of a cell unless zipped with one."""
    lone = {_key(bundle[0][0]): bundle[0] for bundle in table if len(bundle) == 1}
    rates = lone.get(RATE) or tuple(c for c in constants if _key(c) == RATE)[-1:]
    seeds = lone.get(SEED)
    if seeds is None:
        seeds = tuple(c for c in constants if _key(c) == SEED)[-1:] or None
    bundles = [bundle for bundle in table if not (len(bundle) == 1 and _key(bundle[0][0]) in (RATE, SEED))]
    fixed = [c for c in constants if _key(c) not in (RATE, SEED)]
    points = []
    for combination in product(*(tuple(zip(*bundle, strict=True)) for bundle in bundles)):
        texts = [text for from_bundle in combination for text in from_bundle]
        chosen = [t for t in texts if _key(t) not in (RATE, SEED)]
        zipped_rates, zipped_seeds = (tuple(t for t in texts if _key(t) == key) for key in (RATE, SEED))
        axes = {_key(t): t.split("=", 1)[1] for t in chosen}
        points.append(Point((*fixed, *chosen), zipped_rates or rates, zipped_seeds or seeds, axes))
    return points
