"""From a composed config to one validated `RunConfig`, its `run_id` and its pack key.

Methods, tasks and models are found by file name: `method.name`, `task.kind` and `model.kind` name a module of their
package, or `local` with `file=` a Python file of the user's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorabench.config import overrides
from lorabench.config.components import component_names, load_component
from lorabench.config.contracts.method import Method
from lorabench.config.contracts.model import Model
from lorabench.config.contracts.task import Task
from lorabench.config.errors import ConfigError
from lorabench.config.fields import Section, check_ranges, field_dict
from lorabench.config.overrides import override_value
from lorabench.config.settings import (
    OptimizerConfig,
    ReportConfig,
    StudyConfig,
    SweepConfig,
    TrackerConfig,
    TrainerConfig,
)

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class RunConfig:
    """One run. `model`, `task` and `method` are the `Config` dataclasses of their own files."""

    model: Model
    task: Task
    method: Method
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    seed: int
    role: str  # tune or confirm

    SECTIONS = ("model", "task", "method", "optimizer", "trainer")

    def identity(self) -> dict[str, Any]:
        """Return the settings that make two runs the same run."""
        out: dict[str, Any] = {s: field_dict(getattr(self, s), role="identity") for s in self.SECTIONS}
        return out | {"seed": self.seed, "role": self.role}

    @cached_property
    def run_id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON of `identity()`."""
        return digest(self.identity())[:12]

    @cached_property
    def pack_key(self) -> str:
        """Hash of the settings that slices of one pack share: runs with equal keys can share one frozen base."""
        fixed = {s: field_dict(getattr(self, s), role="fixed") for s in self.SECTIONS}
        fixed["method"].pop("name", None)
        return digest(fixed | {"pack_group": self.method.pack_group or self.run_id, "role": self.role})[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, as a record's `config` holds them."""
        out: dict[str, Any] = {s: dataclasses.asdict(getattr(self, s)) for s in self.SECTIONS}
        return out | {"seed": self.seed, "role": self.role}

    def at(self, *, lr: float, seed: int) -> RunConfig:
        """Return this run at another rate and seed; all else is checked already. Raises `ConfigError`."""
        optimizer = dataclasses.replace(self.optimizer, lr=float(lr))
        check_ranges(optimizer, "optimizer")
        optimizer.validate("optimizer")
        return dataclasses.replace(self, optimizer=optimizer, seed=_check_seed(seed))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunConfig:
        """Return the run of what `to_dict` gave. Raises `ConfigError`."""
        cfg = OmegaConf.create({key: value for key, value in data.items() if key != "role"})
        return parse_run(cfg, role=data.get("role", "tune"))


@dataclass(frozen=True)
class Pack:
    """Runs that train together: slice k is run k."""

    id: str
    runs: tuple[RunConfig, ...]
    prune: bool = False  # whether rates that fall behind may leave before the end

    @property
    def run_ids(self) -> list[str]:
        return [run.run_id for run in self.runs]


@dataclass(frozen=True)
class Settings:
    """Everything of a config that is not the run itself."""

    sweep: SweepConfig
    report: ReportConfig
    tracker: TrackerConfig
    study: StudyConfig


def digest(value: Any) -> str:
    """Return the SHA-256 of canonical JSON (sorted keys, no spaces, no NaN) in hex digits."""
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
        sweep=_parse_section(SweepConfig, cfg, "sweep"),
        report=_parse_section(ReportConfig, cfg, "report"),
        tracker=_parse_section(TrackerConfig, cfg, "tracker"),
        study=_parse_section(StudyConfig, cfg, "study"),
    )
    return _follow(parse_run(cfg, role=settings.sweep.role), settings.study.selection), settings


def _follow(run: RunConfig, selection: str) -> RunConfig:
    """Return a run whose best step is by the study's selection metric unless `trainer.monitor` names another.

    The loss is the default, which is not written into the run, so that its `run_id` is that of older records.
    """
    monitor = run.trainer.monitor or selection
    found = None if monitor == selection == "loss" else monitor
    return dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, monitor=found))


def parse_run(cfg: DictConfig, *, role: str) -> RunConfig:
    """Return the run of a composed config; top-level keys that are not a run's are ignored. Raises `ConfigError`."""
    run = RunConfig(
        model=parse_component(cfg, "model"),
        task=_parse_probe(parse_component(cfg, "task")),
        method=parse_component(cfg, "method"),
        optimizer=_parse_section(OptimizerConfig, cfg, "optimizer"),
        trainer=_parse_section(TrainerConfig, cfg, "trainer"),
        seed=_parse_seed(cfg),
        role=role,
    )
    if run.trainer.max_steps is None and run.trainer.max_epochs is None:
        raise ConfigError("trainer.max_epochs", None, "set trainer.max_epochs or trainer.max_steps")
    return run


def parse_component(cfg: DictConfig, section: str) -> Any:
    """Return a model, task or method: the class that the section's selector names, with the section's settings.

    section: its dotted name, `task.probe` for a task's probe.
    """
    kind = section.partition(".")[0]
    if kind == "method":
        config_class = load_component(kind, _selector(cfg, section, "name"), None)
    else:
        config_class = load_component(kind, _selector(cfg, section, "kind"), _local_file(cfg, section))
    return _parse_section(config_class, cfg, section)


def _parse_probe(task: Task) -> Task:
    """Return the task with its probe, so far a mapping, as that task's own `Config`."""
    settings: Any = task.probe
    if settings is None:
        return task
    if not isinstance(settings, Mapping):
        allowed = "the settings of another task; task@task.probe=<name> takes those of conf/task/<name>.yaml"
        raise ConfigError("task.probe", settings, allowed)
    cfg = OmegaConf.create({"task": {"probe": dict(settings)}})
    try:
        probe: Task = parse_component(cfg, "task.probe")
    except ConfigError as e:
        if e.key.startswith("task.probe"):
            raise
        raise type(e)(f"task.probe.{e.key.rpartition('.')[2]}", e.value, e.allowed) from e
    if probe.probe is not None:
        raise ConfigError("task.probe.probe", "(a task)", "null: a probe has none of its own")
    return task.replace(probe=probe)


def _parse_seed(cfg: DictConfig) -> int:
    return _check_seed(OmegaConf.select(cfg, "seed", default=0))


def _check_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ConfigError("seed", seed, "a whole number from 0 to 2147483647")
    return int(seed)


def _parse_section(cls: type[AnySection], cfg: DictConfig, key: str) -> AnySection:
    """Return one section as its dataclass. Raises `ConfigError` for keys, types, ranges and `validate`."""
    node = OmegaConf.select(cfg, key)
    if node is None:
        node = {}
    if not isinstance(node, (DictConfig, Mapping)):
        raise ConfigError(key, node, "a mapping of settings")
    try:
        plain: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
        for name in _mappings(cls):  # type: ignore[arg-type]  # a class is hashable
            if name in plain:
                plain[name] = overrides.mapping(plain[name], f"{key}.{name}")
        schema = _schema(cls)  # type: ignore[arg-type]
        section: Any = OmegaConf.to_object(OmegaConf.merge(schema, plain))
    except OmegaConfBaseException as e:
        raise _config_error(e, cls, key, cfg) from e
    check_ranges(section, key)
    section.validate(key)
    return section


@cache
def _mappings(cls: type) -> tuple[str, ...]:
    """Return the settings whose value is a mapping of any keys, such as rank_pattern."""
    fields = dataclasses.fields(cls)
    return tuple(f.name for f in fields if isinstance(_default(f), dict))


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


@cache
def _schema(cls: type) -> Any:
    """Return a dataclass as OmegaConf sees it. It is cached, since it takes half of the time of parsing a run."""
    return OmegaConf.structured(cls)


def _config_error(e: OmegaConfBaseException, cls: type, key: str, cfg: DictConfig) -> ConfigError:
    """Return OmegaConf's error about a section as one that names the dotted key. key: the section's."""
    inner = e.full_key or ""
    dotted = inner if inner.startswith(key) else f"{key}.{inner}" if inner else key
    value = OmegaConf.select(cfg, dotted, default=None, throw_on_missing=False, throw_on_resolution_failure=False)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if type(e).__name__ == "ConfigKeyError":
        return ConfigError(dotted, value, f"unknown key; allowed: {', '.join(fields)}")
    if type(e).__name__ in ("MissingMandatoryValue", "InterpolationToMissingValueError"):
        name = str(e).splitlines()[0].rpartition(": ")[2]  # the setting that is missing, not one made of it
        dotted = name if name.startswith(f"{key}.") else f"{key}.{name}"
        field = fields.get(dotted.rpartition(".")[2])
        meaning = field.metadata.get("help") if field else None
        return ConfigError(dotted, "???", f"must be set: {meaning}" if meaning else "must be set")
    return ConfigError(dotted, value, _one_or_several(dotted, value) or str(e).splitlines()[0])


def _one_or_several(key: str, value: Any) -> str | None:
    """Return what to type where a list stands in the place of one value, or the other way round; else None."""
    if OmegaConf.is_list(value):
        values = ",".join(override_value(v) for v in value)
        return f"one value; several are tried one by one with -m {key}={values}"
    if key in ("sweep.confirm_seeds", "sweep.tune_seeds"):
        return f"a list of seeds: {key}=[{override_value(value)}] is one, {key}=[100,101,102] are three"
    return None


def _selector(cfg: DictConfig, section: str, setting: str) -> str:
    """Return the name of the module that defines a section. setting: `name` or `kind`."""
    node = OmegaConf.select(cfg, section)
    if node is not None and not isinstance(node, (DictConfig, Mapping)):
        raise ConfigError(section, node, "a mapping of settings")
    name = OmegaConf.select(cfg, f"{section}.{setting}", default=None)
    if not isinstance(name, str):
        allowed = ", ".join(component_names(section.partition(".")[0]))
        raise ConfigError(f"{section}.{setting}", name, f"allowed: {allowed}")
    return name


def _local_file(cfg: DictConfig, section: str) -> str | None:
    file = OmegaConf.select(cfg, f"{section}.file", default=None)
    return None if file is None else str(file)
