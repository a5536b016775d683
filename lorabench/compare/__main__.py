"""`python -m lorabench.compare <sweep A> <sweep B>`: two sweeps side by side, and what differs between them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.runtime.files import atomic_write
from lorabench.runtime.terminal import make_console, say


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0: compared; 1: shown, but the sweeps are not comparable; 2: bad input, nothing written."""
    parser = argparse.ArgumentParser(
        prog="python -m lorabench.compare",
        description="Two sweeps side by side: cells matched by method, r, alpha rule, targets and other axes. "
        "Exit code 1 where they cannot be compared, 2 for bad input.",
    )
    parser.add_argument("a", type=Path, metavar="SWEEP_A", help="a sweep's directory")
    parser.add_argument("b", type=Path, metavar="SWEEP_B", help="another; differences are B minus A")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the comparison here, as Markdown")
    args = parser.parse_args(argv)
    from lorabench.compare.comparison import compare, markdown, terminal_parts
    from lorabench.results.sweep import load

    sweeps = load(args.a), load(args.b)
    comparison = compare(*sweeps)
    if args.out is not None:
        if args.out.is_dir():
            raise ConfigError("--out", str(args.out), "a file; this is a directory")
        atomic_write(args.out, markdown(comparison))
    console = make_console()
    for part in terminal_parts(comparison):
        console.print(part)
    for sweep in sweeps:
        if sweep.edit_notice:
            say(f"{sweep.name}: {sweep.edit_notice}", error=True)
    return 1 if comparison.obstacles else 0


if __name__ == "__main__":
    sys.exit(main())
