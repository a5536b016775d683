"""From plans to a stack: wraps the planned layers of a base in place and freezes the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lorabench.adapters.dropout import key_base_dropout
from lorabench.adapters.init import module_start
from lorabench.adapters.layers import WrappedModule
from lorabench.adapters.modules import StackedBias, StackedModule
from lorabench.adapters.stack import Stack
from lorabench.adapters.variants import layer_class
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import BaseInfo, is_inside

_RUNNING = nn.modules.batchnorm._NormBase  # batch and instance normalisation with running statistics


def inject(model: nn.Module, plans: Sequence[SlicePlan], *, info: BaseInfo, give_back: bool = True) -> Stack:
    """Put one slice for each plan onto `model`, in place, and return the stack; `stack.remove()` undoes it.

    Slices of one pack train the same modules and biases; `full` is a pack of one. Everything not trained is frozen,
    normalisation statistics too. The base's own dropout is re-keyed (see `dropout`), which needs eager attention.
    give_back: whether `full` keeps the base's weights for `stack.remove()`. Where this raises, the base is as it was.
    """
    assert plans and (len(plans) == 1 or not any(p.full for p in plans)), "full fine-tuning is a pack of one"
    assert len({(p.modules, p.biases) for p in plans}) == 1, "slices of a pack train the same modules and biases"
    stack = Stack(model, plans)
    try:
        _freeze(stack)
        if plans[0].full:
            _train_base(stack, info, give_back)
        else:
            _wrap_adapters(stack, info)
            _wrap_biases(stack, info)
            _wrap_modules(stack, info)
        _freeze_statistics(stack)
        key_base_dropout(model, stack.context, stack.undo)
    except BaseException:
        stack.remove()  # the base is kept for the next pack, which finds no layer of this one on it, nor its memory
        raise
    return stack


def _freeze(stack: Stack) -> None:
    for p in stack.model.parameters():
        stack.undo.callback(p.requires_grad_, p.requires_grad)
        stack.undo.callback(setattr, p, "grad", None)
        p.requires_grad_(False)


def _train_base(stack: Stack, info: BaseInfo, give_back: bool) -> None:
    """Let the whole base train; its head starts from the seed, as under every method."""
    for p in stack.model.parameters():
        if give_back:
            stack.undo.callback(_restore, p, p.detach().clone())
        p.requires_grad_(True)
    for name in info.head:
        module = stack.model.get_submodule(name)
        start = module_start(stack.model, module, stack.plans[0].seed, name)
        with torch.no_grad():
            for key, p in module.named_parameters():
                p.copy_(start[key])
        _compute_wide(stack, module)
    stack.own = dict(stack.model.named_parameters())


def _compute_wide(stack: Stack, module: nn.Module) -> None:
    """Let a new head compute in its own float32 under autocast, as a stacked head does: bf16 logits carry 8 bits."""
    forward = module.forward

    def forward_wide(*args: Any, **kwargs: Any) -> Any:
        dtype = next(module.parameters()).dtype
        args, kwargs = tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs)
        )
        kind = next(module.parameters()).device.type
        with torch.autocast(kind, enabled=False):
            return forward(*args, **kwargs)

    module.forward = forward_wide
    stack.undo.callback(delattr, module, "forward")


def _restore(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _wrap_adapters(stack: Stack, info: BaseInfo) -> None:
    seeds = [plan.seed for plan in stack.plans]
    for layer in info.layers:
        specs = [plan.adapters.get(layer.name) for plan in stack.plans]
        if any(spec and spec.r for spec in specs):
            assert not is_inside(layer.name, stack.plans[0].modules), (
                f"{layer.name} is inside a module that trains whole"
            )
            base = stack.model.get_submodule(layer.name)
            _replace(stack, layer_class(layer, specs)(base, layer, stack.context, specs, seeds))
    known = info.by_name
    unknown = [name for plan in stack.plans for name in plan.adapters if name not in known]
    assert not unknown, f"not layers of this base: {unknown}"


def _wrap_biases(stack: Stack, info: BaseInfo) -> None:
    for name in stack.plans[0].biases:
        if not is_inside(name, stack.plans[0].modules):
            base = stack.model.get_submodule(name)
            _replace(stack, StackedBias(base, name, info.by_name[name].kind, stack.context))


def _wrap_modules(stack: Stack, info: BaseInfo) -> None:
    for name in stack.plans[0].modules:
        module = stack.model.get_submodule(name)
        new = is_inside(name, info.head)
        if new:
            starts: list[Any] = [module_start(stack.model, module, plan.seed, name) for plan in stack.plans]
        else:
            starts = [{key: p.detach() for key, p in module.named_parameters()}] * stack.size
        rates = tuple(plan.vector_rate for plan in stack.plans)
        _replace(stack, StackedModule(module, name, stack.context, starts, new=new, vector_rates=rates))


def _replace(stack: Stack, layer: WrappedModule) -> None:
    parent_name, _, child = layer.name.rpartition(".")
    parent = stack.model.get_submodule(parent_name)
    stack.undo.callback(setattr, parent, child, layer.base)
    setattr(parent, child, layer)
    stack.layers.append(layer)


def _freeze_statistics(stack: Stack) -> None:
    """Make normalisation use its stored statistics whatever `model.train()` says, under `full` too.

    Buffers count as frozen, so that a slice is its parameters and methods compare on equal terms.
    """
    for module in stack.model.modules():
        if isinstance(module, _RUNNING) and module.track_running_stats:
            stack.undo.callback(setattr, module, "training", module.training)
            stack.undo.callback(module.register_forward_pre_hook(_stay_in_eval).remove)


def _stay_in_eval(module: nn.Module, args: Any) -> None:
    module.training = False
