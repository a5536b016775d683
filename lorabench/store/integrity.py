"""Files of ended runs that cannot be read: they count as not there, and the run trains again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from lorabench.config.errors import ExistingWork
from lorabench.store.records import HISTORY, Store, is_history_row

LINES_AT_ONCE = 10_000  # of a history that are parsed together


def damaged_files(store: Store, run_ids: Iterable[str]) -> dict[str, str]:
    """Return the runs whose record, history or test results are torn, each with the name of that file.

    Raises `ExistingWork` for a record of another version of lorabench: it is whole, and training again would replace
    it.
    """
    return {i: name for i in run_ids if store.stamp(i) is not None and (name := _torn(store, i))}


def _torn(store: Store, run_id: str) -> str | None:
    if store.read(run_id) is None:
        _refuse_other_versions(store.run_dir(run_id) / "run.json")
        return "run.json"
    try:
        with open(store.run_dir(run_id) / HISTORY, encoding="utf-8") as f:
            while lines := list(islice(f, LINES_AT_ONCE)):
                rows = json.loads(f"[{','.join(lines)}]")  # a call a line takes longer than all the rest
                if len(rows) != len(lines) or not all(map(is_history_row, rows)):
                    return HISTORY
    except FileNotFoundError:
        pass  # not torn: deleted, or adopted without one
    except (ValueError, RecursionError):
        return HISTORY
    try:
        store.arrays(run_id, "test")
    except ExistingWork:
        return "test.npz"
    return None


def _refuse_other_versions(path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    schema = found.get("schema", 1) if isinstance(found, dict) else 1
    if schema != 1:
        raise ExistingWork("sweep.dir", str(path), f"a record of schema 1; this one has schema {schema!r:.20}")
