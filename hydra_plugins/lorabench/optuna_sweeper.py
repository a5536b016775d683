"""`hydra/sweeper=optuna`: Optuna chooses rate, rank, alpha or whatever is swept; the launcher packs its batches."""

# No `from __future__ import annotations`, and helpers in `_modules`: Hydra executes plugin files outside sys.modules.

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lorabench.config.errors import ConfigError


@dataclass
class OptunaSweeperConf:
    """Trials are ordinary tuning runs, a run for each of `sweep.tune_seeds`; their mean primary metric is what is optimised."""

    _target_: str = "hydra_plugins.lorabench.optuna_sweeper.OptunaSweeper"
    n_trials: int = 32  # of the whole study: started again, it goes on to this number
    n_jobs: int = 8  # trials that are asked for at once, before any of them is told; they pack
    sampler: str = "tpe"  # tpe, random
    seed: Optional[int] = 0  # noqa: UP045 (OmegaConf) of the sampler
    params: dict[str, Any] = field(default_factory=dict)  # axes in Hydra's sweep grammar; the command line wins


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="lorabench")


class OptunaSweeper(Sweeper):
    """Asks for a batch, launches it, tells what became of it; then confirms the best where fresh seeds are given."""

    def __init__(self, **settings: Any) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError("hydra/sweeper", "optuna", "optuna is not installed: pip install 'lorabench[optuna]'")
        self.settings = {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in settings.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lorabench.launch.compose import elsewhere
        from lorabench.launch.optuna_study import Search

        assert self.config is not None and self.launcher is not None
        search = Search(self.context, self.config, self.settings, arguments)
        if search.dry_run:
            return self.launcher.launch(search.preview(), 0)
        returned: list[Any] = []
        while batch := search.ask():
            returned += self.launcher.launch(search.override_sets(batch), len(returned))
            search.tell(batch)
        if confirm := search.confirmation():
            returned += self.launcher.launch(confirm, len(returned))
        search.finish(solo=not elsewhere(self.launcher))
        return returned
