"""What a stream cannot show is replaced; one that is full or closed ends a command in a line, and training not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import argparse, sys
from lorabench.runtime.command import command

@command
def main(argv=None):
    argparse.ArgumentParser(prog="x").parse_args(argv)
    for i in range(%d):
        print("Δ −6.9 ± 0.1 points – ü 東", i)
    print("r = 4 …", file=sys.stderr)

sys.exit(main())
"""
FEW, MANY = COMMAND % 1, COMMAND % 20_000
needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")


def run(code: str, *args: str, **how: object) -> subprocess.CompletedProcess[bytes]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.run([sys.executable, "-c", code, *args], timeout=60, check=False, **pipes)  # type: ignore


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "Δ −6.9 ± 0.1 points – ü 東 0"),
        ("latin-1", "D -6.9 ± 0.1 points - ü ? 0"),
        ("ascii", "D -6.9 ~ 0.1 points - ? ? 0"),
    ],
)
def test_what_a_stream_cannot_show_is_replaced(encoding: str, shown: str, unbuffered: str) -> None:
    made = run(FEW, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered})
    assert (made.returncode, made.stdout.decode(encoding)) == (0, shown + "\n")
    assert made.stderr.decode(encoding) == ("r = 4 …\n" if encoding == "utf-8" else "r = 4 .\n")


@needs_full_device
@pytest.mark.parametrize(("code", "args"), [(FEW, ()), (MANY, ()), (FEW, ("--help",))])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_ends_in_one_line(code: str, args: tuple[str, ...], unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        made = run(code, *args, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    said = made.stderr.decode().splitlines()
    assert made.returncode == 1
    assert [line for line in said if not line.startswith("r = 4")] == [
        "error: stdout cannot be written: No space left on device"
    ]


@needs_full_device
def test_a_full_stderr_fails_nothing() -> None:
    with open("/dev/full", "wb") as full:
        made = run(FEW, stderr=full)
    assert made.returncode == 0 and made.stdout.endswith(b" 0\n")


def test_closed_from_the_start_no_file_takes_its_place(tmp_path: Path) -> None:
    code = FEW.replace("for i in", f"f = open({str(tmp_path / 'data')!r}, 'w')\n    for i in")
    made = subprocess.run(
        ["/bin/sh", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code], timeout=60, check=False, capture_output=True
    )
    assert (made.returncode, made.stdout, made.stderr, (tmp_path / "data").read_text()) == (0, b"", b"", "")
