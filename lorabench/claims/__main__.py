"""`python -m lorabench.claims <sweep dir>`: which claims of the literature a sweep's records bear out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.runtime.files import atomic_write
from lorabench.runtime.terminal import make_console, say
from lorabench.store.records import dump_json


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exit 0: judged, whatever the verdicts; 2: bad input, nothing written."""
    parser = argparse.ArgumentParser(
        prog="python -m lorabench.claims",
        description="Judge published claims about LoRA on a sweep's records: holds, contradicted, not enough evidence "
        "(and which runs would settle it), not applicable (and which condition is not met).",
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep's directory, such as sweeps/rank_sweep")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the verdicts here")
    args = parser.parse_args(argv)
    from lorabench.claims.judge import judge, rows, table
    from lorabench.results.sweep import load

    sweep = load(args.sweep)
    verdicts = judge(sweep)
    if args.json is not None:
        if args.json.is_dir():
            raise ConfigError("--json", str(args.json), "a file; this is a directory")
        atomic_write(args.json, dump_json({"sweep": sweep.name, "claims": rows(verdicts)}))
    make_console().print(table(sweep.name, verdicts))
    if sweep.edit_notice:
        say(sweep.edit_notice, error=True)


if __name__ == "__main__":
    sys.exit(main())
