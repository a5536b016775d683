"""`python -m lorabench.slim <sweep dir> <folder>`: a copy of a sweep that is small enough for git, and enough for
reports.

It holds records, histories, per-example results, samples and what `lorabench.analyze` and `lorabench.costs` measured.
It holds no weights, checkpoints, leases or caches. What the runs' test results have in common stands once
(`store.arrays`). Of the training rows of a history it may hold every N-th (`--every`); every row of an evaluation
stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.runtime.files import atomic_folder, check_empty
from lorabench.runtime.terminal import say
from lorabench.store.analysis import COSTS_FILE, WEIGHTS_FILE
from lorabench.store.arrays import SHARED_FILE, pack_columns, shared_columns, slim_columns
from lorabench.store.integrity import damaged_files
from lorabench.store.records import HISTORY, MANIFEST, Store

RUN_FILES = ("run.json", HISTORY, "samples.json")
SWEEP_FILES = (MANIFEST, *(str(file.relative_path) for file in (WEIGHTS_FILE, COSTS_FILE)))
TRAINING_KEYS = {"step", "train/loss", "lr"}  # what a training row says; an evaluation's says more


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.slim",
        description="Copy a sweep without weights, checkpoints and caches: small enough for git, whole enough for reports. "
        "Runs without a record are left out.",
    )
    p.add_argument("sweep", type=Path, help="a sweep's directory")
    p.add_argument("out", type=Path, help="where to: a folder that does not exist yet, or an empty one")
    p.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="of the training rows of a history keep those of every N-th step (default 1: all)",
    )
    return p


def slim(sweep: Path, out: Path, *, every: int = 1) -> str:
    """Copy a sweep to `out`, whole or not at all, and return a line about the copy.

    every: keep the training rows of every so many steps. Raises `ConfigError` for a directory that is no sweep, for
    results that are torn, and for an `out` that holds files.
    """
    if every < 1:
        raise ConfigError("--every", every, "a number of steps, at least 1")
    if not (sweep / MANIFEST).is_file():
        raise ConfigError("sweep", str(sweep), f"a sweep's directory; there is no {MANIFEST} in this one")
    check_empty(out, "out")
    if out.resolve().is_relative_to(sweep.resolve()):
        raise ConfigError("out", str(out), "a folder outside the sweep")
    store = Store(sweep)
    store.check_foreign()
    ids = [i for i in store.run_ids() if store.stamp(i) is not None]
    for run_id, name in damaged_files(store, ids).items():
        raise ConfigError("sweep", str(store.run_dir(run_id) / name), "whole files; this one cannot be read")
    with atomic_folder(out.resolve()) as made:
        _copy(store, ids, made, every)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"{out}: {len(ids)} runs, {size / 2**20:.1f} MiB"


def _copy(store: Store, ids: Sequence[str], made: Path, every: int) -> None:
    files = [*SWEEP_FILES, *(f"runs/{run_id}/{name}" for run_id in ids for name in RUN_FILES)]
    for name in files:
        source, target = store.root / name, made / name
        if source.is_file() and not source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.name == HISTORY and every > 1:
                target.write_text(_thin(list(store.history_rows(target.parent.name)), every), encoding="utf-8")
            else:
                shutil.copyfile(source, target)
    tests = {run_id: found for run_id in ids if (found := store.arrays(run_id, "test"))}
    if shared := shared_columns(tests.values()):
        (made / SHARED_FILE).write_bytes(pack_columns(shared))
    for run_id, found in tests.items():
        (made / "runs" / run_id / "test.npz").write_bytes(pack_columns(slim_columns(found, shared)))


def _thin(rows: Sequence[Mapping[str, Any]], every: int) -> str:
    """Return a history as text: the rows of every N-th step and of the last, and every row of an evaluation."""
    last = max((row["step"] for row in rows), default=0)
    kept = [row for row in rows if row.keys() - TRAINING_KEYS or row["step"] % every == 0 or row["step"] == last]
    return "".join(json.dumps(row) + "\n" for row in kept)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0; 2 for bad input."""
    args = parser().parse_args(argv)
    say(slim(args.sweep, args.out, every=args.every))


if __name__ == "__main__":
    sys.exit(main())
