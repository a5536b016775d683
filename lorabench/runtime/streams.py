"""stdout and stderr that end no process: characters they cannot show, and places that take no more."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any

REPLACE = "lorabench.replace"  # the error handler of both streams
# What reports and tables write beyond ASCII and what a reader takes for the same, one for one: columns keep their width.
PLAIN = str.maketrans("−–—…×±Δαβ·’“”≤≥→✓", '---.x~Dab.\'""<>>+')


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Return a stand-in for characters that an encoding lacks: a minus stays a minus, what has none is a `?`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(PLAIN)
    return "".join(c if c.isascii() else "?" for c in lacking), error.end


codecs.register_error(REPLACE, _replace)


def prepare() -> None:
    """Let stdout and stderr replace what their encoding lacks, and stderr drop what cannot be written.

    What runs is not to fail because nobody can be told of it. A stream that was closed from the start leads nowhere:
    else the first file to be opened would take its place, and get what is printed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _guarded(stream, drops=name == "stderr"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors != REPLACE:
            stream.reconfigure(errors=REPLACE)


def _guarded(stream: io.TextIOWrapper, *, drops: bool) -> io.TextIOWrapper:
    """Return a stream that writes where this one does, by a `_Descriptor`."""
    raw = _Descriptor(stream.fileno(), drops)
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        REPLACE,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Descriptor(io.FileIO):
    """A file descriptor that keeps the error of a write that failed: buffers above it may forget what they held.

    drops: what cannot be written is dropped without an error, because the device is full or the reader gone.
    """

    def __init__(self, descriptor: int, drops: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.drops = drops
        self.failed: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as e:
            self.failed = self.failed or e
            if not self.drops:
                raise
            return memoryview(data).nbytes


def end_stdout() -> OSError | None:
    """Write out what stdout holds. Return why it could not be written, None where all was.

    It then leads nowhere, so that the interpreter's last flush is quiet. A full disk or a broken pipe may also be
    another one, such as a connection to a server: that is for others to say.
    """
    failed = None
    try:
        sys.stdout.flush()
    except OSError as e:
        failed = e
    buffer = getattr(sys.stdout, "buffer", None)
    failed = failed or getattr(getattr(buffer, "raw", buffer), "failed", None)
    if failed is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return failed
