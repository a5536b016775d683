"""One small pass through the loaded base before anything is written: is padding harmless, does every adapter act?

Raises `ConfigError` that names the layers and the targets to take instead.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lorabench.adapters import IdleAdapters, Stack, check_adapters_act, inject
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import Base, BaseInfo
from lorabench.config.contracts.task import Encoded, Task
from lorabench.config.errors import ConfigError
from lorabench.config.overrides import quote
from lorabench.config.runs import RunConfig, digest
from lorabench.methods.targets import suffixes
from lorabench.store.records import Store
from lorabench.training import precision, preparation
from lorabench.training.padding import check_padding
from lorabench.training.preparation import Prepared

ROWS = 2  # of each slice in a batch
BATCHES = 16  # at most, while an adapter has had no gradient
CANDIDATES = 64  # examples of which the shortest are taken
MIN_UNITS = 8  # shorter ones may tell too little: over one token attention is a constant
NAMED = 4  # layers that an error lists

_known: set[str] = set()  # hashes of bases, tasks and plans that passed in this process


def check_runs(runs: Sequence[RunConfig], store: Store, *, max_pack: int | None = None) -> None:
    """Raise `ConfigError` for the first run whose base makes its losses depend on padding, or whose adapter is idle.

    One pass for runs of equal layers. It loads the base, which the packs of this process then find loaded. A run whose
    folder is there has passed. max_pack: runs that may train together; None: any number.
    """
    begun = set(store.run_ids())
    for run in runs:
        if run.run_id in begun:
            continue
        plan = preparation.slice_plan(run, preparation.base_info(run))
        key = _key(run, plan)
        if key in _known:
            continue
        prepared = preparation.prepare(run)
        base = preparation.load_base(run, prepared.head, precision.resolve_in_sweep(run, store))
        prepared = _teach_few(run, prepared, base.model)
        check_padding(run, base.model, prepared, pack_size=max_pack or len(runs))
        if plan.adapters:
            _check_plan(run, base, prepared)
        _known.add(key)


def _check_plan(run: RunConfig, base: Base, prepared: Prepared) -> None:
    """Put a run's adapters onto the base, check them, and take them off again."""
    stack = inject(base.model, [preparation.slice_plan(run, base.info)], info=base.info)
    try:
        check_stack(base.model, stack, [run], prepared, base.info)
    finally:
        stack.remove()
        base.model.eval()


def check_stack(model: nn.Module, stack: Stack, runs: Sequence[RunConfig], prepared: Prepared, info: BaseInfo) -> None:
    """Raise `ConfigError` where an adapter of a slice does not act. Plans that passed before are taken as they are.

    runs: one a slice, all with one task and base.
    """
    keys = {_key(run, plan) for run, plan in zip(runs, stack.plans, strict=True)}
    if stack.plans[0].full or keys <= _known:
        return
    try:
        check_adapters_act(model, stack, _forwards(model, stack, runs[0].task, prepared))
    except IdleAdapters as e:
        raise _explain(e, runs[0], info) from e
    _known.update(keys)


def _key(run: RunConfig, plan: SlicePlan) -> str:
    """Return a hash of what decides whether adapters act: base, task, and which kind stands on which layer."""
    adapters: dict[str, Any] = {name: [spec.kind, spec.init, spec.r > 0] for name, spec in plan.adapters.items()}
    return digest(
        [
            dataclasses.asdict(run.model),
            dataclasses.asdict(run.task),
            adapters,
            list(plan.modules),
            run.trainer.precision,
        ]
    )


def _forwards(model: nn.Module, stack: Stack, task: Task, prepared: Prepared) -> Iterator[Callable[[], Tensor]]:
    """Give forward passes over ever more training examples: per-example losses [N] of `ROWS` rows a slice."""
    examples = _short_examples(task, prepared.encoded)
    device = next(model.parameters()).device
    rows = ROWS * stack.size
    for at in range(0, min(BATCHES * ROWS, max(ROWS, len(examples))), ROWS):
        own = [examples[(at + i) % len(examples)] for i in range(ROWS)]
        batch = task.collate((own * stack.size)[:rows], prepared.processor)
        batch = {name: value.to(device) for name, value in batch.items()}
        stack.context.set(seeds=[p.seed for p in stack.plans], step=0, examples=batch["example"])
        yield lambda batch=batch: task.step(model, batch).loss_sum  # type: ignore[misc]


def _short_examples(task: Task, encoded: Encoded) -> list[dict[str, Any]]:
    """Return some training examples, those first that are short but not tiny."""
    examples = encoded.splits["train"][:CANDIDATES]
    lengths = encoded.lengths.get("train") or [task.work_units(e) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (lengths[i] < MIN_UNITS, lengths[i]))
    return [examples[i] for i in order]


def _teach_few(run: RunConfig, prepared: Prepared, model: nn.Module) -> Prepared:
    """Return the examples of the check with targets that the base gives, if the task is taught by it."""
    if not run.task.is_taught:
        return prepared
    few = Encoded(
        {name: rows[:CANDIDATES] for name, rows in prepared.encoded.splits.items()},
        {name: units[:CANDIDATES] for name, units in prepared.encoded.lengths.items()},
        prepared.encoded.notes,
    )
    taught = run.task.teach(copy.deepcopy(model).float(), few, lambda e: run.task.collate(e, prepared.processor))
    return dataclasses.replace(prepared, encoded=taught)


def _explain(e: IdleAdapters, run: RunConfig, info: BaseInfo) -> ConfigError:
    """Return the error that names the layers, what is wrong with them, and the targets that are left."""
    reasons = []
    if e.bypassed:
        reasons.append(f"an adapter cannot stand for {_listed(e.bypassed)}, which compute more than their weight")
    if e.idle:
        reasons.append(
            f"an adapter on {_listed(e.idle)} would get no gradient: this task's loss does not depend on it, or the "
            "base reads the weight and calls no layer"
        )
    target = getattr(run.method, "target_modules", None)
    if not e.acting:
        return ConfigError("method.target_modules", target, f"{'; '.join(reasons)}; target other layers")
    return ConfigError("method.target_modules", target, f"{'; '.join(reasons)}; {_way_out(e, info)}")


def _way_out(e: IdleAdapters, info: BaseInfo) -> str:
    """Return the override that targets the acting layers alone."""
    acting = [x for x in info.layers if x.name in set(e.acting)]
    wrong = [*e.bypassed, *e.idle]
    names = suffixes(acting)
    if not any(name == suffix or name.endswith(f".{suffix}") for name in wrong for suffix in names):
        return f"the others are method.target_modules=[{','.join(names)}]"
    patterns = sorted({re.sub(r"\d+", "[0-9]+", name) for name in e.acting})
    if any(re.fullmatch("|".join(patterns), name) for name in wrong):
        patterns = list(e.acting)
    return f"the others are method.target_modules={quote('|'.join(patterns))}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
