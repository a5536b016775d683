"""Every run as a row of CSV, for the reader's own analysis; and the report's tables as they stand."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from lorabench.config.overrides import flatten
from lorabench.report.tables import Table, error_summary
from lorabench.results.findings import Findings
from lorabench.store.records import Record

SETTINGS = ("cell", "run_id", "role", "status", "method", "r", "alpha", "targets", "lr", "seed", "precision")
RESOURCES = (
    "train_seconds",
    "eval_seconds",
    "pack_seconds",
    "pack_size",
    "solo_seconds",
    "peak_memory_bytes",
    "solo_peak_memory_bytes",
    "trainable_parameters",
    "total_parameters",
    "steps",
    "examples",
    "tokens",
)
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "|", "%")  # a spreadsheet would run such a text


def runs_csv(f: Findings) -> str:
    """Return a row a run of a cell, by cell, then run_id; then the unlisted runs. A run in two cells has two rows."""
    listed = list(_listed_runs(f))
    records = [x for _, x in listed]
    metrics = sorted({k for x in records for k, v in x.metrics.items() if "/" in k and not isinstance(v, str)})
    resources = [k for k in RESOURCES if any(k in x.resources for x in records)]
    marks = ["best_step", *(["pruned_step"] if any(x.status == "pruned" for x in records) else [])]
    rows = (
        [
            *_settings(cell, x),
            *(x.metrics.get(k) for k in (*marks, *metrics)),
            *(x.resources.get(k) for k in resources),
            error_summary(x.error),
        ]
        for cell, x in listed
    )
    return _csv_text([*SETTINGS, *marks, *metrics, *resources, "error"], rows)


def _listed_runs(f: Findings) -> Iterator[tuple[str, Record]]:
    """Yield (cell id, record); the id is empty for runs that no cell lists."""
    for cell, rows in groupby(f.cell_records(), key=lambda row: row[0].id):
        yield from ((cell, x) for _, x in sorted(rows, key=lambda row: row[1].run_id))
    yield from (("", x) for x in f.sweep.outside)


def _settings(cell: str, record: Record) -> list[Any]:
    """Return the values of the columns `SETTINGS`."""
    config = dict(flatten(record.config))
    targets = config.get("method.target_modules")
    return [
        cell,
        record.run_id,
        record.role,
        record.status,
        config.get("method.name"),
        config.get("method.r"),
        config.get("method.alpha"),
        "+".join(targets) if isinstance(targets, list) else targets,
        config.get("optimizer.lr"),
        config.get("seed"),
        record.provenance.get("precision"),
    ]


def table_csv(table: Table) -> str:
    """Return a table's texts as the page has them, and the runs behind each row."""
    head = [_csv_value(c.title or c.key) for c in table.columns] + ["runs"]
    return _csv_text(head, ([*row.texts, " ".join(row.runs)] for row in table.rows))


def _csv_text(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_csv_value(v) for v in row] for row in rows)
    return out.getvalue()


def _csv_value(value: Any) -> Any:
    """Return floats with nine digits, and with an apostrophe in front what a spreadsheet would run as a formula."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str) and value.lstrip()[:1] in FORMULA_STARTS:
        return "'" + value
    return "" if value is None else value
