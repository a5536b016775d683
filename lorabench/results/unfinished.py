"""A sweep that has not ended: what is missing, and the command that goes on with it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lorabench.results.cells import Result
from lorabench.results.findings import Findings
from lorabench.results.formatting import name_some, plural
from lorabench.results.sweep import Sweep

MAX_NAMED_CELLS = 4  # cells named one by one


def tuning_progress(sweep: Sweep) -> tuple[int, int]:
    """Tuning runs that have ended, and those that are planned."""
    planned = {i for c in sweep.cells for i in c.tune}
    return len(planned & sweep.records.keys()), len(planned)


def cells_without_runs(f: Findings) -> list[Result]:
    """Cells of which no run has ended."""
    return [r for r in f.results.values() if not f.sweep.records_of((*r.cell.tune, *r.cell.confirm))]


def name_list(cells: list[Result]) -> str:
    """`A, B, C, D and 5 more`."""
    return name_some([r.name for r in cells], MAX_NAMED_CELLS)


def missing_runs(f: Findings) -> str:
    """Which runs, by phase and cell; empty where all have ended."""
    said = []
    for role, what in (("tune", "tuning run"), ("confirm", "confirmation run")):
        cells = {r.id: [i for i in getattr(r.cell, role) if i not in f.sweep.records] for r in f.results.values()}
        runs = {i for ids in cells.values() for i in ids}
        if runs:
            few = [r for r in f.results.values() if cells[r.id]]
            of = f"{len(few)} of {plural(len(f.results), 'cell')}" if len(few) > MAX_NAMED_CELLS + 1 else name_list(few)
            said.append(f"{plural(len(runs), what)} ({of})")
    return " and ".join(said)


HOW_TO_CONTINUE = (
    "the command that began it, overrides included, goes on where it stopped; what has ended is not trained again"
)


def continue_command(sweep: Sweep, changes: Sequence[str] = ()) -> str | None:
    """That command, with overrides that take the place of its own. Of an older manifest, which does not know overrides, without them; None where it does not know the
    experiment either.

    For the directory above `sweeps`. A sweep that lies under its own name needs no more than that name.
    """
    experiment, folder = sweep.manifest.get("experiment"), sweep.store.root.resolve()
    if launched := sweep.manifest.get("command"):
        there = f"sweep.dir={folder.parent.name}/{folder.name}"
        keys = {c.split("=")[0] for c in changes}
        words = [w for w in launched if not w.startswith("sweep.dir=") or w.endswith(folder.name)]
        words = [w for w in words if w.split("=")[0] not in keys]
        placed = folder.name == sweep.name or any(w.startswith("sweep.dir=") for w in words)
        return shlex.join(["python", "-m", "lorabench", *words, *([] if placed else [there]), *changes])
    if not experiment:
        return None
    words = ["python", "-m", "lorabench", f"+experiment={experiment}"]
    if folder.name != sweep.name:
        words.append(f"sweep.dir={folder.parent.name}/{folder.name}")
    elif sweep.name != experiment:
        words.append(f"sweep.name={sweep.name}")
    return " ".join(shlex.quote(w) for w in (*words, *changes))
