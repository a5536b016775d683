"""The data that forgetting is measured on: `task.probe`, another task, encoded for a run's base.

A task of language modelling is scored by its loss, one of classification by the accuracy of a linear classifier on the
base's frozen features (`lorabench.training.evaluation.forgetting`).
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

CAUSAL_LM, CLASSIFICATION = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
METRICS = {CAUSAL_LM: "loss", CLASSIFICATION: "accuracy"}
MIN_TEST_EXAMPLES = 10


@dataclass(frozen=True)
class ProbeData:
    """A probe's examples for one base.

    key: a hash of all that a score depends on beside the weights. splits: at most `task.probe_examples` each.
    """

    key: str
    task: Task
    processor: Any
    metric: str  # loss (nats a token) or accuracy
    splits: dict[str, list[dict[str, Any]]]  # "test", and where there is a classifier to fit "train"
    lengths: dict[str, list[int]]


_probes: dict[str, ProbeData] = {}
_fingerprints: dict[str, str] = {}


def load_probe(run: RunConfig, head: HeadSpec) -> ProbeData | None:
    """Read and encode the probe of a run, once for each probe and base in a process. None where the run has none.

    head: what the run's own task asks of the base. Raises `ConfigError`, with keys under `task.probe`, for a fault of
    the probe's data, for a probe that is the run's own task, and for one that this base cannot be scored on.
    """
    task = run.task.probe
    if task is None:
        return None
    parts = [dataclasses.asdict(task), dataclasses.asdict(run.model), run.task.probe_examples, head.auto_class]
    key = digest(parts)
    if key not in _probes:
        try:
            _probes[key] = _read(key, run, task, head)
        except ConfigError as e:
            if not e.key.startswith("task.") or e.key.startswith("task.probe"):
                raise
            raise ConfigError(f"task.probe.{e.key.removeprefix('task.')}", e.value, e.allowed) from e
    return _probes[key]


def probe_fingerprint(run: RunConfig) -> str | None:
    """Return the fingerprint of the data of a run's probe; None where it has none."""
    task = run.task.probe
    if task is None:
        return None
    key = digest(dataclasses.asdict(task))
    if key not in _fingerprints:
        _fingerprints[key] = task.load().fingerprint
    return _fingerprints[key]


def _read(key: str, run: RunConfig, task: Task, head: HeadSpec) -> ProbeData:
    if task.data_source == run.task.data_source:
        raise ConfigError("task.probe", task.name, "another task than the one that is trained on")
    data = task.load()
    _fingerprints[digest(dataclasses.asdict(task))] = data.fingerprint
    asked = task.head(data).auto_class
    if asked not in METRICS:
        raise ConfigError("task.probe", task.name, "a task of language modelling or of text classification")
    if asked == CAUSAL_LM and head.auto_class != CAUSAL_LM:
        raise ConfigError(
            "task.probe", task.name, "a task of text classification: what trains on this task predicts no next tokens"
        )
    processor = run.model.processor()
    encoded = encode_cached(task, run.model, data, processor)
    needed = ("test",) if asked == CAUSAL_LM else ("train", "test")
    splits = {name: encoded.splits[name][: run.task.probe_examples] for name in needed}
    if asked == CLASSIFICATION and any("label" not in e for examples in splits.values() for e in examples):
        raise ConfigError("task.probe", task.name, "a task whose examples hold one label each")
    if len(splits["test"]) < MIN_TEST_EXAMPLES:
        raise ConfigError(
            "task.probe", task.name, f"at least {MIN_TEST_EXAMPLES} examples to test on; it has {len(splits['test'])}"
        )
    lengths = {name: encoded.lengths[name][: len(examples)] for name, examples in splits.items()}
    return ProbeData(key, task, processor, METRICS[asked], splits, lengths)
