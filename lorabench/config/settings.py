"""The sections of a config beside model, task and method, with each setting's range and role."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lorabench.config.errors import ConfigError
from lorabench.config.fields import Section, knob

ROLES = ("tune", "confirm")


@dataclass(frozen=True)
class OptimizerConfig(Section):
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
class TrainerConfig(Section):
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
    monitor: str | None = knob(
        None, help="validation metric that keep=best and early stopping follow; null: study.selection", added="0.1.0"
    )
    early_stopping_patience: int | None = knob(None, help="evaluations without a better one; null: off", low=1)
    precision: str = knob("auto", help="auto, 32, bf16, 64, or Lightning's own names")
    accelerator: str = knob("auto", help="Lightning's accelerator", identity=False)
    devices: Any = knob(1, help="Lightning's devices", identity=False)
    num_nodes: int = knob(1, help="nodes of one pack; more than one: the tasks of its Slurm job", low=1, identity=False)
    strategy: str = knob("auto", help="auto, ddp; fsdp: the base is cut over the devices, too", identity=False)
    log_interval: int = knob(1, help="steps between training rows of the history", low=1, identity=False)
    checkpoint_interval: int | None = knob(
        None,
        help="steps between checkpoints of a pack; 0: none; null: at evaluations or every 3 minutes, "
        "for 3 % of the time at most",
        low=0,
        identity=False,
    )
    save_weights: bool = knob(True, help="keep the trained weights beside the record", identity=False)


@dataclass(frozen=True)
class TrackerConfig(Section):
    """Where records are mirrored to. Never the truth."""

    name: str = knob("none", help="mirror", choices=("none", "wandb", "tensorboard", "csv"))
    project: str = knob("lorabench", help="W&B project")
    entity: str | None = knob(None, help="W&B entity")
    mode: str = knob(
        "auto", help="auto: online when a key is there, else offline", choices=("auto", "online", "offline")
    )
    artifacts: bool = knob(False, help="W&B: send each run's adapter, too")


@dataclass(frozen=True)
class SweepConfig(Section):
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
        None,
        help="processes that train packs side by side, each on its share of the CPU's cores; "
        "null: one a GPU, one for every 8 cores",
        low=1,
    )
    dry_run: bool = knob(False, help="print runs, packs, parameters and memory; write nothing")
    accept_drift: bool = knob(False, help="reuse records and checkpoints although data, model or code changed")
    reuse: list[str] = knob([], help="directories of sweeps: runs they have trained to the end are taken from there")
    retry_failed: bool = knob(False, help="train runs again whose record says failed")
    measure_solo: bool = knob(True, help="time a few steps of each cell alone: the seconds and memory that tables show")
    progress: bool = knob(True, help="live progress on the terminal")

    def validate(self, key: str) -> None:
        """Raise `ConfigError` for a name that would lead out of `sweeps/` and `reports/`, where it is a folder's."""
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,99}", self.name):
            allowed = (
                "letters, digits and . _ - + = , (at most 100, a letter or digit first); sweep.dir may be any folder"
            )
            raise ConfigError(f"{key}.name", self.name, allowed)


@dataclass(frozen=True)
class ReportConfig(Section):
    """Where the report goes."""

    dir: str = knob("reports/${sweep.name}", help="where the report goes")
    title: str | None = knob(None, help="null: the sweep's name")
    enabled: bool = knob(True, help="render a report when the sweep ends")


@dataclass(frozen=True)
class StudyConfig(Section):
    """What the sweep asks and how it will be judged: declared before it runs, stored and hashed in the manifest."""

    question: str | None = knob(None, help="one sentence, shown on the report")
    metric: str | None = knob(None, help="primary metric of the tables; null: the task's own")
    selection: str = knob("loss", help="validation metric that chooses the rate, and each run's best step")
    margin: float = knob(0.02, help="difference of the primary metric that would matter", above=0)
    reference: str | None = knob(
        None, help="cell id that others are compared with; null: the largest adapter of the main method"
    )
    family: list[str] | None = knob(None, help="cell ids compared with the reference, Holm among them; null: all")
    alpha_anchor: int | None = knob(None, help="rank at which the alpha rules meet; null: none declared", low=1)
