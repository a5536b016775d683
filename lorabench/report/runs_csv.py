"""Every run as a row of CSV, for the reader's own analysis; and the report's tables as they stand."""

from __future__ import annotations

import csv
import io
from typing import Any

from lorabench.report.tables import Table, error_summary
from lorabench.results.derived import flatten
from lorabench.results.findings import Findings
from lorabench.store.records import Record

RESOURCES = ("train_seconds", "eval_seconds", "pack_seconds", "pack_size", "solo_seconds", "peak_memory_bytes", "solo_peak_memory_bytes",
                 "trainable_parameters", "total_parameters", "steps", "examples", "tokens")  # fmt: skip


def runs_csv(f: Findings) -> str:
    """A row a run of a cell, by cell, then run_id; then the runs outside. A run in two cells has two rows."""
    listed: list[tuple[str, Record]] = []
    for r in f.results.values():
        found = sorted(f.sweep.records_of((*r.cell.tune, *r.cell.confirm)), key=lambda x: x.run_id)
        listed += [(r.id, x) for x in found]
    listed += [("", x) for x in f.sweep.outside]
    metrics = sorted({k for _, x in listed for k, v in x.metrics.items() if "/" in k and not isinstance(v, str)})
    resources = [k for k in RESOURCES if any(k in x.resources for _, x in listed)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    marks = ["best_step", *(["pruned_step"] if any(x.status == "pruned" for _, x in listed) else [])]
    head = (
        "cell",
        "run_id",
        "role",
        "status",
        "method",
        "r",
        "alpha",
        "targets",
        "lr",
        "seed",
        "precision",
        *marks,
    )
    writer.writerow([*head, *metrics, *resources, "error"])
    for cell, x in listed:
        config = dict(flatten(x.config))
        targets = config.get("method.target_modules")
        row: list[Any] = [
            cell, x.run_id, x.role, x.status, config.get("method.name"), config.get("method.r"), config.get("method.alpha"),
            "+".join(targets) if isinstance(targets, list) else targets, config.get("optimizer.lr"), config.get("seed"),
            x.provenance.get("precision"), *(x.metrics.get(k) for k in marks), *(x.metrics.get(k) for k in metrics),
            *(x.resources.get(k) for k in resources), error_summary(x.error),
        ]  # fmt: skip
        writer.writerow([_csv(v) for v in row])
    return out.getvalue()


def table_csv(table: Table) -> str:
    """A table's texts as the page has them, and the runs behind each row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_csv(c.title or c.key) for c in table.columns] + ["runs"])
    for row in table.rows:
        writer.writerow([_csv(t) for t in row.texts] + [" ".join(row.runs)])
    return out.getvalue()


def _csv(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front; floats get nine digits."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@", "\t", "\r", "|", "%"):
        return "'" + value
    return "" if value is None else value
