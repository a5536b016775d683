"""Hydra's sweep grammar as Optuna's distributions, and a trial's values as overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from lorabench.config.errors import ConfigError

FLOAT_DIGITS = 4  # significant digits of a float that a trial tries: a rate of 0.0012345678 says no more than 0.001235


@dataclass(frozen=True)
class Space:
    """What a study searches. fixed: overrides of every trial. axes: key to distribution."""

    fixed: tuple[str, ...]
    axes: Mapping[str, Any]

    def overrides(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a trial's values as override texts, floats rounded inside their bounds."""
        return (*self.fixed, *(f"{key}={_text(params[key], axis)}" for key, axis in self.axes.items()))

    def corner(self) -> tuple[str, ...]:
        """Return the overrides of each axis's first value, which are checked before anything is tried."""
        first = {key: axis.low if hasattr(axis, "low") else axis.choices[0] for key, axis in self.axes.items()}
        return self.overrides(first)


def parse_space(params: Mapping[str, Any], arguments: Sequence[str]) -> Space:
    """Return the space of `interval(a,b)`, `range(a,b,step)` and `a,b,c`, with `tag(log,...)` or `tag(int,...)`.

    params: the sweeper's axes, over which the command line (arguments) wins.

    Raises `ConfigError` for a space without an axis and for bounds that a logarithm cannot have.
    """
    texts = [f"{key}={value}" for key, value in params.items()]
    overrides = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides([*texts, *arguments])}
    axes = {key: _distribution(key, o) for key, o in overrides.items() if o.is_sweep_override()}
    if not axes:
        example = "optimizer.lr='tag(log,interval(1e-4,1e-2))' method.r=1,4,16"
        raise ConfigError("hydra.sweeper.params", dict(params), f"something to search, such as {example}")
    fixed = tuple(str(o.input_line) for o in overrides.values() if not o.is_sweep_override())
    return Space(fixed, axes)


def _distribution(key: str, override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    tags = value.tags
    try:
        if isinstance(value, IntervalSweep):
            assert value.start is not None and value.end is not None
            if "int" in tags or (isinstance(value.start, int) and isinstance(value.end, int)):
                return IntDistribution(int(value.start), int(value.end), log="log" in tags)
            return FloatDistribution(value.start, value.end, log="log" in tags)
        if isinstance(value, RangeSweep):
            numbers = list(value.range())
            if isinstance(value.step, int) and isinstance(numbers[0], int):
                return IntDistribution(numbers[0], numbers[-1], log="log" in tags, step=abs(value.step))
            return FloatDistribution(numbers[0], numbers[-1], step=abs(float(value.step)))
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, IndexError) as e:
        raise ConfigError(key, str(override.input_line).split("=", 1)[-1], f"bounds that can be searched ({e})") from e


def _text(value: Any, axis: Any) -> str:
    if isinstance(value, float):
        value = min(max(float(f"{value:.{FLOAT_DIGITS}g}"), axis.low), axis.high)
    return str(value)
