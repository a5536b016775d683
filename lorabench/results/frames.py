"""A sweep as tidy pandas frames: a run, a logged value, a cell, a comparison a row."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lorabench.config.overrides import flatten
from lorabench.results import scores
from lorabench.results.cells import Result
from lorabench.results.comparisons import Comparison
from lorabench.results.findings import Findings


def runs(f: Findings) -> pd.DataFrame:
    """A row a run of a cell (a run in two cells has two): what it is, metrics and resources under their own names."""
    rows = []
    for r, x in f.cell_records():
        settings: dict[str, Any] = {k: v for k, v in flatten(x.config) if not isinstance(v, (list, dict))}
        rows.append(
            {
                **_of_cell(r),
                "run_id": x.run_id,
                "role": x.role,
                "status": x.status,
                "lr": x.config["optimizer"]["lr"],
                "seed": x.config["seed"],
                "chosen": x.config["optimizer"]["lr"] == r.lr,
                "error": x.error,
                **{k: v for k, v in x.metrics.items() if not isinstance(v, str)},
                **x.resources,
                **{f"config.{k}": settings[k] for k in sorted(settings) if k not in ("seed", "role")},
            }
        )
    return pd.DataFrame(rows)


def history(f: Findings) -> pd.DataFrame:
    """Long: a row a run, step and value that was logged (`train/loss`, `val/loss`, `lr`, ...)."""
    rows = [
        {
            **_of_cell(r),
            "run_id": x.run_id,
            "role": x.role,
            "lr": x.config["optimizer"]["lr"],
            "seed": x.config["seed"],
            "step": row["step"],
            "metric": metric,
            "value": float(value),
        }
        for r, x in f.cell_records()
        for row in f.sweep.store.history(x.run_id)
        for metric, value in row.items()
        if metric != "step" and isinstance(value, (int, float))
    ]
    return pd.DataFrame(rows, columns=[*CELL, "run_id", "role", "lr", "seed", "step", "metric", "value"])


def examples(f: Findings) -> pd.DataFrame:
    """Long: a row a confirmation run at the chosen rate and test example. example: hash of its content, the same in all
    runs."""
    made = []
    for r in f.results.values():
        for x in r.runs if r.role == "confirm" else ():
            columns = f.sweep.store.arrays(x.run_id, "test")
            if columns:
                own = {**_of_cell(r), "run_id": x.run_id, "seed": x.config["seed"]}
                made.append(pd.DataFrame({**own, **columns}))
    return pd.concat(made, ignore_index=True) if made else pd.DataFrame(columns=[*CELL, "run_id", "seed", "example"])


def cells(f: Findings) -> pd.DataFrame:
    """A row a cell: the chosen rate, test with its 95 % interval, validation, cost. Shares and times as recorded,
    unscaled."""
    return pd.DataFrame([_cell(f, r) for r in f.results.values()])


def _cell(f: Findings, r: Result) -> dict[str, Any]:
    low, high = scores.interval(f.metric, r.test) if r.test and r.test.seeds > 1 else (None, None)
    return {
        **_of_cell(r),
        "alpha": r.cell.alpha,
        "alpha_rule": r.cell.alpha_rule,
        **dict(r.cell.extra),
        "trainable": r.cell.trainable,
        "lr": r.lr,
        "edge": r.choice.edge,
        "runs": len(r.runs),
        "role": r.role,
        "metric": f.metric.name,
        "test": r.test.mean if r.test else None,
        "low": low,
        "high": high,
        "seeds": r.test.seeds if r.test else None,
        "examples": r.test.examples if r.test else None,
        "val": r.val,
        "val_loss": r.val_loss,
        "seconds": r.seconds,
        "memory": r.memory,
        "solo": r.solo,
        "reference": r.id == f.reference,
        "recommended": f.recommendation is not None and r.id == f.recommendation.cell,
    }


def comparisons(f: Findings) -> pd.DataFrame:
    """A row a comparison on test, cell minus other: against the reference (a family, adjusted), and the best adapter's
    against head-only and full fine-tuning."""
    rows = [_comparison(f, "reference", made) for made in f.versus.values()]
    rows += [_comparison(f, "control", made) for made in f.controls.values()]
    return pd.DataFrame(rows, columns=COMPARISON)


CELL = ["cell", "name", "method", "r", "targets"]
COMPARISON = [
    "cell",
    "name",
    "other",
    "other_name",
    "family",
    "difference",
    "low",
    "high",
    "level",
    "p",
    "direction",
    "size",
    "margin",
    "seeds",
    "examples",
    "no_verdict",
    "exploratory",
]


def _comparison(f: Findings, family: str, made: Comparison) -> dict[str, Any]:
    e, (low, high) = made.estimate, made.interval if made.bounded else (None, None)
    return {
        "cell": made.cell,
        "name": f.results[made.cell].name,
        "other": made.other,
        "other_name": f.results[made.other].name,
        "family": family,
        "difference": e.mean,
        "low": low,
        "high": high,
        "level": made.level,
        "p": made.p,
        "direction": made.direction,
        "size": made.size,
        "margin": f.sweep.margin,
        "seeds": e.seeds,
        "examples": e.examples,
        "no_verdict": made.blocked,
        "exploratory": made.exploratory,
    }


def _of_cell(r: Result) -> dict[str, Any]:
    return {"cell": r.id, "name": r.name, "method": r.cell.method, "r": r.cell.r, "targets": r.cell.targets}
