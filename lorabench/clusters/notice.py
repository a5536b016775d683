"""How a job hears that its time is up, and what it does then: it ends the step, writes a checkpoint, asks for a
requeue.

SIGUSR2 is the signal that submitit asks Slurm for, `signal_delay_s` before the time limit; SIGTERM comes with a
preemption, with the limit itself, and with `scancel`. <sweep dir>/locks/jobs/<pack>.left.json is what a job that left
says of it.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from subprocess import SubprocessError
from types import FrameType
from typing import Any

from lorabench.clusters import slurm
from lorabench.runtime.terminal import say

PREEMPTED, TIME_LIMIT, STOPPED = "preempted", "time limit", "stopped"


class Notice:
    """What a job has heard of its end; a context manager, for the main thread.

    While a pack trains (`signals.defer_stop`), the first signal ends training after the step under way, with a
    checkpoint (`fit`). At other times SIGTERM leaves at once, and SIGUSR2 is only noted: the pack may be done before
    its limit.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self._leaving = False

    def __enter__(self) -> Notice:
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGUSR2)}
        return self

    def __exit__(self, *args: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = self.heard or number
        training: Any = signal.getsignal(signal.SIGTERM)
        if training != self._hear:  # `signals.defer_stop`'s or Lightning's before it, which calls this one too
            if number == signal.SIGUSR2:
                training(signal.SIGTERM, frame)
            self._leaving = True
        elif number == signal.SIGTERM and not self._leaving:
            self._leaving = True
            raise SystemExit(143)

    def why(self, job: str, *, on_slurm: bool) -> str:
        """Return what the signal stood for: `PREEMPTED`, `TIME_LIMIT` or `STOPPED`."""
        if on_slurm and slurm.is_being_preempted(job):
            return PREEMPTED
        return TIME_LIMIT if self.heard == signal.SIGUSR2 else STOPPED


def requeue(environment: Any) -> None:
    """Ask for another start of this job. Where that is refused, a launcher submits the pack again."""
    with suppress(SubprocessError, OSError):
        environment._requeue(0)  # submitit's: scontrol on Slurm, an exit code on this machine
        return
    say(f"job {environment.job_id} was not requeued", error=True)
