"""`hydra/launcher=packed`: all jobs of a sweep planned as packs, trained here or each pack as a job of a cluster."""

# No `from __future__ import annotations`: Hydra executes plugin files outside sys.modules.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lorabench.launch.compose import to_plain
from lorabench.launch.packed import Packed


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
    """Hands all override sets of a sweep to `Packed` as one list."""

    def __init__(self, executor: Optional[str] = None, **settings: Any) -> None:  # noqa: UP045
        self.packed = Packed(executor, to_plain(settings))

    @property
    def is_remote(self) -> bool:
        """Whether packs may train on another machine than this one."""
        return self.packed.is_remote

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.packed.check_nodes(config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        setup_globals()
        return self.packed.launch(self.context, self.config, job_overrides)
