"""What of a report a tracker shows: the comparison as a table, each run's verdict, and the answer. Plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorabench.results.findings import Findings, find
from lorabench.results.sweep import load


def tracker_summary(sweep_dir: str | Path) -> dict[str, Any]:
    """{"comparison": {"columns", "rows"}, "verdicts": {run_id: {...}}, "summary": {...}}. Raises `ConfigError` as `render`."""
    from lorabench.report import tables
    from lorabench.report.answer import answer

    f = find(load(sweep_dir))
    shown = tables.comparison(f)
    return {
        "comparison": {"columns": [c.title for c in shown.columns], "rows": [list(r.texts) for r in shown.rows]},
        "verdicts": verdicts(f),
        "summary": _summary(f, answer(f).lead),
    }


def verdicts(f: Findings) -> dict[str, dict[str, Any]]:
    """By run_id, of the run's cell against the reference: direction, size, difference (fraction of the metric) and its
    95 % interval. A run of two cells has the first one's."""
    out: dict[str, dict[str, Any]] = {}
    for cell, result in f.results.items():
        found: dict[str, Any] = {"verdict/cell": cell, "verdict/reference": f.reference}
        if cell == f.reference and f.versus:
            found |= {"verdict/direction": "reference", "verdict/size": "reference"}
        elif made := f.versus.get(cell):
            low, high = made.interval if made.bounded else (None, None)
            found |= {
                "verdict/direction": made.direction, "verdict/size": made.size, "verdict/blocked": made.blocked,
                "verdict/difference": made.estimate.mean, "verdict/low": low, "verdict/high": high,
            }  # fmt: skip
        found["verdict/recommended"] = f.recommendation is not None and f.recommendation.cell == cell
        clean = {
            k: v for k, v in found.items() if v is not None and v == v and abs(v if isinstance(v, float) else 0) < 1e300
        }
        for run_id in (*result.cell.tune, *result.cell.confirm):
            out.setdefault(run_id, clean)
    return out


def _summary(f: Findings, lead: str) -> dict[str, Any]:
    found = {
        "answer": lead, "confirmed": f.confirmed, "reference": f.reference, "best": f.best,
        "recommended": f.recommendation.cell if f.recommendation else None, "cells": len(f.results),
        "runs": len(f.sweep.records), "metric": f.sweep.metric,
    }  # fmt: skip
    return {f"report/{k}": v for k, v in found.items() if v is not None}
