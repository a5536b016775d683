"""Separated values: whether quotation marks quote is decided by the lines, and every line is accounted for."""

from __future__ import annotations

import csv
import io
import re
import sys
from typing import Any

QUOTING = ("auto", "standard", "none")


def separator(text: str, known: str) -> str:
    """Return the first of `known` that stands outside quotes in the first line.

    Spreadsheets write `;` where the comma is decimal.
    """
    head = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
    return next((s for s in known if s in head), known[0])


def parse(text: str, mark: str, quoting: str) -> tuple[dict[str, list[Any]], list[str]]:
    """Parse separated values. Every value stays the text it is: "NA", "007" and "1.0" too.

    mark: the separator. quoting: one of `QUOTING`. Returns the columns by name, and what was assumed or found odd, one
    sentence each. Raises `ValueError` where the quotation marks contradict each other, or a row is too long.
    """
    records, said = _records(text, mark, quoting)
    head, *rows = records or [[]]
    names = _names(head)
    for number, row in enumerate(rows, 1):
        if len(row) > len(names):
            why = f"has more fields than the head; a text that holds {mark!r} needs double quotes"
            raise ValueError(f"row {number} {why}")
    if short := sum(len(row) < len(names) for row in rows):
        said.append(f"{short:,} of {len(rows):,} rows have fewer fields than the head; what they lack is empty")
    columns = {name: [row[i] if i < len(row) else "" for row in rows] for i, name in enumerate(names)}
    return columns, said


def _records(text: str, mark: str, quoting: str) -> tuple[list[list[str]], list[str]]:
    """Return the records, the head first, and what was assumed. Raises `ValueError`.

    Quoted by the standard, unless that is impossible or takes several lines for one row although each line is a whole
    row when quotation marks are plain characters.
    """
    plain = [] if quoting == "standard" else _read(text, mark, quoted=False)
    if quoting == "none":
        return plain, []
    try:
        quoted = _read(text, mark, quoted=True)
        fault = ""
    except csv.Error as e:
        quoted, fault = [], str(e)
    if not fault and (quoting == "standard" or len(quoted) == len(plain)):
        return quoted, []
    torn = "unexpected end" in fault and any(cell.startswith('"') for cell in plain[-1])
    widths = {len(row) for row in plain}
    if quoting == "auto" and not torn and len(widths) == 1 and widths != {1}:  # any line is a row of one column
        cells = sum(cell.startswith('"') for row in plain for cell in row)
        return plain, [f"quotation marks are read as plain characters ({cells:,} texts begin with one)"]
    if fault:
        why = "write it twice inside a quoted text, or set task.quoting=none where quotation marks quote nothing"
        raise ValueError(f"{fault}: a quotation mark is not closed or not alone; {why}")
    return quoted, [f"{len(plain):,} lines are read as {len(quoted):,} rows: quoted texts span lines"]


def _read(text: str, mark: str, *, quoted: bool) -> list[list[str]]:
    """Return the records that are not blank. Raises `csv.Error` that names the line."""
    csv.field_size_limit(sys.maxsize)
    source = io.StringIO(text, newline="")
    if quoted:
        reader = csv.reader(source, delimiter=mark, quoting=csv.QUOTE_MINIMAL, strict=True)
    else:
        reader = csv.reader(source, delimiter=mark, quoting=csv.QUOTE_NONE)
    try:
        return [row for row in reader if len(row) > 1 or row and row[0].strip()]
    except csv.Error as e:
        raise csv.Error(f"line {reader.line_num}: {e}") from e


def _names(head: list[str]) -> list[str]:
    """Return the names of a head, each once: "Unnamed: 3" for none, "text.1" for a second "text"."""
    out: list[str] = []
    for i, name in enumerate(head):
        unique, n = name or f"Unnamed: {i}", 0
        while unique in out:
            n += 1
            unique = f"{name}.{n}"
        out.append(unique)
    return out
