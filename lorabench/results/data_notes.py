"""What was left out: rows that nobody trained on, texts that were cut, matrices of the base without an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabench.results.formatting import plural

MIN_TRUNCATED_SHARE = 0.05  # share of the training texts that are cut, from which on a reader should know
MIN_BEYOND_SHARE = 0.01  # share of the base's parameters that adapters cannot reach, from which on it is said
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


def reach_caveat(beyond: Any, total: Any) -> str | None:
    """Return one sentence, without its full stop, where a base holds much that adapters cannot sit on; else None.

    beyond: parameters in such matrices. total: all parameters of the base.
    """
    if not (isinstance(beyond, int) and isinstance(total, int) and beyond >= MIN_BEYOND_SHARE * total > 0):
        return None
    return (
        f"{100 * beyond / total:.0f} % of the base's parameters ({beyond:,} of {total:,}) lie in matrices that no "
        "adapter can sit on, such as experts fused into one parameter: these stay frozen"
    )


def _count(notes: Mapping[str, Any], key: str) -> int:
    found = notes.get(key)
    return found if isinstance(found, int) else 0
