"""An experiment's jobs as the sweep would list, compose and check them; none of them runs and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorabench.config.errors import ConfigError
from lorabench.launch import app
from lorabench.launch.compose import Composer
from lorabench.launch.guards import check_arguments, guard_yaml, unreadable

if TYPE_CHECKING:
    from lorabench.sweep.packs import Job


class ListsOnly(Launcher):
    """Takes the place of a sweep's launcher and launches nothing."""

    def setup(self, **kwargs: Any) -> None:
        pass

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        return []


@dataclass(frozen=True)
class Listing:
    """The tuning jobs of an experiment, one for each cell, rate and seed, and whether it is a sweep without `-m`."""

    jobs: list[Job]
    multirun: bool


def listed(experiment: str, overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> Listing:
    """Compose an experiment as `python -m lorabench +experiment=... sweep.dry_run=true` does.

    config_dir: a folder of the user's own, as `--config-dir`. Raises `ConfigError` for whatever would stop the sweep.
    """
    check_arguments(overrides)
    guard_yaml()
    argv = [f"+experiment={experiment}", *overrides, "sweep.dry_run=true"]
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError("--config-dir", str(config_dir), "an existing folder")
        path = str(config_dir.resolve()).replace("\\", "\\\\").replace("'", "\\'")
        argv.append(f"hydra.searchpath=['file://{path}']")
    try:
        with initialize_config_dir(app.config_dir(), job_name="lorabench", version_base="1.3"):
            return _listed(argv)
    except OverrideParseException as e:
        raise unreadable(e.override, e.message) from e
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as e:
        raise ConfigError("experiment", experiment, " ".join(str(e).split())) from e


def _listed(argv: list[str]) -> Listing:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    config = hydra.compose_config("config", argv, RunMode.MULTIRUN)
    target = OmegaConf.select(config, "hydra.sweeper._target_")
    if target != "hydra_plugins.lorabench.sweeper.GridSweeper":
        raise ConfigError("hydra.sweeper", target, "hydra/sweeper=grid: it tunes, then confirms")
    context = HydraContext(hydra.config_loader, Callbacks())  # none of the user's: nothing runs
    sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=app.task, config=config)
    sweeper.launcher = ListsOnly()
    arguments = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(arguments, list)
    sweeper.sweep(arguments=arguments)
    return Listing(Composer.of(context, config).composed, config.hydra.mode == RunMode.MULTIRUN)
