"""One pack on several devices: each process holds the whole pack and takes its share of every batch.

Gradients, losses and weights of the shares are summed before a slice's loss is formed, so the step is that of one process
with the whole batch. Without a process group every function here is that of one process alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Processes that train this pack."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if world() > 1 else 0


def leads() -> bool:
    """Whether this process writes: records, histories, weights."""
    return rank() == 0


def add_up(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes the sum of its values in all processes, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def add_up_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """The same for gradients; a process whose share of a batch was empty has none, and gives zeros."""
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks, in each of them."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def share(values: Any) -> Any:
    """This process's part of a sequence: every `world`-th, from its rank on."""
    return values[rank() :: world()]
