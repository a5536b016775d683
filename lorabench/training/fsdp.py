"""The base of one pack, cut over the processes that train it (`trainer.strategy=fsdp`): torch's FSDP2, block by block.

Between uses each process holds its share of every weight of the base. A block's weights are gathered before it runs, forward
and backward, and let go afterwards, so the processes take the same blocks in the same order. Of a base that trains itself the
backward pass sums each gradient into the shares, and optimizer and best weights are shares, too. Checkpoints and files are
those of one process: the first gathers them whole on its CPU and writes. Adapters, heads and biases beside a frozen base stay
whole in each process, as `distributed` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lorabench.training import distributed

T = TypeVar("T")


def shard(model: nn.Module, beside: Collection[nn.Parameter], layers: int, strategy: Any) -> None:
    """Cut the parameters of `model` but those that train `beside` the base, in place and for good: new ones stand in the
    model, the whole ones are given up.

    layers: how many blocks the base has; what lies outside them is gathered as one. strategy: the Trainer's, which forms
    the group here, before it fits.
    """
    strategy.setup_environment()
    mesh = init_device_mesh(strategy.root_device.type, (distributed.world_size(),))
    kept = {*beside, *(p for p in model.parameters() if p.dim() == 0 or not p.is_contiguous())}
    given = [p for p in model.parameters() if p not in kept]
    for module in [*_blocks(model, layers), model]:
        made = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        made.set_gradient_divide_factor(1.0)  # gradients are of plain sums, and so add up
        made.set_force_sum_reduction_for_comms(True)
        made.set_reduce_scatter_unused_params(True)  # one process's examples may need what those of another do not
    for p in given:
        p.data = p.data.new_empty(0)  # who still refers to it does not keep its memory
    model.run_whole = MethodType(lambda self, call: call(), model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_whole")


def _blocks(model: nn.Module, layers: int) -> list[nn.Module]:
    """Of encoder and decoder, where there are two."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and layers and len(m) == layers]
    inside = {m for found in lists for block in found for m in block.modules()}
    return [block for found in lists if found not in inside for block in found]


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def run_gathered(model: nn.Module, call: Callable[[], T]) -> T:
    """What `call` gives, which runs a module of the model and not the model: what lies outside the blocks is gathered for it."""
    if not is_sharded(model):
        return call()
    found: T = model.run_whole(call)  # type: ignore[operator]
    return found


def is_shard(tensor: Tensor) -> bool:
    """Whether each process holds its share of a tensor."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor between uses: its share where it is cut, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """Of a tensor that is cut all of it, on the first process's CPU; the others, which must ask, too, get an empty one."""
    if not isinstance(tensor, DTensor):
        return tensor
    there = tensor.detach().to(tensor.device_mesh.device_type)
    assert isinstance(there, DTensor)
    full = there.full_tensor()
    return full.cpu() if distributed.is_rank_zero() else full.new_empty(0)


def gather_parameters(own: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The same of each of them."""
    return {name: nn.Parameter(gather(p), requires_grad=False) for name, p in own.items()}


def shard_like(like: Tensor, tensor: Tensor) -> Tensor:
    """This process's share of a whole tensor that every process has; all of it where `like` is not cut."""
    if not isinstance(like, DTensor):
        return tensor
    there = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None).clone()


def bytes_by_rank(model: nn.Module) -> list[int]:
    """Bytes of the base's parameters between uses in each process, by rank."""
    own = [local_part(p) for p in model.parameters() if not p.requires_grad or isinstance(p, DTensor)]
    return [int(n) for n in distributed.gather_objects(sum(p.numel() * p.element_size() for p in own))]
