"""An experiment's jobs, listed, composed and checked as the sweep does it. None of them runs and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorabench.config.errors import ConfigError
from lorabench.launch.command_line import config_dir
from lorabench.launch.compose import to_plain
from lorabench.launch.grid_sweep import GridSweep, NullLauncher
from lorabench.launch.guards import check_arguments, explain_grammar_error, guard_yaml

if TYPE_CHECKING:
    from lorabench.sweep.packs import Job


@dataclass(frozen=True)
class Listing:
    """The tuning jobs of an experiment, one for each cell, rate and seed, and whether it is a sweep without `-m`."""

    jobs: list[Job]
    multirun: bool


def list_jobs(experiment: str | None, overrides: Sequence[str] = (), *, user_config_dir: Path | None = None) -> Listing:
    """Compose an experiment as `python -m lorabench +experiment=... sweep.dry_run=true` does.

    experiment: None for a grid of the command line's own. user_config_dir: a folder of the user's own, as `--config-dir`.
    Raises `ConfigError` for whatever would stop the sweep.
    """
    check_arguments(overrides)
    guard_yaml()
    argv = [*([f"+experiment={experiment}"] if experiment else []), *overrides, "sweep.dry_run=true"]
    if user_config_dir is not None:
        if not user_config_dir.is_dir():
            raise ConfigError("--config-dir", str(user_config_dir), "an existing folder")
        path = str(user_config_dir.resolve()).replace("\\", "\\\\").replace("'", "\\'")
        argv.append(f"hydra.searchpath=['file://{path}']")
    try:
        with initialize_config_dir(config_dir(), job_name="lorabench", version_base="1.3"):
            return _list_composed(argv)
    except OverrideParseException as e:
        raise explain_grammar_error(e) from e
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as e:
        raise ConfigError("experiment", experiment or " ".join(overrides), " ".join(str(e).split())) from e


def _list_composed(argv: list[str]) -> Listing:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    config = hydra.compose_config("config", argv, RunMode.MULTIRUN)
    target = OmegaConf.select(config, "hydra.sweeper._target_")
    if target != "hydra_plugins.lorabench.sweeper.GridSweeper":
        raise ConfigError("hydra.sweeper", target, "hydra/sweeper=grid: it tunes, then confirms")
    context = HydraContext(hydra.config_loader, Callbacks())  # none of the user's: nothing runs
    sweep = GridSweep(context, config, NullLauncher())
    arguments = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(arguments, list)
    grids, params = (to_plain(config.hydra.sweeper.get(name)) for name in ("grids", "params"))
    sweep.run(grids, params, arguments)
    return Listing(sweep.composer.composed, config.hydra.mode == RunMode.MULTIRUN)
