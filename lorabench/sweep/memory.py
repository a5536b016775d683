"""An estimate of a pack's peak memory, and what to say where a machine has less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lorabench.config.contracts.method import SlicePlan
from lorabench.config.runs import Pack, RunConfig
from lorabench.results import formatting
from lorabench.runtime.memory import available_memory
from lorabench.training import precision, preparation

RUNTIME_BYTES = 700 * 2**20  # Python, torch, transformers and a data set of some thousand texts, resident

CPU_ALLOCATOR_FACTOR = 1.8  # on a CPU the allocator holds on to what parts of many lengths leave behind

# How often a layer's input and output are held at the peak: for backward, norms, non-linearities, products under way.
ACTIVATION_COPIES = 3.5

MAX_LINES = 3  # about packs that do not fit


def estimate_pack(runs: Sequence[RunConfig], plans: Sequence[SlicePlan], auto: str | None) -> int:
    """Return the bytes that runs of one base need at their peak, as their data are.

    auto: what `trainer.precision=auto` means, as in `precision.resolve`.
    """
    first, resolved = runs[0], precision.resolve(runs[0], auto)
    return estimate_peak(
        preparation.base_info(first),
        plans,
        first,
        dtype=resolved.base_dtype,
        device=resolved.device,
        part_tokens=resolved.part_tokens,
        lengths=preparation.prepare(first).encoded.lengths["train"],
    )


def shortages(packs: Sequence[Pack], sizes: Sequence[int], device: str) -> Iterator[str]:
    """Yield a line for each pack that is estimated to need more memory than is free, for the first few.

    sizes: bytes of each.
    """
    free = available_memory(device)
    large = [(pack, size) for pack, size in zip(packs, sizes, strict=True) if size > free]
    for pack, size in large[:MAX_LINES]:
        yield (
            f"{pack.id}: an estimated {formatting.memory(size)}, more than the {formatting.memory(free)} that are "
            f"free here; it takes less with {_ways_to_save(pack)}"
        )
    if len(large) > MAX_LINES:
        yield f"and {formatting.plural(len(large) - MAX_LINES, 'more pack')} likewise"


def _ways_to_save(pack: Pack) -> str:
    """Return settings that make a pack smaller, as they are typed."""
    t, rows = pack.runs[0].trainer, len(preparation.prepare(pack.runs[0]).encoded.splits["train"])
    batch = min(t.batch_size, rows)
    smaller = f"trainer.batch_size={batch // 2} trainer.accumulate_grad_batches={2 * t.accumulate_grad_batches}"
    ways = [f"sweep.max_pack={len(pack.runs) // 2}"] if len(pack.runs) > 1 else []
    ways += [smaller] if batch > 1 else []
    return " or ".join(ways) or "a smaller base or shorter examples"


def estimate_peak(
    info: Any,
    plans: Any,
    run: Any,
    *,
    dtype: str,
    device: str,
    part_tokens: int,
    lengths: Sequence[int] | None = None,
) -> int:
    """Return the bytes a pack needs at its peak: the process, weights, what trains with its AdamW state, activations.

    Activations are those of one part of the longest rows; attention keeps two T x T maps a head of width 64. lengths:
    work units of each training example, so that no batch has more rows than there are; None: as long as the task
    allows. The three constants above are fitted to the reference records, whose measured peaks a test holds against
    this.
    """
    size = {"float32": 4, "bfloat16": 2, "float64": 8}[dtype]
    tokens = max(lengths) if lengths else run.task.longest or 1
    own = min(run.trainer.batch_size, len(lengths or ()) or run.trainer.batch_size) * tokens
    rows = min(len(plans) * own, max(part_tokens, own)) / tokens
    layers = [x for x in info.layers if x.kind in ("Linear", "Conv1D", "Conv2d")]
    widths = sum(x.in_features + x.out_features for x in layers)
    maps = 2 * info.num_layers * max(1, info.hidden_size // 64) * tokens * tokens
    frozen_trunk = not any(p.adapters or p.biases or p.full for p in plans)  # a head alone keeps nothing of the trunk
    activations = (
        rows
        * ((1 if frozen_trunk else ACTIVATION_COPIES) * tokens * widths + maps)
        * size
        / (len(layers) if frozen_trunk else 1)
    )
    trainable = sum(p.trainable(info) for p in plans)
    moving = trainable * 16 + activations
    return int(info.parameters * size + (RUNTIME_BYTES + CPU_ALLOCATOR_FACTOR * moving if device == "cpu" else moving))
