"""What of a data set nobody trained on or saw whole: rows that were left out, texts that were cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabench.results.formatting import plural

MIN_TRUNCATED_SHARE = 0.05  # share of the training texts that are cut, from which on a reader should know
USER_SOURCES = ("file", "text")  # sources that are the user's: what shipped data leave out is known


def data_caveats(notes: Any) -> list[str]:
    """One sentence each, without its full stop. notes: a record's `provenance.data_notes`, whatever that may be."""
    notes = notes if isinstance(notes, Mapping) else {}
    said = []
    without = {"text or label": _count(notes, "rows_without_text_or_label"), "text": _count(notes, "rows_without_text")}
    parts = [f"{n:,} without {what}" for what, n in without.items() if n]
    if twice := _count(notes, "duplicates_removed"):
        clash = _count(notes, "label_conflicts")
        parts.append(plural(twice, "duplicate") + (f" ({plural(clash, 'text')} with unlike labels)" if clash else ""))
    if parts and notes.get("source") in USER_SOURCES:
        said.append(f"of {plural(_count(notes, 'rows'), 'row')} of data {' and '.join(parts)} are left out")
    read_as = notes.get("read_as")
    said.extend(map(str, read_as) if isinstance(read_as, list) else ())
    cut: Any = notes.get("truncation")
    cut = cut.get("train") if isinstance(cut, Mapping) else None
    share = cut.get("truncated_share") if isinstance(cut, Mapping) else None
    if isinstance(share, float) and share >= MIN_TRUNCATED_SHARE:
        said.append(
            f"{100 * share:.0f} % of the training texts are cut at task.max_length={cut.get('max_length')} tokens"
        )
    return said


def _count(notes: Mapping[str, Any], key: str) -> int:
    found = notes.get(key)
    return found if isinstance(found, int) else 0
