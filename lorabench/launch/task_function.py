"""Hydra's task function: one run from one composed config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lorabench.config.errors import ConfigError
from lorabench.launch.command_line import run_words, sweep_name
from lorabench.launch.job import make_job
from lorabench.runtime.terminal import say

if TYPE_CHECKING:
    from lorabench.store.records import Record


def task_function(cfg: DictConfig) -> float:
    """Train one run and return its primary validation metric, NaN if it failed. Exits with code 2 for bad input."""
    hydra = HydraConfig.get()
    try:
        return _run(cfg, hydra)
    except ConfigError as e:  # leaves before Hydra prints the overrides above the message
        say(f"error: {e}", error=True)
        raise SystemExit(2) from e


def _run(cfg: DictConfig, hydra: Any) -> float:
    is_single_run = hydra.mode is None or hydra.mode.name == "RUN"
    experiment = hydra.runtime.choices.get("experiment")
    words = run_words(hydra.overrides.task, hydra.runtime.config_sources)
    job = make_job(cfg, name=sweep_name(hydra.overrides.task, experiment), experiment=experiment, words=words)
    asked = [word for word in hydra.overrides.task if word.lstrip("+").startswith("sweep.confirm_seeds=")]
    if is_single_run and asked and job.settings.sweep.confirm_seeds:
        say(f"{asked[-1]}: a single run confirms nothing; with -m it tunes, then confirms", error=True)
    from lorabench.sweep.execute import execute, finish

    (record,) = execute([job])
    if is_single_run:
        finish(job.settings)
    return primary_value(record)


def primary_value(record: Record | None) -> float:
    """Return the recorded primary metric on validation data; NaN where the run did not complete."""
    if record is None or record.status != "completed":
        return float("nan")
    return float(record.metrics[f"val/{record.metrics['primary']}"])
