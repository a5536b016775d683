"""The frame of a command: what its errors print, and with which exit code it ends."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from functools import wraps

from lorabench.config.errors import ConfigError
from lorabench.runtime.terminal import say

NESTED_TOO_DEEPLY = "error: a file that was read is nested too deeply (RecursionError); move it away, or make it anew"
Main = Callable[[Sequence[str] | None], int | None]


def command(main: Main) -> Callable[..., int]:
    """Turn a command's `main(argv)` into one that returns an exit code instead of raising.

    0, or what `main` returns; 2 for bad input and files that cannot be read or written, with one line on stderr that
    starts with `error:`; 130 for Ctrl-C. Where nobody reads the output any more, it is 1 and nothing is said.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except (ConfigError, OSError) as e:
            if isinstance(e, BrokenPipeError) and _is_output_closed():
                return 1
            say(f"error: {e}", error=True)
            return 2
        except RecursionError:
            say(NESTED_TOO_DEEPLY, error=True)
            return 2
        except KeyboardInterrupt:
            return 130

    return run


def _is_output_closed() -> bool:
    """Whether nobody reads stdout any more; it is then led to nowhere, so that the interpreter's last flush is quiet.

    A broken pipe may also be another one, such as a connection to a server: that is an error to be said.
    """
    try:
        output = sys.stdout.fileno()
    except OSError:  # a stand-in without a file
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
