"""What of a report a tracker shows: the comparison as a table, each run's verdict, and the answer. Plain data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lorabench.results.findings import Findings, find
from lorabench.results.sweep import load

MAX_NUMBER = 1e300  # trackers take no infinities, and nothing that becomes one on the way


def tracker_summary(sweep_dir: str | Path) -> dict[str, Any]:
    """Return {"comparison": {"columns", "rows"}, "verdicts": {run_id: {...}}, "summary": {...}}.

    Raises `ConfigError` as `render` does.
    """
    from lorabench.report import tables
    from lorabench.report.answer import answer

    f = find(load(sweep_dir))
    comparison = tables.comparison(f)
    return {
        "comparison": {
            "columns": [c.title for c in comparison.columns],
            "rows": [list(r.texts) for r in comparison.rows],
        },
        "verdicts": verdicts(f),
        "summary": _summary(f, answer(f).lead),
    }


def verdicts(f: Findings) -> dict[str, dict[str, Any]]:
    """Return by run_id the verdict on the run's cell against the reference.

    Direction, size, difference (a fraction of the metric) and its 95 % interval.
    A run of two cells has the first one's.
    """
    by_run: dict[str, dict[str, Any]] = {}
    for cell, result in f.results.items():
        verdict = {k: v for k, v in _verdict(f, cell).items() if _is_loggable(v)}
        for run_id in (*result.cell.tune, *result.cell.confirm):
            by_run.setdefault(run_id, verdict)
    return by_run


def _verdict(f: Findings, cell: str) -> dict[str, Any]:
    verdict: dict[str, Any] = {"verdict/cell": cell, "verdict/reference": f.reference}
    if cell == f.reference and f.versus:
        verdict |= {"verdict/direction": "reference", "verdict/size": "reference"}
    elif comparison := f.versus.get(cell):
        low, high = comparison.interval if comparison.bounded else (None, None)
        verdict |= {
            "verdict/direction": comparison.direction,
            "verdict/size": comparison.size,
            "verdict/blocked": comparison.blocked,
            "verdict/difference": comparison.estimate.mean,
            "verdict/low": low,
            "verdict/high": high,
        }
    verdict["verdict/recommended"] = f.recommendation is not None and f.recommendation.cell == cell
    return verdict


def _is_loggable(value: Any) -> bool:
    """Whether a tracker takes a value: not None, not NaN, not infinite."""
    if isinstance(value, float):
        return not math.isnan(value) and abs(value) < MAX_NUMBER
    return value is not None


def _summary(f: Findings, lead: str) -> dict[str, Any]:
    values = {
        "answer": lead,
        "confirmed": f.confirmed,
        "reference": f.reference,
        "best": f.best,
        "recommended": f.recommendation.cell if f.recommendation else None,
        "cells": len(f.results),
        "runs": len(f.sweep.records),
        "metric": f.sweep.metric,
    }
    return {f"report/{k}": v for k, v in values.items() if v is not None}
