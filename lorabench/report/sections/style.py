"""How far replies moved towards the data's own style, by cell.

They are records' `style/...` of confirmation runs (`lorabench.training.evaluation.style`).
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, metric_title, plus_minus, run_ids
from lorabench.results import formatting
from lorabench.results.cells import Result
from lorabench.results.findings import Findings
from lorabench.stats.estimates import mean_over_seeds, welch

WRITERS = ("real", "base", "adapted")


def section(f: Findings) -> Section | None:
    """Return the section where runs behind the numbers have the measure."""
    cells = [r for r in f.results.values() if _values(r, "adapted")]
    return Section("tone", "What replies took on of the data's tone", (), (), (_table(f, cells),)) if cells else None


def _values(r: Result, name: str) -> list[float]:
    return [float(x.metrics[f"style/{name}"]) for x in r.runs if x.metrics.get(f"style/{name}") is not None]


def _table(f: Findings, cells: list[Result]) -> Table:
    columns = (
        Column("cell", "cell"),
        Column("test", metric_title(f, "test"), "right"),
        *(Column(writer, writer, "right") for writer in WRITERS),
        Column("moved", "moved, over seeds", "right"),
        Column("prompts", "moved, over prompts (95 %)", "right"),
        Column("difference", "Δ to reference (95 %)", "right"),
    )
    rows = tuple(_row(f, r) for r in cells)
    return Table("tone", "Replies beside the base's and real ones", columns, rows, tuple(_notes(cells)))


def _row(f: Findings, r: Result) -> Row:
    means = (_mean(_values(r, writer)) for writer in WRITERS)
    return Row((r.name, plus_minus(f, r), *means, _moved_text(r), _prompts(r), _difference(f, r)), run_ids(r))


def _notes(cells: list[Result]) -> Iterator[str]:
    replies = sorted({int(n) for r in cells for n in _values(r, "examples")})
    yield (
        f"Real, base, adapted: how likely {' or '.join(formatting.count(n) for n in replies)} held-out replies "
        "of people, of the base and of the trained runs are real ones to a classifier of n-grams. "
        "Moved: (adapted − base) / (real − base), 0 like the base, 1 like the data. "
        "It knows surface (length, case, slang), not sense: read the samples."
    )
    yield (
        "Over seeds: mean with half its 95 % interval; over prompts: the mean of the runs' own intervals. "
        "Neither holds the other's luck. Δ: Welch over seeds, exploratory."
    )
    if any(len(_values(r, "moved")) < len(_values(r, "adapted")) for r in cells):
        yield "A run without “moved”: the classifier does not tell real replies from the base's."


def _mean(values: list[float]) -> str:
    return formatting.number(fmean(values), 2) if values else formatting.DASH


def _moved_text(r: Result) -> str:
    moved = _values(r, "moved")
    if not moved:
        return formatting.DASH
    half = f" ± {formatting.number(mean_over_seeds(moved).half_width(), 2)}" if len(moved) > 1 else ""
    return formatting.number(fmean(moved), 2) + half


def _prompts(r: Result) -> str:
    low, high = _values(r, "moved_low"), _values(r, "moved_high")
    return f"{_mean(low)} to {_mean(high)}" if low and high else formatting.DASH


def _difference(f: Findings, r: Result) -> str:
    if r.id == f.reference:
        return "reference"
    difference = welch(_values(r, "moved"), _values(f.results[f.reference], "moved")) if f.reference else None
    if difference is None:
        return formatting.DASH
    mean, low, high = (formatting.number(x, 2, sign=True) for x in (difference.mean, *difference.interval()))
    return f"{mean} ({low} to {high})"
