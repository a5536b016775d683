"""What a metric without a scale of its own is measured in: said by the task (`units`), never assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from lorabench.config.components import load_component
from lorabench.config.contracts.task import Task
from lorabench.config.errors import ConfigError
from lorabench.results import formatting
from lorabench.results.formatting import Metric

if TYPE_CHECKING:
    from lorabench.results.sweep import Sweep


def unit(sweep: Sweep, metric: str) -> str:
    """Return what a metric is measured in, "" where that is nothing: the loss of `planted` is a ratio.

    The manifest has it from the task. For an older manifest, and for runs without one, the tasks of the records say it,
    where they all say the same.
    """
    declared = sweep.manifest.get("units")
    if declared is not None:
        return str(declared.get(metric, ""))
    kinds = {str((r.config.get("task") or {}).get("kind")) for r in sweep.records.values()}
    found = {kind_units(kind).get(metric, "") for kind in kinds}
    return found.pop() if len(found) == 1 else ""


def primary_metric(sweep: Sweep, values: Iterable[float | None]) -> Metric:
    """The way to show the primary metric. values: those to be shown."""
    largest = max((abs(x) for x in values if x is not None), default=None)
    name, lower = sweep.metric, sweep.lower_is_better
    return formatting.metric(name, lower_is_better=lower, largest=largest, unit=unit(sweep, name))


def loss_axis(sweep: Sweep, split: str) -> str:
    """`validation loss (nats)`, in what the task measures its loss."""
    return formatting.in_unit(f"{split} loss", unit(sweep, "loss"))


def task_units(task: Mapping[str, Any] | None) -> Mapping[str, str]:
    """`units` of a record's task by its kind."""
    return kind_units(str((task or {}).get("kind")))


@cache
def kind_units(kind: str) -> Mapping[str, str]:
    """`units` of a kind of task, looked up once. A `local` task's file is not run for the sake of a report: none."""
    try:
        config = load_component("task", kind, None)
    except ConfigError:
        return {}
    assert issubclass(config, Task)
    return config.units
