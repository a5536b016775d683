"""From a composed config to one validated `RunConfig`, its `run_id` and its pack key.

The only module that knows OmegaConf. Methods, tasks and model families are found by file name (one dataclass
`Config`, one file, one YAML): `method.name`, `task.kind` and `model.kind` name a module of their package, or `local`
with `file=` a Python file of the user's own. Source of the rules: docs/architecture.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorabench.config.components import available, component
from lorabench.config.contracts.method import Method
from lorabench.config.contracts.model import Model
from lorabench.config.contracts.task import Task
from lorabench.config.errors import ConfigError
from lorabench.config.fields import check_ranges, field_dict
from lorabench.config.settings import (
    OptimizerConfig,
    ReportConfig,
    StudyConfig,
    SweepConfig,
    TrackerConfig,
    TrainerConfig,
)


@dataclass(frozen=True)
class RunConfig:
    """One run. `model`, `task` and `method` are the `Config` dataclasses of their own files."""

    model: Model
    task: Task
    method: Method
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    seed: int
    role: str

    SECTIONS = ("model", "task", "method", "optimizer", "trainer")

    def identity(self) -> dict[str, Any]:
        """The fields that make two runs the same run."""
        out: dict[str, Any] = {s: field_dict(getattr(self, s), role="identity") for s in self.SECTIONS}
        return out | {"seed": self.seed, "role": self.role}

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON of `identity()`."""
        return digest(self.identity())[:12]

    @property
    def pack_key(self) -> str:
        """Runs with equal keys can share one frozen base; fields declared `varies` are left out."""
        fixed = {s: field_dict(getattr(self, s), role="fixed") for s in self.SECTIONS}
        fixed["method"].pop("name", None)
        return digest(fixed | {"pack_group": self.method.pack_group or self.run_id, "role": self.role})[:12]

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {s: dataclasses.asdict(getattr(self, s)) for s in self.SECTIONS}
        return out | {"seed": self.seed, "role": self.role}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunConfig:
        """Rebuild a run from `to_dict()` (a record's `config`)."""
        return parse_run(
            OmegaConf.create({k: v for k, v in data.items() if k != "role"}), role=data.get("role", "tune")
        )


@dataclass(frozen=True)
class Settings:
    """Everything of a config that is not the run itself."""

    sweep: SweepConfig
    report: ReportConfig
    tracker: TrackerConfig
    study: StudyConfig


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON (sorted keys, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse(cfg: DictConfig) -> tuple[RunConfig, Settings]:
    """Validate a composed config. Raises `ConfigError` with the dotted key, the value and what is allowed."""
    known = {*RunConfig.SECTIONS, "seed", "sweep", "report", "tracker", "study"}
    for key in cfg:
        if key not in known:
            hint = "; an experiment's file starts with `# @package _global_`" if key == "experiment" else ""
            raise ConfigError(str(key), cfg.get(key), f"unknown key; allowed: {', '.join(sorted(known))}{hint}")
    settings = Settings(
        sweep=_section(SweepConfig, cfg, "sweep"),
        report=_section(ReportConfig, cfg, "report"),
        tracker=_section(TrackerConfig, cfg, "tracker"),
        study=_section(StudyConfig, cfg, "study"),
    )
    return parse_run(cfg, role=settings.sweep.role), settings


def parse_run(cfg: DictConfig, *, role: str) -> RunConfig:
    """The run of a composed config; other top-level keys are ignored here."""
    model = _section(component("model", _name(cfg, "model", "kind"), _file(cfg, "model")), cfg, "model")
    task = _probed(_section(component("task", _name(cfg, "task", "kind"), _file(cfg, "task")), cfg, "task"))
    method = _section(component("method", _name(cfg, "method", "name"), None), cfg, "method")
    run = RunConfig(
        model=model, task=task, method=method, optimizer=_section(OptimizerConfig, cfg, "optimizer"),
        trainer=_section(TrainerConfig, cfg, "trainer"), seed=_seed(cfg), role=role,
    )  # fmt: skip
    if run.trainer.max_steps is None and run.trainer.max_epochs is None:
        raise ConfigError("trainer.max_epochs", None, "set trainer.max_epochs or trainer.max_steps")
    return run


PROBE = "the settings of another task; task@task.probe=<name> takes those of conf/task/<name>.yaml"


def _probed(task: Task) -> Task:
    """The task with its probe, so far a mapping, as the `Config` of that kind; errors have keys under `task.probe`."""
    asked: Any = task.probe
    if asked is None:
        return task
    if not isinstance(asked, Mapping):
        raise ConfigError("task.probe", asked, PROBE)
    cfg = OmegaConf.create({"task": {"probe": dict(asked)}})
    try:
        kind = component("task", _name(cfg, "task.probe", "kind"), _file(cfg, "task.probe"))
    except ConfigError as e:
        raise ConfigError(f"task.probe.{e.key.rpartition('.')[2]}", e.value, e.allowed) from e
    probe: Task = _section(kind, cfg, "task.probe")
    if probe.probe is not None:
        raise ConfigError("task.probe.probe", "(a task)", "null: a probe has none of its own")
    return task.replace(probe=probe)


def _seed(cfg: DictConfig) -> int:
    seed = OmegaConf.select(cfg, "seed", default=0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ConfigError("seed", seed, "a whole number from 0 to 2147483647")
    return int(seed)


def _section(cls: type, cfg: DictConfig, key: str) -> Any:
    """One section through its dataclass: unknown keys, types, ranges, then the dataclass's own `validate`."""
    node = OmegaConf.select(cfg, key)
    if node is None:
        node = {}
    if not isinstance(node, (DictConfig, Mapping)):
        raise ConfigError(key, node, "a mapping of settings")
    try:
        plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
        merged = OmegaConf.merge(_schema(cls), plain)
        section: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as e:
        raise _translate(e, cls, key, cfg) from e
    check_ranges(section, key)
    if hasattr(section, "validate"):
        section.validate(key)
    return section


@cache
def _schema(cls: type) -> Any:
    """A dataclass as OmegaConf sees it, made once: `merge` copies it, and making it is half of what parsing a run takes."""
    return OmegaConf.structured(cls)


def _translate(e: OmegaConfBaseException, cls: type, key: str, cfg: DictConfig) -> ConfigError:
    inner = e.full_key or ""
    dotted = inner if inner.startswith(key) else f"{key}.{inner}" if inner else key
    value = OmegaConf.select(cfg, dotted, default=None, throw_on_missing=False, throw_on_resolution_failure=False)
    names = [f.name for f in dataclasses.fields(cls)]
    if type(e).__name__ == "ConfigKeyError":
        return ConfigError(dotted, value, f"unknown key; allowed: {', '.join(names)}")
    if type(e).__name__ in ("MissingMandatoryValue", "InterpolationToMissingValueError"):
        name = str(e).splitlines()[0].rpartition(": ")[2]  # the one that is missing, not one made of it
        dotted = name if name.startswith(f"{key}.") else f"{key}.{name}"
        told = {f.name: f.metadata.get("help") for f in dataclasses.fields(cls)}.get(dotted.rpartition(".")[2])
        return ConfigError(dotted, "???", f"must be set{f': {told}' if told else ''}")
    return ConfigError(dotted, value, str(e).splitlines()[0])


def _name(cfg: DictConfig, section: str, field: str) -> str:
    node = cfg.get(section)
    if node is not None and not isinstance(node, (DictConfig, Mapping)):
        raise ConfigError(section, node, "a mapping of settings")
    name = OmegaConf.select(cfg, f"{section}.{field}", default=None)
    if not isinstance(name, str):
        raise ConfigError(f"{section}.{field}", name, f"allowed: {', '.join(available(section.partition('.')[0]))}")
    return name


def _file(cfg: DictConfig, section: str) -> str | None:
    value = OmegaConf.select(cfg, f"{section}.file", default=None)
    return None if value is None else str(value)


@dataclass(frozen=True)
class Pack:
    """Runs that train together, slice k being run k."""

    id: str
    runs: tuple[RunConfig, ...]
    prune: bool = False  # whether rates that fall behind may leave before the end

    @property
    def run_ids(self) -> list[str]:
        return [r.run_id for r in self.runs]
