"""`hydra/sweeper=grid`: a union of grids, tuned and then confirmed."""

# No `from __future__ import annotations`: Hydra executes plugin files outside sys.modules.

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lorabench.launch.compose import to_plain


@dataclass
class GridSweeperConf:
    """params: axes of all grids; grids: named grids, each a product of axes, `zip` for axes that advance together."""

    _target_: str = "hydra_plugins.lorabench.sweeper.GridSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="lorabench")


class GridSweeper(Sweeper):
    """Hands Hydra's launcher and the grids to `GridSweep`."""

    def __init__(self, params: Mapping[str, Any], grids: Mapping[str, Any]) -> None:
        self.params, self.grids = to_plain(params), to_plain(grids)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lorabench.launch.grid_sweep import GridSweep  # Hydra executes this file for `--help`, too

        assert self.config is not None and self.launcher is not None
        return GridSweep(self.context, self.config, self.launcher).run(self.grids, self.params, arguments)
