"""The frame of a command: exit codes and what stands on stderr."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Sequence

import pytest

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command


def run(error: BaseException | int | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    @command
    def main(argv: Sequence[str] | None = None) -> int | None:
        if isinstance(error, BaseException):
            raise error
        return error

    return main([]), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (ConfigError("--every", 0, "at least 1"), 2, "error: --every=0: at least 1\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "error: [Errno 32] Broken pipe\n"),  # another's, not stdout
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, text, capsys):
    assert run(error, capsys) == (code, text)


def test_other_errors_are_ours_to_see(capsys):
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError(), capsys)


def test_an_output_that_nobody_reads_ends_it_quietly():
    code = """
import sys
from lorabench.runtime.command import command

@command
def main(argv=None):
    for i in range(100_000):
        print(i)

sys.exit(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")
