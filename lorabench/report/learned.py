"""Whether anything was learned at all: what is no better than one answer to everything compares nothing."""

from __future__ import annotations

from statistics import fmean

from lorabench.report.findings import Findings


def nothing(f: Findings) -> tuple[str, float] | None:
    """The commonest label and its share, where no cell's accuracy is above what always answering it would give.

    Of the test examples in a confirmed sweep, else of those validated on; None for other metrics and where records do not
    count their labels.
    """
    split = "test" if f.confirmed else "val"
    runs = {r.id: [x for x in r.runs if f"{split}/accuracy" in x.metrics] for r in f.results.values()}
    first = next((found[0] for found in runs.values() if found), None)
    told = first.provenance.get("data_notes") if first else None
    for key in (split, "labels"):
        told = told.get(key) if isinstance(told, dict) else None
    labels = {k: n for k, n in told.items() if isinstance(n, int) and n > 0} if isinstance(told, dict) else {}
    if f.sweep.metric != "accuracy" or not labels or any(dict(r.cell.conditions) for r in f.results.values()):
        return None
    name = max(sorted(labels), key=lambda label: labels[label])
    share = labels[name] / sum(labels.values())
    best = max(fmean(float(x.metrics[f"{split}/accuracy"]) for x in found) for found in runs.values() if found)
    return (name, share) if best <= share + 1e-9 else None
