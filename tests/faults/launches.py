"""`python -m lorabench` as a real process that may be killed: forked from one that has imported everything (`warm`)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")


class Launcher:
    """A launcher at work in a folder."""

    def __init__(self, folder: Path, argv: list[str], **troubles: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._heard, told = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_launch, args=(str(folder), argv, told, troubles))
        self.process.start()
        told.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ended(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def wait(self) -> tuple[int, str]:
        """Exit code (minus a signal's number) and what it has said."""
        assert self.ended(240), f"no end: {self.said()}"
        assert self.process.exitcode is not None
        return self.process.exitcode, self.said()

    def said(self) -> str:
        os.set_blocking(self._heard.fileno(), False)
        parts: list[bytes] = []
        try:
            while part := os.read(self._heard.fileno(), 1 << 16):
                parts.append(part)
        except BlockingIOError:
            pass
        return b"".join(parts).decode(errors="replace")

    def signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join()

    def until(self, seen: Callable[[], Any]) -> None:
        """Wait until something can be seen, while the launcher is at work."""
        deadline = time.monotonic() + 120
        while not seen():
            assert not self.ended(0.005) and time.monotonic() < deadline, self.said()


def _launch(folder: str, argv: list[str], told: Connection, troubles: dict[str, Any]) -> None:
    for number in (1, 2):
        os.dup2(told.fileno(), number)
    os.chdir(folder)
    from troubles import bring

    bring(troubles)
    sys.argv = ["lorabench", *argv]
    from lorabench.__main__ import main

    code: Any = 0
    try:
        main()
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
