"""One pack on several devices: each process holds the whole pack and takes its share of every batch.

Gradients, losses and weights of the shares are summed before a slice's loss is formed, so the step equals that of one
process with the whole batch. Without a process group every function here answers for one process alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lorabench.config.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(days=1)  # another process may measure for hours; one that dies is noticed otherwise


class GroupStrategy(DDPStrategy):
    """Lightning's process group without DistributedDataParallel: the module sums gradients, once a step."""

    def configure_ddp(self) -> None:
        pass

    def setup_distributed(self) -> None:
        """Form the group over a store that listens on one address alone; Lightning keeps a group that is there."""
        if not dist.is_initialized():
            store = open_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            device = self.root_device if self.root_device.type != "cpu" else None
            dist.init_process_group(
                self._get_process_group_backend(),
                store=store,
                rank=rank(),
                world_size=world_size(),
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device,
            )
        super().setup_distributed()

    def setup(self, trainer: Any) -> None:
        """Keep sharded weights out of what Lightning sends from rank 0 to all outside a fit."""
        assert self.model is not None
        sharded = [name for name, p in self.model.named_parameters() if isinstance(p, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, sharded)
        super().setup(trainer)


def open_store(address: str, port: int) -> dist.TCPStore:
    """Return the store where the processes of a group meet; rank 0 serves it, and listens on `address` alone.

    It asks nobody who they are: torch would open it on all addresses of the machine.
    """
    listener = None
    if rank() == 0:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(place)
        server.listen()
        listener = server.detach()  # the store's from here on
    return dist.TCPStore(
        address,
        port,
        world_size(),
        rank() == 0,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def meeting_address(hostname: str) -> str:
    """Return the address of this machine where processes of other machines meet.

    That is the address of the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, else the host name's, else
    that of the default route. Raises `ConfigError` for an interface without an address.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")
    if name:
        here = psutil.net_if_addrs().get(name, [])
        found = [a.address for a in here if a.family == socket.AF_INET] or [a.address for a in here if ":" in a.address]
        if not found:
            known = ", ".join(sorted(psutil.net_if_addrs()))
            raise ConfigError("GLOO_SOCKET_IFNAME", name, f"an interface of this machine: {known}")
        return found[0]
    with suppress(OSError):
        address = str(socket.gethostbyname(hostname))
        if not address.startswith("127."):  # as /etc/hosts may have it: nobody else comes in there
            return address
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 9))  # sends nothing: it asks the system which way it would go
        return str(s.getsockname()[0])
    return hostname


def stay_on_loopback() -> None:
    """Let gloo and NCCL talk over the loopback interface alone, unless the user names another."""
    loopback = next((n for n, a in psutil.net_if_addrs().items() if any(x.address == "127.0.0.1" for x in a)), None)
    for library in ("GLOO", "NCCL") if loopback else ():
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", str(loopback))


class ProcessLost(Exception):
    """A process that trains a pack with others is gone. No run is at fault, and nothing is recorded."""


_place = (0, 1)  # rank and world size of this process


def join(rank: int, world: int) -> None:
    """Make this process one of a group. The group itself is formed when a Trainer starts."""
    global _place
    _place = rank, world


def trainer_devices(device: str, devices: Any) -> dict[str, Any]:
    """Return the Trainer's arguments for devices: the first one for a process alone, else how to form the group.

    The environment is set, or Lightning would read ranks from a Slurm job's variables and requeue the job itself.
    """
    plugins = [LightningEnvironment()]
    if world_size() == 1:
        return {"devices": devices[:1] if isinstance(devices, list) else 1, "plugins": plugins}
    strategy = GroupStrategy(process_group_backend="nccl" if device == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    nodes = world_size() // (len(devices) if isinstance(devices, list) else int(devices))
    return {"devices": devices, "num_nodes": nodes, "strategy": strategy, "plugins": plugins}


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and the world size."""
    return _place


def world_size() -> int:
    """Return how many processes train this pack."""
    return _place[1]


def rank() -> int:
    """Return which of them this process is, from 0."""
    return _place[0]


def is_rank_zero() -> bool:
    """Return whether this process writes records, histories, weights and checkpoints."""
    return rank() == 0


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in place. Collective."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes. Collective.

    A process whose share of a batch was empty has no gradients and adds zeros. A parameter that no process used keeps
    no gradient, so the optimizer leaves it alone, weight decay included. Gradients of sharded parameters are left out:
    the backward pass has summed them.
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


def any_rank(condition: bool) -> bool:
    """Return whether a condition holds in any process, the same answer in each. Collective."""
    if world_size() == 1:
        return condition
    count = torch.tensor(int(condition), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    sum_over_ranks([count])
    return bool(count)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes in the order of their ranks, in each process. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def is_process_lost(error: BaseException) -> bool:
    """Return whether an error says that another process cannot be reached. gloo has no error class for it."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))
