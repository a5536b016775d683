"""The data that forgetting is measured on: `task.probe`, another task, read and encoded for a run's base.

A task of language modelling is measured by its loss, one of classification by what a linear classifier makes of the
base's frozen features (`forgetting`). Read and encoded once a probe and base.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lorabench.config.contracts.model import HeadSpec
from lorabench.config.contracts.task import Task
from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig, digest
from lorabench.tasks.cache import encode_cached

LM, CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
METRICS = {LM: "loss", CLASSES: "accuracy"}
FEWEST = 10  # held-out examples that a number is made of


@dataclass(frozen=True)
class Probe:
    """key: of all that its numbers depend on beside the base in use. splits: at most `task.probe_examples` of each."""

    key: str
    task: Task
    processor: Any
    metric: str  # loss (nats a token) or accuracy
    splits: dict[str, list[dict[str, Any]]]  # "test", and where there is a classifier to fit "train"
    lengths: dict[str, list[int]]


_probes: dict[str, Probe] = {}
_fingerprints: dict[str, str] = {}


def of(run: RunConfig, head: HeadSpec) -> Probe | None:
    """The probe of a run whose own task asks for `head`; None where it has none.

    Raises `ConfigError`, with keys under `task.probe`, for a fault of its data, for the run's own task, and for a task
    that says nothing of this base.
    """
    task = run.task.probe
    if task is None:
        return None
    parts = [dataclasses.asdict(task), dataclasses.asdict(run.model), _most(run), head.auto_class]
    key = digest(parts)
    if key not in _probes:
        try:
            _probes[key] = _read(key, run, task, head)
        except ConfigError as e:
            if not e.key.startswith("task.") or e.key.startswith("task.probe"):
                raise
            raise ConfigError(f"task.probe.{e.key.removeprefix('task.')}", e.value, e.allowed) from e
    return _probes[key]


def fingerprint(run: RunConfig) -> str | None:
    """Of the data of a run's probe; None where it has none."""
    task = run.task.probe
    if task is None:
        return None
    key = digest(dataclasses.asdict(task))
    if key not in _fingerprints:
        _fingerprints[key] = task.load().fingerprint
    return _fingerprints[key]


def _most(run: RunConfig) -> int:
    return run.task.probe_examples


def _read(key: str, run: RunConfig, task: Any, head: HeadSpec) -> Probe:
    if task.data_source == run.task.data_source:
        raise ConfigError("task.probe", task.name, "another task than the one that is trained on")
    data = task.load()
    _fingerprints[digest(dataclasses.asdict(task))] = data.fingerprint
    wanted = task.head(data).auto_class
    if wanted not in METRICS:
        raise ConfigError("task.probe", task.name, "a task of language modelling or of text classification")
    if wanted == LM and head.auto_class != LM:
        raise ConfigError(
            "task.probe", task.name, "a task of text classification: what trains on this task predicts no next tokens"
        )
    processor = run.model.processor()
    encoded = encode_cached(task, run.model, data, processor)
    needed = ("test",) if wanted == LM else ("train", "test")
    splits = {name: encoded.splits[name][: _most(run)] for name in needed}
    if wanted == CLASSES and any("label" not in e for examples in splits.values() for e in examples):
        raise ConfigError("task.probe", task.name, "a task whose examples hold one label each")
    if len(splits["test"]) < FEWEST:
        raise ConfigError(
            "task.probe", task.name, f"at least {FEWEST} examples to test on; it has {len(splits['test'])}"
        )
    lengths = {name: encoded.lengths[name][: len(examples)] for name, examples in splits.items()}
    return Probe(key, task, processor, METRICS[wanted], splits, lengths)
