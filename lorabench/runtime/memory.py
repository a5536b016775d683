"""Peak memory of a stretch of work, and an estimate of it before anything runs."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from lorabench.runtime import signals as stopping

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Peak bytes inside the block: of the device on CUDA, else of this process (resident, the whole process).

    On Linux the kernel's high-water mark is reset on entry; elsewhere it is the process's peak so far.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        release_memory()
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


def freeze_heap() -> None:
    """Once a process, when all is imported: what stands now is left out of later collections, each of which otherwise looks
    through half a million objects of torch and transformers, .2 s a pack. To be called before anything of a pack is there: a
    frame that is frozen, or a cell of its, keeps what it comes to refer to."""
    if not gc.get_freeze_count():
        with stopping.delay_signal(signal.SIGINT):
            gc.collect()  # what is garbage already would stay for good
        gc.freeze()


def release_memory() -> None:
    """Give freed memory back to the system, which glibc puts off: a peak is then this stretch's own."""
    with stopping.delay_signal(signal.SIGINT):  # inside a finalizer it would be lost
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's own error on a GPU; on a CPU a RuntimeError that only its text tells apart."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def available_memory(device: str) -> int:
    """Bytes a new pack may count on: free on the device with CUDA, else what the system says it can hand out."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit = _group_limit()
    return min(free, limit) if limit else free


def _group_limit() -> int | None:
    """What a container may still take, where one sets a limit (control groups, version 2)."""
    root = Path("/sys/fs/cgroup")
    try:
        return int((root / "memory.max").read_text()) - int((root / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
