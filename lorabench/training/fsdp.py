"""The base of one pack, sharded over the processes that train it (`trainer.strategy=fsdp`): torch's FSDP2, by block.

Between uses each process holds its share of every weight of the base. A block's weights are gathered before it runs,
forward and backward, and released afterwards, so all processes run the same blocks in the same order.

Where the base itself trains, the backward pass sums each gradient into the shares; optimizer state and best weights are
shares too. Checkpoints and files are whole: rank 0 gathers them on its CPU and writes them. Adapters, heads and biases
beside a frozen base stay whole in each process (`distributed`).
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
    """Shard the parameters of `model` in place and for good; the whole ones lose their memory.

    beside: parameters that stay whole, which train beside the base. layers: how many blocks the base has; what lies
    outside them is gathered as one. strategy: the Trainer's; it forms the process group here, before it fits.
    """
    strategy.setup_environment()
    mesh = init_device_mesh(strategy.root_device.type, (distributed.world_size(),))
    kept = {*beside, *(p for p in model.parameters() if p.dim() == 0 or not p.is_contiguous())}
    sharded = [p for p in model.parameters() if p not in kept]
    for module in [*_blocks(model, layers), model]:
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        unit.set_gradient_divide_factor(1.0)  # losses are plain sums, so gradients add up
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_reduce_scatter_unused_params(True)  # one rank's examples may use what another's do not
    for p in sharded:
        p.data = p.data.new_empty(0)  # other references to it must not keep its memory
    model.run_whole = MethodType(lambda self, call: call(), model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_whole")


def _blocks(model: nn.Module, layers: int) -> list[nn.Module]:
    """Return the blocks of the base: those of encoder and decoder, where there are two."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and layers and len(m) == layers]
    inside = {m for blocks in lists for block in blocks for m in block.modules()}
    return [block for blocks in lists if blocks not in inside for block in blocks]


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has been called on a model."""
    return isinstance(model, FSDPModule)


def run_gathered(model: nn.Module, call: Callable[[], T]) -> T:
    """Return what `call` returns, with the weights outside the blocks gathered while it runs. Collective.

    Needed where `call` runs a module of the model, not the model itself.
    """
    if not is_sharded(model):
        return call()
    result: T = model.run_whole(call)  # type: ignore[operator]
    return result


def is_shard(tensor: Tensor) -> bool:
    """Return whether each process holds its share of a tensor only."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor between uses: its share, or all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on rank 0's CPU. Collective: every rank calls it; the others get an empty tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.detach().to(tensor.device_mesh.device_type)
    assert isinstance(on_device, DTensor)
    full = on_device.full_tensor()
    return full.cpu() if distributed.is_rank_zero() else full.new_empty(0)


def gather_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Gather each parameter as `gather` does. Collective."""
    return {name: nn.Parameter(gather(p), requires_grad=False) for name, p in parameters.items()}


def shard_like(like: Tensor, tensor: Tensor) -> Tensor:
    """Return this process's share of a whole tensor that every process holds; all of it where `like` is not sharded."""
    if not isinstance(like, DTensor):
        return tensor
    on_device = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None).clone()


def bytes_by_rank(model: nn.Module) -> list[int]:
    """Return the bytes of the base's parameters that each process holds between uses, by rank. Collective."""
    held = [local_part(p) for p in model.parameters() if not p.requires_grad or isinstance(p, DTensor)]
    return [int(n) for n in distributed.gather_objects(sum(p.numel() * p.element_size() for p in held))]
