"""The frame of a command: what its errors print, and with which exit code it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

from lorabench.config.errors import ConfigError
from lorabench.runtime import streams
from lorabench.runtime.terminal import say

NESTED_TOO_DEEPLY = "error: a file that was read is nested too deeply (RecursionError); move it away, or make it anew"
Main = Callable[[Sequence[str] | None], int | None]


def command(main: Main) -> Callable[..., int]:
    """Turn a command's `main(argv)` into one that returns an exit code instead of raising.

    0, or what `main` returns; 2 for bad input and files that cannot be read or written, with one line on stderr that
    starts with `error:`; 130 for Ctrl-C; 1 where stdout cannot be written, as `report_output` says it.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        streams.prepare()
        try:
            code, error = main(argv) or 0, None
        except (ConfigError, OSError) as e:
            code, error = 2, e
        except RecursionError:
            say(NESTED_TOO_DEEPLY, error=True)
            return 2
        except KeyboardInterrupt:
            return 130
        except SystemExit:  # `--help`, and a command line that argparse refuses
            if report_output():
                return 1
            raise
        unwritten = report_output()
        if unwritten and not isinstance(error, ConfigError):
            return 1
        if error is not None:
            say(f"error: {error}", error=True)
        return code

    return run


def report_output() -> int:
    """Write out what stdout holds. Return 0 where all is written, else 1 after a line on stderr that says why.

    Nothing is said where nobody reads it any more: whoever closed it (`| head`) knows.
    """
    failed = streams.end_stdout()
    if failed is None:
        return 0
    if not isinstance(failed, BrokenPipeError):
        say(f"error: stdout cannot be written: {failed.strerror or failed}", error=True)
    return 1
