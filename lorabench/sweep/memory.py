"""An estimate of a pack's peak memory."""

from __future__ import annotations

from typing import Any

RUNTIME_BYTES = 700 * 2**20  # Python, torch, transformers and a data set of some thousand texts, resident


CPU_ALLOCATOR_FACTOR = 1.8  # on a CPU the allocator holds on to what parts of many lengths leave behind


# How often a layer's input and output are held at the peak: for backward, norms, non-linearities, products under way.
ACTIVATION_COPIES = 3.5


def estimate_peak(info: Any, plans: Any, run: Any, *, dtype: str, device: str, part_tokens: int) -> int:
    """Return the bytes a pack needs at its peak: the process, weights, what trains with its AdamW state, activations.

    Activations are those of one part of full-length rows; attention keeps two T x T maps a head of width 64. The
    three constants above are fitted to the reference records, whose measured peaks a test holds against this.
    """
    size = {"float32": 4, "bfloat16": 2, "float64": 8}[dtype]
    tokens = run.task.longest or 256
    own = run.trainer.batch_size * tokens
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
