"""`python -m lorabench.report <sweep dir>`: render a sweep's report again, at any time, from its records alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabench.schema import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m lorabench.report",
        description="Render a sweep's report from its records: report.html, report.md, runs.csv, figures/, tables/.",
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep's directory, such as sweeps/rank_sweep")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: reports/<name of the directory>)"
    )
    parser.add_argument("--title", help="the report's title (default: the sweep's name)")
    parser.add_argument(
        "--margin", type=float, metavar="X", help="another margin than the study declares, printed as post hoc (default folder: <name>-post-hoc)"
    )  # fmt: skip
    args = parser.parse_args(argv)
    from lorabench.report import render

    try:
        name = args.sweep.resolve().name + (
            "" if args.margin is None else "-post-hoc"
        )  # never over the declared report
        made = render(args.sweep, args.out or Path("reports", name), title=args.title, margin=args.margin)
    except (ConfigError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(made.lead)
    for warning in made.warnings:
        print(f"- {warning}")
    print(f"report: {made.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
