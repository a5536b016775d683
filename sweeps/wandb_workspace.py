"""A W&B workspace of one sweep, as code: what rank, rate and alpha do, and what they cost.

    pip install wandb-workspaces
    python sweeps/wandb_workspace.py rank_sweep --entity ME [--project lorabench] [--metric accuracy]
    python sweeps/wandb_workspace.py rank_sweep --entity ME --print      the layout as JSON; needs no package, sends nothing

The panels name what `tracker=wandb` writes: config keys, history and summary keys, the report's media. Validation only in
the rate panels: a rate is never chosen on test.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

Panel = dict[str, Any]
Layout = dict[str, list[Panel]]  # section -> panels


def scatter(title: str, x: str, y: str, *, log_x: bool = True, log_y: bool = False) -> Panel:
    """x: a config key (`method.r`) or `summary:<key>`; y: a summary key. A dot a run."""
    return {"kind": "scatter", "title": title, "x": x, "y": y, "log_x": log_x, "log_y": log_y}


def lines(title: str, y: str, by: str, *, log_y: bool = False) -> Panel:
    """y by step, a band (mean, smallest, largest) for each value of a config key."""
    return {"kind": "lines", "title": title, "y": y, "by": by, "log_y": log_y}


def layout(metric: str) -> Layout:
    """The sections, top down. metric: the task's primary one, as `accuracy`."""
    return {
        "Answer": [{"kind": "media", "title": "The report", "keys": ["report"]},
                   {"kind": "media", "title": "Figures", "keys": ["figures/metric_by_rank", "figures/learning_rates", "figures/training"]}],
        "Rank": [scatter(f"test {metric} by rank", "method.r", f"test/{metric}"),
                 scatter(f"val {metric} by rank", "method.r", f"val/{metric}"),
                 scatter("difference to the reference by rank", "method.r", "verdict/difference"),
                 lines("val loss by step, by rank", "val/loss", "method.r")],
        "Rate": [scatter("val loss by rate", "optimizer.lr", "val/loss"),
                 scatter(f"val {metric} by rate", "optimizer.lr", f"val/{metric}"),
                 lines("train loss by step, by rate", "train/loss", "optimizer.lr", log_y=True)],
        "Alpha": [scatter(f"test {metric} by alpha", "method.alpha", f"test/{metric}"),
                  scatter("val loss by alpha", "method.alpha", "val/loss"),
                  lines("val loss by step, by alpha", "val/loss", "method.alpha")],
        "Cost": [scatter(f"test {metric} by trained parameters", "summary:resources/trainable_parameters", f"test/{metric}"),
                 scatter("seconds by rank (share of the pack)", "method.r", "resources/train_seconds"),
                 scatter("memory by rank (of the pack)", "method.r", "resources/peak_memory_bytes")],
    }  # fmt: skip


def workspace(sweep: str, entity: str, project: str, made: Layout) -> Any:
    """The layout as a `wandb_workspaces` object: `save()` sends it. Raises `ImportError` where the package is missing."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def panel(p: Panel) -> Any:
        if p["kind"] == "media":
            return wr.MediaBrowser(title=p["title"], media_keys=p["keys"], num_columns=1)
        if p["kind"] == "lines":
            return wr.LinePlot(title=p["title"], y=[p["y"]], groupby=wr.Config(p["by"]), groupby_aggfunc="mean",
                               groupby_rangefunc="minmax", log_y=p["log_y"], max_runs_to_show=100)  # fmt: skip
        x = p["x"].removeprefix("summary:")
        axis = wr.SummaryMetric(x) if p["x"].startswith("summary:") else wr.Config(x)
        return wr.ScatterPlot(title=p["title"], x=axis, y=wr.SummaryMetric(p["y"]), log_x=p["log_x"], log_y=p["log_y"])

    sections = [ws.Section(name=name, panels=[panel(p) for p in panels], is_open=True) for name, panels in made.items()]
    runs = ws.RunsetSettings(filters=[ws.Metric("Group") == sweep])
    return ws.Workspace(
        entity=entity, project=project, name=f"lorabench {sweep}", sections=sections, runset_settings=runs
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1: W&B did not take it; 2: the package is missing."""
    p = argparse.ArgumentParser(description="Save a W&B workspace of a sweep: rank, rate, alpha and cost panels.")
    p.add_argument("sweep", help="the sweep's name, which is its W&B group")
    p.add_argument("--entity", required=True, help="W&B user or team")
    p.add_argument("--project", default="lorabench")
    p.add_argument("--metric", default="accuracy", help="the task's primary metric")
    p.add_argument("--print", action="store_true", dest="show", help="show the layout as JSON and send nothing")
    args = p.parse_args(argv)
    made = layout(args.metric)
    if args.show:
        print(json.dumps(made, indent=1))
        return 0
    try:
        view = workspace(args.sweep, args.entity, args.project, made)
    except ImportError as e:
        print(f"error: {e}; it comes with: pip install wandb-workspaces", file=sys.stderr)
        return 2
    try:
        view.save()
    except Exception as e:  # of a server, or of the client that asks it
        print(f"error: not saved: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    print(f"saved: {view.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
