"""`python -m lorabench.analyze <sweep dir>`: what a sweep's adapters did to the weights, measured from what was saved.

It writes <sweep>/analysis/weights.json, which the report reads (`results/weights.py`). Runs whose weights were measured
before are not measured again. Torch is imported once there is something to measure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabench.runtime.command import command
from lorabench.runtime.progress_lines import ProgressLines
from lorabench.runtime.terminal import make_console, say
from lorabench.store.analysis import WEIGHTS_FILE


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.analyze",
        description="Norms, ranks, subspaces and intruder dimensions of what a sweep's runs trained, from saved weights.",
    )
    p.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep's directory, such as sweeps/rank_sweep")
    p.add_argument(
        "--cells", nargs="+", default=[], metavar="ID", help="these cells alone; * and ? match as in a shell"
    )
    p.add_argument("--layers", nargs="+", default=[], metavar="NAME", help="layers by name or its end, such as query")
    p.add_argument(
        "--intruders",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count intruder dimensions, which takes an SVD of every layer's whole weight (default: yes)",
    )
    p.add_argument("--trust", action="store_true", help="let Python files run that records name (local, extra_metrics)")
    return p


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exit with 0 where the file is written, with 2 for bad input."""
    args = parser().parse_args(argv)
    from rich.progress import Progress

    from lorabench.analyze.measurement import measure_weights
    from lorabench.analyze.scope import WeightsRequest
    from lorabench.report import table_formats
    from lorabench.report.sections import weights
    from lorabench.results.weights import parse

    request = WeightsRequest(tuple(args.cells), tuple(args.layers), args.intruders, args.trust)
    console = make_console(stderr=True)
    lines = ProgressLines(f"measuring the weights of {args.sweep}", "layers", enabled=not console.is_terminal)
    with lines, Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("layers", total=None)

        def tick(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            lines.tick(done, total)

        doc = measure_weights(args.sweep, request, tick)
    make_console().print(table_formats.rich_table(weights.table(weights.tidy_rows(parse(doc)))))
    say(f"analysis: {WEIGHTS_FILE.path(args.sweep)}")


if __name__ == "__main__":
    sys.exit(main())
