"""What models say before and after training, for tasks of text: `<run dir>/samples.json` of a few runs, side by side.

A list of {"text" or "prompt", "expected", "before", "after"}, all strings. The texts are the user's data and a model's
words: every format escapes them, and what no file can hold is replaced.
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
    """Return the section where runs have samples: those of the recommended cell (else the best) and the reference.

    Where neither has any, those of other cells.
    """
    samples = [x for r in _named_cells(f) if (x := _first_samples(f, r))]
    samples = samples or [x for r in f.results.values() if (x := _first_samples(f, r))]
    if not samples:
        return None
    return Section("samples", "Before and after, in its own words", (), (), (_table(samples[:2]),))


def _named_cells(f: Findings) -> list[Result]:
    chosen = (f.recommendation.cell if f.recommendation else None) or f.best
    return [f.results[i] for i in dict.fromkeys((chosen, f.reference)) if i]


def _first_samples(f: Findings, r: Result) -> RunSamples | None:
    """Return the samples of the cell's first run, by seed, that has any."""
    for x in r.runs:
        if rows := read(f, x.run_id):
            return RunSamples(r, x.run_id, rows)
    return None


def read(f: Findings, run_id: str) -> dict[str, tuple[str, str, str]]:
    """Return a run's samples; none where there is no file. As with records, a torn or foreign one counts as none."""
    try:
        entries = json.loads((f.sweep.store.run_dir(run_id) / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    rows: dict[str, tuple[str, str, str]] = {}
    for x in entries if isinstance(entries, list) else ():
        if isinstance(x, dict) and (text := one_line(x.get("text", x.get("prompt")))):
            rows.setdefault(text, (one_line(x.get("expected")), one_line(x.get("before")), one_line(x.get("after"))))
    return rows


def one_line(value: Any) -> str:
    """Return one line of printable text, cut with an ellipsis.

    Half characters, which UTF-8 cannot hold, become question marks.
    """
    text = " ".join(str("" if value is None else value).encode("utf-8", "replace").decode("utf-8").split())
    text = "".join(ch if ch.isprintable() else "?" for ch in text)
    return text if len(text) <= MAX_TEXT_LENGTH else text[: MAX_TEXT_LENGTH - 1].rstrip() + "…"


def _shared_texts(samples: Sequence[RunSamples]) -> list[str]:
    """Return texts that all runs have; where they have none in common, as many of each."""
    common = [t for t in samples[0].rows if all(t in x.rows for x in samples)]
    if common:
        return common[:MAX_ROWS]
    return [t for x in samples for t in list(x.rows)[: MAX_ROWS // len(samples)]]


def _table(samples: Sequence[RunSamples]) -> Table:
    texts = _shared_texts(samples)
    replies_before = [{x.rows[t][1] for x in samples if t in x.rows} for t in texts]
    one_base = all(len(replies) == 1 for replies in replies_before)  # as it is where no head is drawn
    columns = [Column("text", "text"), Column("expected", "expected")]
    columns += [Column("before", "before")] if one_base else []
    for k, x in enumerate(samples):
        columns += [] if one_base else [Column(f"before{k}", f"before, {x.result.name}")]
        columns.append(Column(f"after{k}", f"after, {x.result.name}"))
    rows = tuple(_row(samples, t, one_base=one_base) for t in texts)
    runs = "; ".join(f"{x.result.name}: run {x.run}" for x in samples)
    note = (
        f"The first {formatting.plural(len(rows), 'sample')} as recorded, none picked ({runs}). "
        f"Texts are cut at {MAX_TEXT_LENGTH} characters."
    )
    return Table("samples", "Sample predictions before and after training", tuple(columns), rows, (note,))


def _row(samples: Sequence[RunSamples], text: str, *, one_base: bool) -> Row:
    by_run = [x.rows.get(text) for x in samples]
    expected, before, _ = next(row for row in by_run if row)
    cells = [text, expected, *([before] if one_base else [])]
    for row in by_run:
        cells += ([] if one_base else [row[1] if row else ""]) + [row[2] if row else ""]
    return Row(tuple(c or formatting.DASH for c in cells), tuple(x.run for x in samples if text in x.rows))
