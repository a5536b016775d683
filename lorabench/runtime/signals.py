"""SIGTERM: this process ends soon, with exit code 143, and on its way out lets go of what it holds. What is recorded stays."""

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
SAME_SIGNAL_SECONDS = 2.0  # seconds in which further signals are the same one, told twice
_told = [float("-inf")]  # when the last one came, by the steady clock
_hooks: list[Callable[[Any], Any]] = []  # what hears of other exceptions that nobody can catch
_deferred: list[list[bool]] = []  # what is noted wherever it is deferred now


def install() -> None:
    """From now on SIGTERM raises `SystemExit(143)` wherever this process is, so that every lease and file is given up in order.

    A signal that comes soon after is the same one (`timeout` tells a process and then its group): it must not break off what
    the first has begun. A later one raises again.
    """
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, _stop)
        if sys.unraisablehook is not _ignored:
            _hooks[:] = [sys.unraisablehook]
            sys.unraisablehook = _ignored


def _stop(*signal_and_frame: Any) -> None:
    before, _told[0] = _told[0], time.monotonic()
    if _told[0] - before > SAME_SIGNAL_SECONDS:
        raise SystemExit(EXIT_CODE)


def _ignored(what: Any) -> None:
    """Python drops what is raised in a finaliser (`__del__`), where signals come often: told once more, a moment later."""
    if isinstance(what.exc_value, SystemExit) and is_stopping():
        _told[0] = time.monotonic() - 2 * SAME_SIGNAL_SECONDS
        again = Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()
    else:
        _hooks[0](what)


def is_stopping() -> bool:
    """Whether this process is on its way out: nothing may take long any more."""
    return _told[0] > float("-inf")


@contextmanager
def defer_stop() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is only noted, and whoever trains asks (what is given here) and ends where its state is whole. It is
    raised as `SystemExit(143)` at the latest at the end, in place of whatever else is raised there."""
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
    """For a process in whose threads SIGTERM is blocked, so that no handler runs in the middle of what it does together with
    others: a thread waits for it. Where it is deferred it is noted as ever, elsewhere that thread calls `leave`."""

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        if _deferred:
            _deferred[-1].append(True)
        else:
            leave()

    Thread(target=wait, daemon=True, name="SIGTERM").start()


@contextmanager
def delay_signal(number: int) -> Iterator[None]:
    """A signal that comes inside is heard when the block is done. A signal mask would not do, being one thread's alone: where
    another thread takes the signal, Python still handles it in the main one; and a child inherits it."""
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


def map_in_order(threads: Executor, one: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """As `threads.map(one, items)`, for a main thread that signals are to reach: one that arrives just before a wait without
    an end would be heard only after it, so this one waits in pieces. What has not begun is cancelled when nobody asks on."""
    results = [threads.submit(one, item) for item in items]
    try:
        for result in results:
            while not wait([result], timeout=1).done:
                pass
            yield result.result()
    finally:
        for result in results:
            result.cancel()
