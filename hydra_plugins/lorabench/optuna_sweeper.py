"""`hydra/sweeper=optuna`: Optuna chooses rate, rank, alpha or whatever is swept; the launcher packs its batches."""

# No `from __future__ import annotations`: Hydra executes plugin files outside sys.modules.

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lorabench.config.errors import ConfigError
from lorabench.launch.compose import to_plain


@dataclass
class OptunaSweeperConf:
    """Trials are ordinary tuning runs, one for each of `sweep.tune_seeds`; their mean primary metric is optimised."""

    _target_: str = "hydra_plugins.lorabench.optuna_sweeper.OptunaSweeper"
    n_trials: int = 32  # of the whole study: started again, it goes on to this number
    n_jobs: int = 8  # trials that are asked for at once, before any of them is told; they pack
    sampler: str = "tpe"  # tpe, random
    seed: Optional[int] = 0  # noqa: UP045 (OmegaConf) of the sampler
    params: dict[str, Any] = field(default_factory=dict)  # axes in Hydra's sweep grammar; the command line wins


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="lorabench")


class OptunaSweeper(Sweeper):
    """Hands Hydra's launcher and the study's settings to `OptunaSearch`."""

    def __init__(self, **settings: Any) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError("hydra/sweeper", "optuna", "optuna is not installed: pip install 'lorabench[optuna]'")
        self.settings = to_plain(settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lorabench.launch.optuna_search import OptunaSearch

        assert self.config is not None and self.launcher is not None
        return OptunaSearch(self.context, self.config, self.settings, arguments).run(self.launcher)
