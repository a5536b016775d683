"""SIGTERM: this process ends soon with exit code 143, and lets go of what it holds on its way out. What is recorded
stays."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from threading import Thread, Timer, current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

EXIT_CODE = 143  # as a shell says it: 128 + SIGTERM
SAME_SIGNAL_SECONDS = 2.0  # a further signal within this time is the same one, told twice
_last_signal = [float("-inf")]  # when the last one came, by the steady clock
_unraisable_hooks: list[Callable[[Any], Any]] = []  # what hears of other exceptions that nobody can catch
_deferred: list[list[bool]] = []  # for each `defer_stop` that is open: what it has noted


def install() -> None:
    """Make SIGTERM raise `SystemExit(143)` wherever this process is, so that every lease and file is given up in order.

    A signal that comes soon after is the same one: `timeout` tells a process and then its group. It must not break off
    what the first has begun. A later one raises again.
    """
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, _stop)
        if sys.unraisablehook is not _repeat_unraisable:
            _unraisable_hooks[:] = [sys.unraisablehook]
            sys.unraisablehook = _repeat_unraisable


def _stop(*signal_and_frame: Any) -> None:
    before, _last_signal[0] = _last_signal[0], time.monotonic()
    if _last_signal[0] - before > SAME_SIGNAL_SECONDS:
        raise SystemExit(EXIT_CODE)


def _repeat_unraisable(what: Any) -> None:
    """Send SIGTERM once more where Python dropped the exit because it was raised in a finaliser (`__del__`)."""
    if isinstance(what.exc_value, SystemExit) and is_stopping():
        _last_signal[0] = time.monotonic() - 2 * SAME_SIGNAL_SECONDS
        repeat = Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        repeat.daemon = True
        repeat.start()
    else:
        _unraisable_hooks[0](what)


def is_stopping() -> bool:
    """Whether this process has been told to end: nothing may take long any more."""
    return _last_signal[0] > float("-inf")


@contextmanager
def defer_stop() -> Iterator[Callable[[], bool]]:
    """Only note SIGTERM inside the block. Gives a function that says whether it came.

    Whoever trains asks it, and ends where its state is whole. At the end of the block a signal that came is raised as
    `SystemExit(143)`, in place of whatever else is raised there.
    """
    if current_thread() is not main_thread():  # signals are the main thread's
        yield lambda: False
        return
    noted: list[bool] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(True)
        if callable(before) and before is not _stop:  # whoever else listens: a cluster's job
            before(number, frame)

    before = signal.signal(signal.SIGTERM, note)
    _deferred.append(noted)
    try:
        yield lambda: bool(noted)
    finally:
        _deferred.remove(noted)
        signal.signal(signal.SIGTERM, before)
        if noted:
            raise SystemExit(EXIT_CODE)


def watch_for_sigterm(leave: Callable[[], Any]) -> None:
    """Wait for SIGTERM in a thread, in a process whose threads block it; call `leave` when it comes.

    It is blocked where no handler may run in the middle of what the process does together with others. Inside
    `defer_stop` it is noted instead.
    """

    def wait_for_signal() -> None:
        signal.sigwait({signal.SIGTERM})
        if _deferred:
            _deferred[-1].append(True)
        else:
            leave()

    Thread(target=wait_for_signal, daemon=True, name="SIGTERM").start()


@contextmanager
def delay_signal(number: int) -> Iterator[None]:
    """Hold a signal back until the block is done, then raise it.

    A signal mask would not do. It is one thread's alone: where another thread takes the signal, Python still handles it
    in the main one. And a child process inherits it.
    """
    if current_thread() is not main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(number, lambda told, _: came.append(told))
    try:
        yield
    finally:
        signal.signal(number, before)
        if came:
            signal.raise_signal(number)


def map_in_order(threads: Executor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Give `function(item)` of each item in order, as `threads.map` does, in a main thread that signals are to reach.

    A signal that arrives just before a wait without an end would be heard only after it, so this waits in pieces. What
    has not begun is cancelled when the caller stops.
    """
    results = [threads.submit(function, item) for item in items]
    try:
        for result in results:
            while not wait([result], timeout=1).done:
                pass
            yield result.result()
    finally:
        for result in results:
            result.cancel()
