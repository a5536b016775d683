"""Metrics as pure functions of numpy arrays over all examples, and a user's own from a file.

Shape letters: N examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from lorabench.config.components import import_file
from lorabench.config.contracts.task import Task
from lorabench.config.directions import is_lower_better
from lorabench.config.errors import ConfigError

Rows = Mapping[str, np.ndarray]
Metric = Callable[[dict[str, np.ndarray]], float]
LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class ExtensibleMetrics(Task):
    """A task with metrics of its own, to which `extra_metrics` adds the user's."""

    own_metrics: ClassVar[tuple[str, ...]]

    def validate(self, key: str) -> None:
        super().validate(key)
        check_metrics(self.metric, self.own_metrics, self.extra_metrics, key)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*self.own_metrics, *(name for name, _ in self._user_metrics()))

    @property
    def lower_is_better(self) -> tuple[str, ...]:
        users = (
            name
            for name, function in self._user_metrics()
            if getattr(function, "lower_is_better", is_lower_better(name) is True)
        )
        return (*LOWER_IS_BETTER, *users)

    def _user_metrics(self) -> list[tuple[str, Metric]]:
        return [load_metric(spec, "task.extra_metrics") for spec in self.extra_metrics]


def mean_loss(rows: Rows) -> float:
    """Return sum(loss_sum) / sum(weight), in float64."""
    return float(rows["loss_sum"].sum(dtype=np.float64) / rows["weight"].sum(dtype=np.float64))


def perplexity(loss: float) -> float:
    """Return exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def accuracy(label: np.ndarray, prediction: np.ndarray) -> float:
    """Return the share of equal entries of two [N] arrays."""
    return float(np.mean(label == prediction))


def confusion(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Count pairs of label (rows) and prediction (columns): [C, C] over the classes that occur in either."""
    classes, codes = np.unique(np.concatenate([label, prediction]), return_inverse=True)
    n = len(classes)
    labels, predictions = codes[: len(label)], codes[len(label) :]
    return np.bincount(labels * n + predictions, minlength=n * n).reshape(n, n)


def macro_f1(label: np.ndarray, prediction: np.ndarray) -> float:
    """Return the unweighted mean F1 over the classes that occur as a label or a prediction."""
    table = confusion(label, prediction)
    hits = np.diag(table)
    return float(np.mean(2 * hits / (table.sum(0) + table.sum(1))))


def mcc(label: np.ndarray, prediction: np.ndarray) -> float:
    """Return Matthews correlation for any number of classes (Gorodkin 2004, R_K); 0 where it is undefined."""
    table = confusion(label, prediction).astype(np.float64)
    predicted, true, n = table.sum(0), table.sum(1), table.sum()
    covariance = np.trace(table) * n - predicted @ true
    variances = (n**2 - predicted @ predicted) * (n**2 - true @ true)
    return float(covariance / math.sqrt(variances)) if variances > 0 else 0.0


def load_metric(spec: str, key: str) -> tuple[str, Metric]:
    """Load a user's own metric, `my_metrics.py:function`. Runs that file; returns the function's name and the function.

    The function takes the rows ({name: [N] array}) and returns a number. An attribute `lower_is_better = True` on it
    says that less is better. Raises `ConfigError`.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not file or not name.isidentifier():
        raise ConfigError(key, spec, "a Python file and a function in it, such as my_metrics.py:function")
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(key, spec, f"no such .py file: {file}")
    function = getattr(import_file(path, key), name, None)
    if not callable(function):
        raise ConfigError(key, spec, f"{file} defines no function named {name}")
    return name, function


def extra(specs: Sequence[str], rows: Rows, key: str) -> dict[str, float]:
    """Compute the user's own metrics of these rows. Raises `ConfigError` where one fails or returns no number."""
    out = {}
    for spec in specs:
        name, function = load_metric(spec, key)
        try:
            out[name] = float(function(dict(rows)))
        except Exception as e:
            raise ConfigError(key, spec, f"the function failed: {type(e).__name__}: {e}") from e
    return out


def check_metrics(metric: str, own: Sequence[str], specs: Sequence[str], key: str) -> None:
    """Raise `ConfigError` unless every spec loads and `metric` is one of the task's own or of the user's."""
    names = [load_metric(spec, f"{key}.extra_metrics")[0] for spec in specs]
    for name in names:
        if name in own or names.count(name) > 1:
            raise ConfigError(f"{key}.extra_metrics", name, "there is a metric of that name already")
    if metric not in (*own, *names):
        raise ConfigError(f"{key}.metric", metric, f"allowed: {', '.join((*own, *names))}")


def majority_baselines(counts: Mapping[str, int]) -> dict[str, float]:
    """Return accuracy, macro_f1 and mcc of always answering the commonest label. counts: examples by label.

    macro_f1 is over the labels that occur, as `macro_f1` has it; MCC of a constant answer is 0.
    """
    occurring = [n for n in counts.values() if n]
    if not occurring:
        return {}
    share = max(occurring) / sum(occurring)
    return {"accuracy": share, "macro_f1": 2 * share / (1 + share) / len(occurring), "mcc": 0.0}
