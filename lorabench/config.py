"""From a composed config to one validated `RunConfig`, its `run_id` and its pack key.

The only module that knows OmegaConf. Methods, tasks and model families are found by file name (one dataclass
`Config`, one file, one YAML): `method.name`, `task.kind` and `model.kind` name a module of their package, or `local`
with `file=` a Python file of the user's own. Source of the rules: docs/architecture.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorabench.components import available, component
from lorabench.schema import ConfigError, check_ranges, field_dict, knob

ROLES = ("tune", "confirm")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule; the peak rate and the decay may differ per slice, the schedule's shape may not."""

    name: str = knob("adamw", help="optimizer", choices=("adamw",))
    lr: float = knob(1e-3, help="peak learning rate", above=0, high=10, varies=True)
    weight_decay: float = knob(
        0.0, help="decoupled decay of weights; biases and norms are spared", low=0, high=1, varies=True
    )
    beta1: float = knob(0.9, help="AdamW beta1", low=0, high=0.9999)
    beta2: float = knob(0.999, help="AdamW beta2", low=0, high=0.999999)
    eps: float = knob(1e-8, help="AdamW epsilon", above=0, high=1)
    schedule: str = knob("linear", help="shape after warm-up", choices=("constant", "linear", "cosine"))
    warmup_ratio: float = knob(0.06, help="share of the steps spent warming up", low=0, high=1)


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how large, how precise. `accelerator`, `devices`, `strategy` are Lightning's own."""

    max_epochs: int | None = knob(1, help="epochs; ignored when max_steps is set", low=1)
    max_steps: int | None = knob(None, help="optimizer steps; null: from max_epochs", low=1)
    batch_size: int = knob(32, help="examples a slice and optimizer step sees at once", low=1)
    accumulate_grad_batches: int = knob(1, help="micro-batches an optimizer step", low=1)
    gradient_clip_val: float | None = knob(1.0, help="clip each slice's gradient norm; null: off", above=0)
    gradient_checkpointing: bool = knob(False, help="recompute activations in the backward pass")
    part_tokens: int | None = knob(
        None, help="padded tokens through the base at once; null: by device", low=1, identity=False
    )
    reuse_trunk: bool = knob(
        True, help="compute the blocks below all that trains once a data set, where that pays", identity=False
    )
    eval_batch_size: int = knob(128, help="examples an evaluation batch", low=1, identity=False)
    eval_interval: int | None = knob(None, help="steps between evaluations; null: five a run", low=1)
    keep: str = knob("best", help="which weights a run ends with", choices=("best", "last"))
    early_stopping_patience: int | None = knob(None, help="evaluations without a better one; null: off", low=1)
    precision: str = knob("auto", help="auto, 32, bf16, 64, or Lightning's own names")
    accelerator: str = knob("auto", help="Lightning's accelerator", identity=False)
    devices: Any = knob(1, help="Lightning's devices", identity=False)
    num_nodes: int = knob(1, help="Lightning's num_nodes", low=1, identity=False)
    strategy: str = knob("auto", help="Lightning's strategy", identity=False)
    log_interval: int = knob(1, help="steps between training rows of the history", low=1, identity=False)
    checkpoint_interval: int | None = knob(
        None,
        help="steps between checkpoints of a pack; 0: none; null: at evaluations or every 3 minutes, for 3 % of the time at most",
        low=0,
        identity=False,
    )
    save_weights: bool = knob(True, help="keep the trained weights beside the record", identity=False)


@dataclass(frozen=True)
class TrackerConfig:
    """Where records are mirrored to. Never the truth."""

    name: str = knob("none", help="mirror", choices=("none", "wandb", "tensorboard", "csv"))
    project: str = knob("lorabench", help="W&B project")
    entity: str | None = knob(None, help="W&B entity")
    mode: str = knob(
        "auto", help="auto: online when a key is there, else offline", choices=("auto", "online", "offline")
    )
    artifacts: bool = knob(False, help="W&B: send each run's adapter, too")


@dataclass(frozen=True)
class SweepConfig:
    """The sweep a run belongs to."""

    name: str | None = knob(None, help="null: the experiment's name, else a short hash of the overrides")
    experiment: str | None = knob(None, help="filled in: the experiment file this came from")
    dir: str = knob("sweeps/${sweep.name}", help="where the records go")
    role: str = knob("tune", help="tune: validation only; confirm: test too", choices=ROLES)
    tune_seeds: list[int] = knob([0], help="seeds that choose the rate")
    confirm_seeds: list[int] = knob(
        [], help="fresh seeds that train at the chosen rate and alone see test; []: tuning only"
    )
    max_pack: int | None = knob(None, help="slices a pack at most; null: as many as fit into memory, up to 16", low=1)
    prune: bool = knob(False, help="drop rates that fall behind inside their cell, from half of the steps on")
    extend_lr: bool = knob(False, help="add rates outward until the best lies inside, at most 6 a cell")
    workers: int | None = knob(
        None, help="processes that train packs side by side; null: one a GPU, one for every 8 CPU cores", low=1
    )
    dry_run: bool = knob(False, help="print runs, packs, parameters and memory; write nothing")
    accept_drift: bool = knob(False, help="reuse records and checkpoints although data, model or code changed")
    retry_failed: bool = knob(False, help="train runs again whose record says failed")
    measure_solo: bool = knob(True, help="time a few steps of each cell alone: the seconds and memory that tables show")
    progress: bool = knob(True, help="live progress on the terminal")

    def validate(self, key: str) -> None:
        """The name is a folder's, under `sweeps/` and `reports/`: no way out of them."""
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,99}", self.name):
            allowed = (
                "letters, digits and . _ - + = , (at most 100, a letter or digit first); sweep.dir may be any folder"
            )
            raise ConfigError(f"{key}.name", self.name, allowed)


@dataclass(frozen=True)
class ReportConfig:
    """Where the report goes."""

    dir: str = knob("reports/${sweep.name}", help="where the report goes")
    title: str | None = knob(None, help="null: the sweep's name")
    enabled: bool = knob(True, help="render a report when the sweep ends")


@dataclass(frozen=True)
class StudyConfig:
    """What the sweep asks and how it will be judged: declared before it runs, stored and hashed in the manifest."""

    question: str | None = knob(None, help="one sentence, shown on the report")
    metric: str | None = knob(None, help="primary metric of the tables; null: the task's own")
    selection: str = knob("loss", help="validation metric that chooses the rate")
    margin: float = knob(0.02, help="difference of the primary metric that would matter", above=0)
    reference: str | None = knob(None, help="cell id that others are compared with; null: the largest rank")
    family: list[str] | None = knob(None, help="cell ids compared with the reference, Holm among them; null: all")
    alpha_anchor: int | None = knob(None, help="rank at which the alpha rules meet; null: none declared", low=1)


@dataclass(frozen=True)
class RunConfig:
    """One run. `model`, `task` and `method` are the `Config` dataclasses of their own files."""

    model: Any
    task: Any
    method: Any
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


def _probed(task: Any) -> Any:
    """The task with its probe, so far a mapping, as the `Config` of that kind; errors have keys under `task.probe`."""
    asked = getattr(task, "probe", None)
    if asked is None:
        return task
    if not isinstance(asked, Mapping):
        raise ConfigError("task.probe", asked, PROBE)
    cfg = OmegaConf.create({"task": {"probe": dict(asked)}})
    try:
        kind = component("task", _name(cfg, "task.probe", "kind"), _file(cfg, "task.probe"))
    except ConfigError as e:
        raise ConfigError(f"task.probe.{e.key.rpartition('.')[2]}", e.value, e.allowed) from e
    probe = _section(kind, cfg, "task.probe")
    if getattr(probe, "probe", None) is not None:
        raise ConfigError("task.probe.probe", "(a task)", "null: a probe has none of its own")
    return dataclasses.replace(task, probe=probe)


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
        merged = OmegaConf.merge(OmegaConf.structured(cls), plain)
        section: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as e:
        raise _translate(e, cls, key, cfg) from e
    check_ranges(section, key)
    if hasattr(section, "validate"):
        section.validate(key)
    return section


def _translate(e: OmegaConfBaseException, cls: type, key: str, cfg: DictConfig) -> ConfigError:
    inner = e.full_key or ""
    dotted = inner if inner.startswith(key) else f"{key}.{inner}" if inner else key
    value = OmegaConf.select(cfg, dotted, default=None, throw_on_missing=False, throw_on_resolution_failure=False)
    names = [f.name for f in dataclasses.fields(cls)]
    if type(e).__name__ == "ConfigKeyError":
        return ConfigError(dotted, value, f"unknown key; allowed: {', '.join(names)}")
    if type(e).__name__ == "MissingMandatoryValue":
        return ConfigError(dotted, "???", "must be set")
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
