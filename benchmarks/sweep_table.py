"""The benchmark's result on a terminal."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.table import Table

COLUMNS = {  # heading -> what of a variant, and how it is written
    "seconds": ("makespan", "{:.1f}"),
    "train s": ("train_seconds", "{:.1f}"),
    "MiB": ("peak_memory_bytes", "{:,.0f}"),
    "tok/s": ("tokens_per_second", "{:,.0f}"),
    "GFLOP/s": ("gflops", "{:.0f}"),
    "roof": ("roofline_fraction", "{:.0%}"),
    "best": ("best", "{:.4f}"),
    "mean": ("mean", "{:.4f}"),
}


def tables(result: dict[str, Any]) -> list[Table | str]:
    """What was measured a variant, then the ratios."""
    return [_variants(result), _ratios(result), _last_line(result)]


def _table(title: str, first: str, columns: list[str]) -> Table:
    table = Table(title=title, min_width=len(title), box=None, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _variants(result: dict[str, Any]) -> Table:
    s = result["settings"]
    metric = result["variants"][0]["metric"]
    table = _table(
        f"{s['runs']} runs, medians of {s['repeats']} repeats; validation {metric}", "variant", list(COLUMNS)
    )
    for name in dict.fromkeys(v["variant"] for v in result["variants"]):
        rows = [v for v in result["variants"] if v["variant"] == name]
        table.add_row(name, *(_cell([row[key] for row in rows], form, key) for key, form in COLUMNS.values()))
    return table


def _cell(values: list[float | None], form: str, key: str) -> str:
    known = [v for v in values if v is not None]
    scale = 2**20 if key == "peak_memory_bytes" else 1
    return form.format(median(known) / scale) if known else "-"


def _ratios(result: dict[str, Any]) -> Table:
    table = _table("makespan of the peer over lorabench's", "ratio", ["median", "min", "max"])
    for name, found in result["ratios"].items():
        table.add_row(name, *(f"{found[key]:.2f}" for key in ("median", "min", "max")))
    return table


def _last_line(result: dict[str, Any]) -> str:
    roofline = result["machine"]["roofline_gflops"]
    said = [f"roofline of linear: {roofline['32']:.0f} GFLOP/s in float32, {roofline['bf16']:.0f} in bfloat16"]
    if result["roofline_fraction"] is not None:
        said.append(f"lorabench trains at {result['roofline_fraction']:.1%} of it")
    if result["memory_ratio"] is not None:
        said.append(f"its peak memory is {result['memory_ratio']:.2f} times one Trainer run's")
    return "; ".join(said)
