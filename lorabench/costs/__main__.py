"""`python -m lorabench.costs <sweep dir>`: what adapters cost to keep and to serve, measured on this machine.

Writes <sweep>/analysis/costs.json, which the report reads (`report/costs.py`). Weights measured before under the same
conditions are not measured again. Torch is imported once there is something to measure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabench.costs.measurement import CostsRequest, measure_costs
from lorabench.runtime.command import command
from lorabench.runtime.progress_lines import ProgressLines
from lorabench.runtime.terminal import clean, make_console, say
from lorabench.store.analysis import COSTS_FILE


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.costs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What the adapters of a sweep cost to keep and to serve, one saved run a cell: bytes on disk, seconds to load and to\n"
        "switch, latency of a forward pass unmerged and merged, training memory against full fine-tuning (from the manifest).",
        epilog="Times are those of this machine's processor, with the threads torch takes (OMP_NUM_THREADS sets them): leave it\n"
        "alone while this runs. Ways that are compared take turns, so other work hits them alike, but it widens the spread.",
    )
    p.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep's directory, such as sweeps/rank_sweep")
    p.add_argument(
        "--cells", nargs="+", default=[], metavar="ID", help="these cells alone; * and ? match as in a shell"
    )
    p.add_argument(
        "--repeats",
        type=int,
        default=15,
        metavar="N",
        help="rounds a measure; at most 5 where the disk is read (default 15)",
    )
    p.add_argument("--again", action="store_true", help="measure what is known already, too")
    p.add_argument("--trust", action="store_true", help="let Python files run that records name (local, extra_metrics)")
    return p


# -- the face --------------------------------------------------------------------------------------------------------


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exit 0: written; 2: bad input."""
    args = parser().parse_args(argv)
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lorabench.report import table_formats as faces
    from lorabench.report.sections import costs as face

    asked, console = CostsRequest(tuple(args.cells), args.repeats, args.again, args.trust), make_console(stderr=True)
    lines = ProgressLines(f"measuring the costs of {args.sweep}", "measurements", enabled=not console.is_terminal)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with lines, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("costs", total=None)

        def tick(cell: str, done: int, total: int) -> None:
            bar.update(task, description=clean(cell), completed=done, total=total)
            lines.tick(done, total)

        doc = measure_costs(args.sweep, asked, tick)
    for made in face.tables(face.parse(doc)):
        make_console().print(faces.rich_table(made))
    say(f"costs: {COSTS_FILE.path(args.sweep)}")


if __name__ == "__main__":
    sys.exit(main())
