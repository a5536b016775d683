"""One pack on several devices: each process holds the whole pack and takes its share of every batch.

Gradients, losses and weights of the shares are summed before a slice's loss is formed, so the step is that of one process
with the whole batch. Without a process group every function here is that of one process alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

COLLECTIVE_TIMEOUT = timedelta(
    days=1
)  # for another process, which may be measuring beside the test; one that dies shows otherwise


class GroupStrategy(DDPStrategy):
    """Lightning's process group without torch's DistributedDataParallel: gradients are summed once a step, by the module."""

    def configure_ddp(self) -> None:
        pass

    def setup(self, trainer: Any) -> None:
        """Outside a fit Lightning sends the first process's weights to all; of those that are cut each has its own share."""
        assert self.model is not None
        cut = [name for name, p in self.model.named_parameters() if isinstance(p, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, cut)
        super().setup(trainer)


class ProcessLost(Exception):
    """A process that trains a pack with others is gone: no run's fault, and nothing is recorded."""


_place = (0, 1)  # rank and world of this process


def join(rank: int, world: int) -> None:
    """Make this process one of a group; the group itself is formed when a Trainer starts."""
    global _place
    _place = rank, world


def trainer_devices(device: str, devices: Any) -> dict[str, Any]:
    """What a Trainer is told of devices: the first for one process; in a process of a group how to form it.

    The environment is named, or Lightning would take ranks, and a requeue of its own, from a Slurm job's variables.
    """
    plugins = [LightningEnvironment()]
    if world_size() == 1:
        return {"devices": devices[:1] if isinstance(devices, list) else 1, "plugins": plugins}
    joins = GroupStrategy(process_group_backend="nccl" if device == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    nodes = world_size() // (len(devices) if isinstance(devices, list) else int(devices))
    return {"devices": devices, "num_nodes": nodes, "strategy": joins, "plugins": plugins}


def rank_and_world() -> tuple[int, int]:
    """(rank, world) of this process."""
    return _place


def world_size() -> int:
    """Processes that train this pack."""
    return _place[1]


def rank() -> int:
    """Which of them this is."""
    return _place[0]


def is_rank_zero() -> bool:
    """Whether this process writes: records, histories, weights, checkpoints."""
    return rank() == 0


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes the sum of its values in all processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """The same for gradients; a process whose share of a batch was empty has none, and gives zeros. What no process has used
    keeps none, as in one process: the optimizer then leaves it alone, its weight decay too.

    Those of parameters that are cut over the processes were summed in the backward pass.
    """
    if world_size() == 1:
        return
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    if not whole:
        return
    used = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32, device=whole[0].device)
    dist.all_reduce(used)
    for parameter in (p for p, users in zip(whole, used.tolist(), strict=True) if users):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def any_rank(so: bool) -> bool:
    """Whether it is so in any process; the same answer in each of them."""
    if world_size() == 1:
        return so
    count = torch.tensor(int(so), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    sum_over_ranks([count])
    return bool(count)


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks, in each of them."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def is_process_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the group cannot be reached; gloo has no kind of error for it."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))
