"""`python -m lorabench.report <sweep dir>`: render a sweep's report again, at any time, from its records alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.runtime.terminal import say


@command
def main(argv: Sequence[str] | None = None) -> None:
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
        "--margin",
        type=float,
        metavar="X",
        help="another margin than the study declares, printed as post hoc (default folder: <name>-post-hoc)",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="another metric of the test results than the declared one (an attached evaluation), post hoc; "
        "with --margin",
    )
    parser.add_argument("--lower-is-better", action="store_true", help="of that metric less is more")
    args = parser.parse_args(argv)
    from lorabench.report import render
    from lorabench.results.sweep import OtherMetric

    if args.lower_is_better and args.metric is None:
        raise ConfigError("--lower-is-better", True, "with --metric: of the declared metric the study's task says it")
    other = None if args.metric is None else OtherMetric(args.metric, args.lower_is_better)
    declared = args.margin is None and other is None
    name = args.sweep.resolve().name + ("" if declared else "-post-hoc")  # never over the declared report
    out = args.out or Path("reports", name)
    summary = render(args.sweep, out, title=args.title, margin=args.margin, metric=other)
    say(summary.lead)
    for warning in summary.warnings:
        say(f"- {warning}")
    say(f"report: {summary.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
