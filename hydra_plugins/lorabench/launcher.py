"""`hydra/launcher=packed`: all jobs of a sweep in one process, those that can share a base trained together."""

# No `from __future__ import annotations`, and helpers in `_modules`: Hydra executes plugin files outside sys.modules.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class PackedLauncherConf:
    """The packed launcher has no settings of its own: pack size is `sweep.max_pack`."""

    _target_: str = "hydra_plugins.lorabench.launcher.PackedLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="lorabench")


class PackedLauncher(Launcher):
    """Composes every job into a run, checks all of them, then hands them to the sweep layer as one list."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hydra_plugins.lorabench._compose import Composer
        from lorabench.app import primary

        setup_globals()
        jobs = Composer.of(self.context, self.config).jobs(job_overrides)
        from lorabench.sweep import execute

        records = execute(jobs)
        return [self._returned(o, record, primary(record)) for o, record in zip(job_overrides, records, strict=True)]

    @staticmethod
    def _returned(overrides: Sequence[str], record: Any, value: float) -> JobReturn:
        ret = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
        ret.return_value = value
        return ret
