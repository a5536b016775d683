"""What a task inherits: defaults that are no settings, work units with and without tokens, files of the user's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabench.config.components import load_component
from lorabench.config.contracts.task import Task
from lorabench.config.errors import ConfigError
from lorabench.config.fields import field_dict
from lorabench.tasks.text_classification import Config as Classification
from lorabench.tasks.text_task import TextTask

HEAD = """
from dataclasses import dataclass
from lorabench.config.contracts.task import Task
from lorabench.tasks.text_task import TextTask

@dataclass(frozen=True)
"""
FIELDS = """
    file: str
    data: str
    kind: str = "local"
    name: str = "mine"
    metric: str = "accuracy"
"""
METHODS = "".join(
    f"    def {name}(self, *_): ...\n" for name in ("load", "head", "encode", "collate", "step", "metrics")
)


def make(tmp_path: Path, bases: str, body: str = FIELDS + METHODS) -> Any:
    path = tmp_path / "mine.py"
    path.write_text(f"{HEAD}class Config{bases}:{body}")
    return load_component("task", "local", str(path))(file=str(path), data="a.csv")  # type: ignore[call-arg]


@pytest.mark.parametrize("bases", ["", "(Task)", "(TextTask)"])
def test_defaults_are_no_settings(tmp_path: Path, bases: str) -> None:
    task = make(tmp_path, bases)
    assert list(field_dict(task, role="identity")) == ["file", "data", "kind", "name", "metric"]
    assert list(dataclasses.asdict(task)) == ["file", "data", "kind", "name", "metric"]
    assert (task.lower_is_better, task.metric_names, task.units) == (("loss",), ("accuracy", "loss"), {})
    assert (task.probe, task.probe_along, task.style_prompts, task.extra_metrics) == (None, False, 0, ())
    assert not (task.paired or task.has_replies or task.reads_text or task.is_taught)
    task.validate("task")


def test_a_field_of_a_defaults_name_is_a_setting(tmp_path: Path) -> None:
    task = make(tmp_path, "(TextTask)", f"{FIELDS}    max_length: int = 16\n{METHODS}")
    assert (task.max_length, task.longest) == (16, 16)
    assert field_dict(task, role="identity")["max_length"] == 16


def test_a_field_without_a_default_gets_none_from_the_contract(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_length"):
        make(tmp_path, "(TextTask)", f"\n    max_length: int\n{FIELDS}{METHODS}")


def test_a_class_that_inherits_nothing_reads_tokens(tmp_path: Path) -> None:
    assert isinstance(make(tmp_path, ""), TextTask)
    assert type(make(tmp_path, "")) is type(make(tmp_path, ""))


def test_missing_methods_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.file=.*: its Config must define step"):
        make(tmp_path, "(Task)", FIELDS + METHODS.replace("def step", "def other"))


def test_work_units_of_tokens() -> None:
    task = Classification(file="a.csv", max_length=32)
    mask = torch.tensor([[1, 1, 0]])
    assert task.longest == 32
    assert task.work_units({"input_ids": [1, 2, 3]}) == 3
    assert task.token_mask({"attention_mask": mask}) is mask
    assert task.token_mask({"pixels": mask}) is None


def test_work_units_of_anything_else(tmp_path: Path) -> None:
    task: Task = make(tmp_path, "(Task)")
    assert (task.longest, task.work_units({"pixels": 0}), task.token_mask({})) == (None, 1, None)
    sized: Task = make(tmp_path, "(Task)", f"{FIELDS}    longest = 196\n{METHODS}")
    assert sized.work_units({"pixels": 0}) == 196
    assert "longest" not in dataclasses.asdict(sized)  # type: ignore[call-overload]
