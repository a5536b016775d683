"""One child process: its wall-clock seconds and its peak memory, from the moment it is started to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabench.runtime import signals
from lorabench.runtime.files import cache_root

REPO = Path(__file__).resolve().parent.parent
POLL = 0.2  # seconds between two looks at a child's memory
TAIL = 15  # lines of a failed child's output that are shown


class BenchmarkFailed(Exception):
    """A variant did not finish, or did other work than its peers. code: of exit, 2 for bad input, as its child had it."""

    def __init__(self, message: str, code: int = 1) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True)
class Finished:
    """seconds: from launch to end. cpu_seconds: of all its threads. peak_memory_bytes: its largest resident memory."""

    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


def environment(device: str, folder: Path) -> dict[str, str]:
    """Equal for all children: this checkout's code, no questions to a hub, one GPU at most, and an empty cache.

    lorabench keeps tokenised rows from one call to the next; here each call tokenises anew, as its peers do. Weights that
    were converted before (gguf) are used by all.
    """
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH", "")]))
    env.setdefault("HF_HUB_OFFLINE", "1")
    env["LORABENCH_CACHE"] = str(empty_cache(folder / "cache"))
    if device == "cuda":
        env.setdefault("CUDA_VISIBLE_DEVICES", "0")
    return env


def empty_cache(own: Path) -> Path:
    """A cache folder that holds converted weights, where there are any, and nothing else."""
    converted = cache_root() / "gguf"
    own.mkdir(parents=True, exist_ok=True)
    if converted.is_dir() and not (own / "gguf").exists():
        (own / "gguf").symlink_to(converted.resolve())
    return own


def launch(name: str, arguments: Sequence[str], *, folder: Path, device: str) -> Finished:
    """Run `python <arguments>` in `folder`, its output in <folder>/log.txt. Raises `BenchmarkFailed` when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    command = [sys.executable, *arguments]
    with open(log, "wb") as out:
        env = environment(device, folder)
        child = watch = None
        start = time.perf_counter()
        try:
            with signals.delay_signal(signal.SIGTERM):  # inside `Popen` it would leave a child that nobody knows
                child = subprocess.Popen(
                    command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
                )
            watch = _Watch(child.pid)
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            if child:
                child.terminate()
                child.wait()
            raise
        finally:
            watched = watch.stop() if watch else 0
        seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        message = "\n".join([f"{name} ended with exit code {child.returncode}", *tail])
        raise BenchmarkFailed(message, 2 if child.returncode == 2 else 1)
    scale = 1 if sys.platform == "darwin" else 1024
    return Finished(seconds, usage.ru_utime + usage.ru_stime, max(watched, usage.ru_maxrss * scale))


class _Watch:
    """Looks at the high-water mark of a process until told to stop.

    The kernel's own total at the end is not enough: a process may reset its mark, as lorabench does for each pack.
    """

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self._peak, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(POLL):
            self._peak = max(self._peak, high_water(self._path))

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self._peak


def high_water(status: Path) -> int:
    """VmHWM of a /proc/<pid>/status in bytes; 0 where there is none (another system, or the process has ended)."""
    try:
        text = status.read_text()
    except (OSError, ValueError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM")), 0)
