"""All override sets of a sweep as packs, trained in this process or each as a job of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from lorabench.config.settings import SweepConfig
from lorabench.launch.compose import Composer
from lorabench.launch.task_function import primary_value


class Packed:
    """Trains override sets as packs. executor: None or `inline` for this process, else the engine of a cluster.

    settings: the launcher's, for the engine. Raises `ConfigError` for an executor that cannot be used here.
    """

    def __init__(self, executor: str | None, settings: Mapping[str, Any]) -> None:
        from lorabench.clusters.engines import check_executor

        self.executor, self.settings = check_executor(executor), settings
        nodes, tasks_per_node = int(settings.get("nodes", 1)), int(settings.get("tasks_per_node", 1))
        self.tasks = nodes * tasks_per_node if self.executor == "slurm" else 1

    @property
    def is_remote(self) -> bool:
        """Whether packs may train on another machine than this one."""
        return self.executor != "inline"

    def check_nodes(self, config: DictConfig) -> None:
        """Raise `ConfigError` unless `trainer.num_nodes` is the number of a job's tasks."""
        from lorabench.training.precision import check_nodes

        check_nodes(OmegaConf.select(config, "trainer.num_nodes", default=1), self.tasks)

    def launch(
        self, context: HydraContext, config: DictConfig, override_sets: Sequence[Sequence[str]]
    ) -> list[JobReturn]:
        """Compose and check all runs, train them, and return the primary validation metric of each."""
        jobs = Composer.shared(context, config).jobs(override_sets)
        from lorabench.sweep.execute import execute  # torch: not before all configs are known to be good

        records = execute(jobs, executor=self._executor(jobs[0].settings.sweep))
        values = (primary_value(record) for record in records)
        return [_job_return(overrides, value) for overrides, value in zip(override_sets, values, strict=True)]

    def _executor(self, sweep: SweepConfig) -> Any:
        from lorabench.clusters.engines import refuse_others
        from lorabench.store.records import Store

        assert sweep.name is not None, "make_job names the sweep"
        if not sweep.dry_run:
            refuse_others(Store(sweep.dir), self.executor)
        if not self.is_remote:
            return map
        from lorabench.clusters.crew import JobCrew

        return JobCrew(self.executor, self.settings, sweep.name, nodes=self.tasks, quiet=not sweep.progress)


def _job_return(overrides: Sequence[str], value: float) -> JobReturn:
    result = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    result.return_value = value
    return result
