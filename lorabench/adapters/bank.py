"""Several trained slices at once on one base, switched without touching its weights. Shapes: K slices, N rows.

A bank is a stack that grows: slice 0 is the plain base, the others are adapters by name. Rows of one batch may be
served by different adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.files import PLAN_FILE, load_slice, read_peft
from lorabench.adapters.inject import inject
from lorabench.adapters.layers import LAYERS
from lorabench.adapters.stack import Stack
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import BaseInfo, is_inside
from lorabench.config.errors import ConfigError


@dataclass(frozen=True)
class _Entry:
    state: dict[str, Tensor]
    plan: SlicePlan


class Bank:
    """Adapters by name on one frozen base, for inference. Outside `use` and `rows` the model answers as the plain base.

    The stacked tensors are built when first needed after an `add` or a `remove`; the base is never read again.
    """

    def __init__(self, model: nn.Module, info: BaseInfo) -> None:
        self.model, self.info = model, info
        self._entries: dict[str, _Entry] = {}
        self._stack: Stack | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def add(self, name: str, source: str | Path | Mapping[str, Tensor], plan: SlicePlan | None = None) -> None:
        """Add an adapter from a folder (`save_slice`'s or PEFT's), or from a state with its plan.

        Raises `ConfigError` for a name in use, a full model, a folder that does not load, or a slice of another base.
        """
        if name in self._entries:
            raise ConfigError("name", name, f"a new name; loaded already: {', '.join(self.names)}")
        self.close()  # the base's own names and weights are needed below
        if isinstance(source, (str, Path)):
            state, plan = self._read(Path(source))
        else:
            assert plan is not None, "a state comes with its plan"
            state = {key: t.detach().clone() for key, t in source.items()}
        if plan.full:
            raise ConfigError("name", name, "an adapter; full fine-tuning is a base of its own")
        other = sorted({spec.kind for spec in plan.adapters.values()} - {"lora"})
        if other:
            raise ConfigError(
                "name", name, f"a LoRA adapter; {', '.join(other)} can be merged, but not served side by side"
            )
        self._check(state, plan)
        adapters = {layer: replace(spec, dropout=0.0) for layer, spec in plan.adapters.items()}
        self._entries[name] = _Entry(state, replace(plan, adapters=adapters))

    def remove(self, name: str) -> None:
        """Forget one adapter. Raises `ConfigError` for a name that is not loaded."""
        self._index([name])
        self.close()
        del self._entries[name]

    def close(self) -> None:
        """Take everything off the base: it is as it was, bit for bit. The adapters stay known by name."""
        if self._stack is not None:
            self._stack.remove()
            self._stack = None

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """Serve every row inside the block by one adapter; None: by the plain base."""
        index = self._index([name])
        with self._stack_of_all().active(index if name is not None else []):
            yield self.model

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """Serve row n of a batch of N inside the block by `names[n]`; None: by the plain base.

        Neighbours that share an adapter are computed together, so rows sorted by name cost least.
        """
        index = self._index(names)
        runs = [len(list(group)) for _, group in groupby(index)]
        block = math.gcd(*runs) if runs else 1
        with self._stack_of_all().active(index[::block]):
            yield self.model

    def _index(self, names: Sequence[str | None]) -> list[int]:
        known = {name: k for k, name in enumerate(self._entries, start=1)}
        unknown = [name for name in names if name is not None and name not in known]
        if unknown:
            raise ConfigError("name", unknown[0], f"loaded: {', '.join(known) or 'none'}")
        return [0 if name is None else known[name] for name in names]

    def _read(self, folder: Path) -> tuple[dict[str, Tensor], SlicePlan]:
        if (folder / PLAN_FILE).is_file() or not folder.is_dir():
            return load_slice(folder)
        adapter = read_peft(folder)
        own = self._parameters()
        for name, tensor in adapter.carried.items():
            if name not in own or not torch.equal(own[name].cpu(), tensor.to(own[name].dtype)):
                why = "this base's own weights; the file carries others (was the vocabulary resized?)"
                raise ConfigError("adapter", f"{folder}: {name}", why)
        return adapter.state, adapter.plan

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters(remove_duplicate=False)}

    def _check(self, state: Mapping[str, Tensor], plan: SlicePlan) -> None:
        """Raise `ConfigError` unless every tensor fits the base and no adapter lies inside a module that is whole."""
        own, layers = self._parameters(), self.info.by_name
        for name in plan.adapters:
            layer = layers.get(name)
            if layer is None or layer.kind not in LAYERS:
                raise ConfigError("adapter", name, "layers of this base that take adapters")
            a, b = state.get(f"{name}.lora_A"), state.get(f"{name}.lora_B")
            if a is None or b is None:
                raise ConfigError("adapter", name, "lora_A and lora_B for every layer of the plan")
            if a.shape[1] != layer.in_features or b.shape[0] != layer.out_features:
                sizes = f"in {layer.in_features}, out {layer.out_features}"
                raise ConfigError(
                    "adapter", f"{name}: lora_A {list(a.shape)}, lora_B {list(b.shape)}", f"shapes for {sizes}"
                )
        for name, tensor in state.items():
            if name.rpartition(".lora_")[0] not in plan.adapters and (
                name not in own or own[name].shape != tensor.shape
            ):
                shape = list(own[name].shape) if name in own else "no such parameter"
                raise ConfigError("adapter", f"{name} {list(tensor.shape)}", f"parameters of this base; it has {shape}")
        plans = [plan, *(entry.plan for entry in self._entries.values())]
        whole = {m for p in plans for m in p.modules}
        for name in sorted({name for p in plans for name in p.adapters}):
            if is_inside(name, whole):
                raise ConfigError("adapter", name, "a layer that no loaded adapter trains as part of a whole module")

    def _stack_of_all(self) -> Stack:
        """Return the stack of all entries, made when it is first needed.

        Slices of a pack train the same modules and biases: an entry that has none of its own there gets the base's.
        """
        if self._stack is None:
            plans = [entry.plan for entry in self._entries.values()]
            named = {m for plan in plans for m in plan.modules}
            modules = tuple(sorted(m for m in named if not is_inside(m, named - {m})))
            biases = tuple(sorted({b for plan in plans for b in plan.biases if not is_inside(b, modules)}))
            own = self._parameters()
            shared = {
                n: t.clone() for n, t in own.items() if is_inside(n, modules) or n.removesuffix(".bias") in biases
            }
            alike = [replace(plan, modules=modules, biases=biases) for plan in plans]
            self._stack = self._inject([SlicePlan(seed=0, modules=modules, biases=biases), *alike])
            self._stack.load_slice(0, shared)
            for k, entry in enumerate(self._entries.values(), start=1):
                self._stack.load_slice(k, shared | entry.state)
        return self._stack

    def _inject(self, plans: Sequence[SlicePlan]) -> Stack:
        model: Any = self.model
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        stack = inject(model, plans, info=self.info)
        if attention is not None and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(attention)  # eager is for training with dropout; nothing is dropped here
        stack.context.active = ()
        return stack
