"""Peak memory of a stretch of work, and an estimate of it before anything runs."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Peak bytes inside the block: of the device on CUDA, else of this process (resident, the whole process).

    On Linux the kernel's high-water mark is reset on entry; elsewhere it is the process's peak so far.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        release()
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR.exists():
            try:
                _CLEAR.write_text("5")
            except OSError:
                pass
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def peak(self) -> int:
        if self.device == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated())
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def release() -> None:
    """Give freed memory back to the system, which glibc puts off: a peak is then this stretch's own."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def estimate(info: Any, plans: Any, run: Any, dtype: str) -> int:
    """Bytes a pack needs at most, before it runs: weights, what trains with its AdamW state, and activations.

    Activations: every token keeps each layer's input and output for the backward pass, about 1.5 times over for norms
    and non-linearities; attention keeps two T x T maps a head of width 64. The records hold the measured peak beside it.
    """
    size = {"float32": 4, "bfloat16": 2, "float64": 8}[dtype]
    tokens = getattr(run.task, "max_length", None) or 256
    rows = len(plans) * run.trainer.batch_size
    layers = [x for x in info.layers if x.kind in ("Linear", "Conv1D", "Conv2d")]
    widths = sum(x.in_features + x.out_features for x in layers)
    maps = 2 * info.num_layers * max(1, info.hidden_size // 64) * tokens * tokens
    activations = rows * (1.5 * tokens * widths + maps) * size
    trainable = sum(p.trainable(info) for p in plans)
    return int(info.parameters * size + trainable * 16 + activations)
