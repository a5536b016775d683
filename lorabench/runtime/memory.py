"""Memory of this process: its peak over a stretch of work, what is free, and giving freed memory back."""

from __future__ import annotations

import ctypes
import gc
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from lorabench.runtime import signals

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


class PeakMemory:
    """Peak bytes inside the block: of the device on CUDA, else of the whole process (resident).

    On Linux the kernel's high-water mark is reset on entry; elsewhere it is the process's peak so far. psutil has
    neither.
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
        """The peak so far, in bytes."""
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
    """Leave what is imported by now out of later garbage collections; once a process.

    Each collection would look through half a million objects of torch and transformers, .2 s a pack. Call it before
    anything of a pack is there: a frozen frame or cell keeps whatever it comes to refer to.
    """
    if not gc.get_freeze_count():
        with signals.delay_signal(signal.SIGINT):
            gc.collect()  # what is garbage already would stay for good
        gc.freeze()


def release_memory() -> None:
    """Give freed memory back to the system, which glibc puts off: a peak is then this stretch's own."""
    with signals.delay_signal(signal.SIGINT):  # inside a finalizer it would be lost
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed.

    torch has an error of its own on a GPU; on a CPU it is a RuntimeError that only its text tells apart.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def available_memory(device: str) -> int:
    """Bytes that a new pack may count on: free on the device with CUDA, else what system and container can hand out."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = _container_limit()
    return min(free, limit) if limit else free


def _container_limit() -> int | None:
    """Bytes that a container may still take, where one sets a limit (control groups, version 2); else None."""
    root = Path("/sys/fs/cgroup")
    try:
        return int((root / "memory.max").read_text()) - int((root / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
