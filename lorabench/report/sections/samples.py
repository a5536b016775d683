"""What models say before and after training, for tasks of text: `<run dir>/samples.json` of a few runs, side by side.

A list of {"text" or "prompt", "expected", "before", "after"}, all strings. The texts are the user's data and a model's words:
every face escapes them, and what no file can hold is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table
from lorabench.results import formatting
from lorabench.results.cells import Result
from lorabench.results.findings import Findings

FILE_NAME = "samples.json"
MAX_ROWS = 8  # rows
MAX_TEXT_LENGTH = 240  # characters of one text


@dataclass(frozen=True)
class RunSamples:
    """One run's samples, by the text they begin from."""

    result: Result
    run: str
    rows: dict[str, tuple[str, str, str]]  # expected, before, after


def section(f: Findings) -> Section | None:
    """Of the recommended cell (else the best) and the reference; of other cells where neither has any."""
    told = [made for r in _named(f) if (made := _first(f, r))] or [
        made for r in f.results.values() if (made := _first(f, r))
    ]
    if not told:
        return None
    return Section("samples", "Before and after, in its own words", (), (), (_table(told[:2]),))


def _named(f: Findings) -> list[Result]:
    chosen = (f.recommendation.cell if f.recommendation else None) or f.best
    return [f.results[i] for i in dict.fromkeys((chosen, f.reference)) if i]


def _first(f: Findings, r: Result) -> RunSamples | None:
    """The first of the cell's runs, by seed, that has samples."""
    for x in r.runs:
        rows = read(f, x.run_id)
        if rows:
            return RunSamples(r, x.run_id, rows)
    return None


def read(f: Findings, run_id: str) -> dict[str, tuple[str, str, str]]:
    """Empty where there is no file; as with records, a torn or foreign one counts as none."""
    try:
        found = json.loads((f.sweep.store.run_dir(run_id) / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    rows: dict[str, tuple[str, str, str]] = {}
    for x in found if isinstance(found, list) else ():
        if isinstance(x, dict) and (text := one_line(x.get("text", x.get("prompt")))):
            rows.setdefault(text, (one_line(x.get("expected")), one_line(x.get("before")), one_line(x.get("after"))))
    return rows


def one_line(value: Any) -> str:
    """One line of printable text, cut with an ellipsis. Half characters, which UTF-8 cannot hold, become question marks."""
    text = " ".join(str("" if value is None else value).encode("utf-8", "replace").decode("utf-8").split())
    text = "".join(ch if ch.isprintable() else "?" for ch in text)
    return text if len(text) <= MAX_TEXT_LENGTH else text[: MAX_TEXT_LENGTH - 1].rstrip() + "…"


def _texts(told: Sequence[RunSamples]) -> list[str]:
    """Texts that all runs have; where they have none in common, as many of each."""
    common = [t for t in told[0].rows if all(t in x.rows for x in told)]
    if common:
        return common[:MAX_ROWS]
    return [t for x in told for t in list(x.rows)[: MAX_ROWS // len(told)]]


def _table(told: Sequence[RunSamples]) -> Table:
    texts = _texts(told)
    befores = [{x.rows[t][1] for x in told if t in x.rows} for t in texts]
    one = all(len(b) == 1 for b in befores)  # the base says the same, as it does where no head is drawn
    columns = [Column("text", "text"), Column("expected", "expected")]
    columns += [Column("before", "before")] if one else []
    for k, x in enumerate(told):
        columns += [] if one else [Column(f"before{k}", f"before, {x.result.name}")]
        columns.append(Column(f"after{k}", f"after, {x.result.name}"))
    rows = []
    for t in texts:
        have = [x.rows.get(t) for x in told]
        known = next(h for h in have if h)
        cells = [t, known[0], *([known[1]] if one else [])]
        for h in have:
            cells += ([] if one else [h[1] if h else ""]) + [h[2] if h else ""]
        rows.append(Row(tuple(c or formatting.DASH for c in cells), tuple(x.run for x in told if t in x.rows)))
    runs = "; ".join(f"{x.result.name}: run {x.run}" for x in told)
    note = f"The first {formatting.plural(len(rows), 'sample')} as recorded, none picked ({runs}). Texts are cut at {MAX_TEXT_LENGTH} characters."
    return Table("samples", "Sample predictions before and after training", tuple(columns), tuple(rows), (note,))
