"""`hydra/launcher=packed`: all jobs of a sweep planned as packs, trained here or each pack as a job of a cluster."""

# No `from __future__ import annotations`, and helpers in `_modules`: Hydra executes plugin files outside sys.modules.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class PackedLauncherConf:
    """Where packs train. Pack size is `sweep.max_pack`; everything but the executor is for packs that are jobs."""

    _target_: str = "hydra_plugins.lorabench.launcher.PackedLauncher"
    executor: Optional[str] = None  # noqa: UP045 (OmegaConf) null, inline: this process; slurm, local: submitit; ray
    poll_seconds: float = 5.0  # between two looks at the queue and the records
    resubmit: int = 1  # times a pack is submitted again whose job died (killed, out of time) no further than before
    timeout_min: int = 60
    signal_delay_s: int = 120  # how long before the end a job is told of it
    array_parallelism: int = 256  # jobs at once
    cpus_per_task: Optional[int] = None  # noqa: UP045
    mem_gb: Optional[int] = None  # noqa: UP045
    nodes: int = 1  # of one pack, and tasks on each: trainer.num_nodes is their product
    tasks_per_node: int = 1
    gpus_per_node: Optional[int] = None  # noqa: UP045
    stderr_to_stdout: bool = False
    # Slurm's own, as sbatch knows them
    partition: Optional[str] = None  # noqa: UP045
    account: Optional[str] = None  # noqa: UP045
    qos: Optional[str] = None  # noqa: UP045
    gres: Optional[str] = None  # noqa: UP045
    constraint: Optional[str] = None  # noqa: UP045
    nodelist: Optional[str] = None  # noqa: UP045
    exclude: Optional[str] = None  # noqa: UP045
    exclusive: Optional[bool] = None  # noqa: UP045
    comment: Optional[str] = None  # noqa: UP045
    mem_per_cpu: Optional[str] = None  # noqa: UP045
    mem_per_gpu: Optional[str] = None  # noqa: UP045
    cpus_per_gpu: Optional[int] = None  # noqa: UP045
    gpus_per_task: Optional[int] = None  # noqa: UP045
    nice: Optional[int] = None  # noqa: UP045
    setup: Optional[list[str]] = None  # noqa: UP045  shell lines before Python starts
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch
    address: Optional[str] = None  # noqa: UP045  of a Ray cluster; null: one on this machine


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="lorabench")


class PackedLauncher(Launcher):
    """Composes every job into a run, checks all of them, then hands them to the sweep layer as one list."""

    def __init__(self, executor: Optional[str] = None, **settings: Any) -> None:  # noqa: UP045
        from lorabench.clusters.engines import check

        self.executor = check(executor)
        self.settings = {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in settings.items()}
        nodes, each = int(settings.get("nodes", 1)), int(settings.get("tasks_per_node", 1))
        self.tasks = nodes * each if self.executor == "slurm" else 1

    @property
    def elsewhere(self) -> bool:
        """Whether packs train on another machine than this one, perhaps."""
        return self.executor != "inline"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from lorabench.training.precision import check_nodes

        self.context, self.config = hydra_context, config
        check_nodes(OmegaConf.select(config, "trainer.num_nodes", default=1), self.tasks)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lorabench.launch.app import primary
        from lorabench.launch.compose import Composer

        setup_globals()
        jobs = Composer.of(self.context, self.config).jobs(job_overrides)
        from lorabench.sweep.execute import execute

        records = execute(jobs, executor=self._executor(jobs[0].settings.sweep))
        return [self._returned(o, record, primary(record)) for o, record in zip(job_overrides, records, strict=True)]

    def _executor(self, sweep: Any) -> Any:
        from lorabench.clusters.engines import refuse_others
        from lorabench.store.records import Store

        if not sweep.dry_run:
            refuse_others(Store(sweep.dir), self.executor)
        if not self.elsewhere:
            return map
        from lorabench.clusters.crew import JobCrew

        return JobCrew(self.executor, self.settings, sweep.name, nodes=self.tasks, quiet=not sweep.progress)

    @staticmethod
    def _returned(overrides: Sequence[str], record: Any, value: float) -> JobReturn:
        ret = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
        ret.return_value = value
        return ret
