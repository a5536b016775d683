"""The frozen base of one pack, cut over the processes that train it (`trainer.strategy=fsdp`): torch's FSDP2, block by block.

Between uses each process holds its share of every frozen weight. A block's weights are gathered before it runs, forward and
backward, and let go afterwards, so the processes take the same blocks in the same order. What trains stays whole in each, as
`replicas` has it: gradients, checkpoints and files are no different.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lorabench import replicas

T = TypeVar("T")


def shard(model: nn.Module, trained: Collection[nn.Parameter], layers: int, strategy: Any) -> None:
    """Cut the parameters of `model` but `trained`, in place and for good; the whole ones are given up.

    layers: how many blocks the base has; what lies outside them is gathered as one. strategy: the Trainer's, which forms
    the group here, before it fits.
    """
    strategy.setup_environment()
    mesh = init_device_mesh(strategy.root_device.type, (replicas.world(),))
    kept = {*trained, *(p for p in model.parameters() if p.dim() == 0 or not p.is_contiguous())}
    cut = [p for p in model.parameters() if p not in kept]
    for module in [*_blocks(model, layers), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    for p in cut:
        p.data = p.data.new_empty(0)  # who still refers to it does not keep its memory
    model.run_whole = MethodType(lambda self, call: call(), model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_whole")


def _blocks(model: nn.Module, layers: int) -> list[nn.Module]:
    """Of encoder and decoder, where there are two."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and layers and len(m) == layers]
    inside = {m for found in lists for block in found for m in block.modules()}
    return [block for found in lists if found not in inside for block in found]


def sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def within(model: nn.Module, call: Callable[[], T]) -> T:
    """What `call` gives, which runs a module of the model and not the model: what lies outside the blocks is gathered for it."""
    if not sharded(model):
        return call()
    found: T = model.run_whole(call)  # type: ignore[operator]
    return found


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter between uses: its share where it is cut, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_held(model: nn.Module) -> list[int]:
    """Bytes of frozen parameters between uses in each process, by rank."""
    own = [held(p) for p in model.parameters() if not p.requires_grad]
    return [int(n) for n in replicas.gather(sum(p.numel() * p.element_size() for p in own))]
