"""Columns and texts of a user's own files: csv, tsv, json, jsonl, parquet and plain text, always UTF-8."""

from __future__ import annotations

import codecs
import io
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabench.config.errors import ConfigError

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
TEXT_SUFFIXES = (".txt", ".text", ".md")
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # the first that occurs in the header line is taken
_NAMELESS = re.compile(r"Unnamed: \d+")  # pandas' name for a column without one


def read_table(file: str, columns: Mapping[str, str], key: str) -> dict[str, list[str]]:
    """Read columns of a table, each value as text, "" where there is none. Returns setting -> values.

    columns: setting -> column, such as {"text_column": "text"}; spaces around a name in the header do not count.
    key: the setting that named the file. Raises `ConfigError`.
    """
    path = _existing(file, key)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(key, file, f"a kind of file that is not read here; allowed: {', '.join(TABLE_SUFFIXES)}")
    table = _parse(path, file, key)
    if not any(table.values()):
        raise ConfigError(key, file, "the file has no rows")
    stripped = {name.strip(): name for name in reversed(table)}
    names_of = {s: column if column in table else stripped.get(column.strip()) for s, column in columns.items()}
    for setting, name in names_of.items():
        if name is None:
            names = ", ".join(n.strip() for n in table if not _NAMELESS.fullmatch(n))
            raise ConfigError(
                f"{key.rpartition('.')[0]}.{setting}", columns[setting], f"no such column in {file}; allowed: {names}"
            )
    where = key.rpartition(".")[0]
    return {s: _texts(table[str(name)], f"{where}.{s}", columns[s], file) for s, name in names_of.items()}


def read_texts(file: str, key: str) -> dict[str, str]:
    """Read plain texts by name: one file, or every text file of a folder and below. Raises `ConfigError`."""
    root = Path(file).expanduser()
    if root.is_dir():
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
        if not paths:
            raise ConfigError(key, file, f"no text files in this folder; allowed: {', '.join(TEXT_SUFFIXES)}")
        return {str(p.relative_to(root)): decode(p, key) for p in paths}
    path = _existing(file, key)
    if path.suffix.lower() not in TEXT_SUFFIXES:
        allowed = f"a kind of file that is not read here; allowed: {', '.join(TEXT_SUFFIXES)}, or a folder of them"
        if path.suffix.lower() in TABLE_SUFFIXES:
            source = key.rpartition(".")[0] + ".source=file"
            allowed += f"; a table is read with {source}, and its text_column or prompt_column and response_column"
        raise ConfigError(key, file, allowed)
    return {path.name: decode(path, key)}


def decode(path: Path, key: str) -> str:
    """Read a file's text. Raises `ConfigError` that says where it stops being UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        likely = "UTF-16" if wide else "WINDOWS-1252"
        fix = f"convert it first, e.g. iconv -f {likely} -t UTF-8 {path.name} > utf8{path.suffix}"
        raise ConfigError(key, str(path), f"not UTF-8 at byte {e.start} (line {line}); {fix}") from e


def _existing(file: str, key: str) -> Path:
    """Return the path of a file that is there and not empty. Raises `ConfigError`."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(key, file, "a folder; name a file in it" if path.is_dir() else "no such file")
    if path.stat().st_size == 0:
        raise ConfigError(key, file, "the file is empty")
    return path


def _parse(path: Path, file: str, key: str) -> dict[str, list[Any]]:
    """Parse a table into columns by name. Raises `ConfigError` where it is torn or no table."""
    suffix = path.suffix.lower()
    text = "" if suffix == ".parquet" else decode(path, key)
    try:
        if suffix == ".parquet":
            import pandas as pd

            table = pd.read_parquet(path).astype(object)  # pandas' own types mark a missing value by their own NA
            return {str(name): column.where(column.notna(), None).tolist() for name, column in table.items()}
        if suffix in SEPARATORS:
            return _parse_separated(text, _separator(text, SEPARATORS[suffix]))
        return _columns_of(json.loads(text) if suffix == ".json" else _parse_lines(text))
    except Exception as e:  # pandas and pyarrow raise many kinds of errors for a torn or foreign file
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ConfigError(key, file, f"cannot be read as {suffix[1:]}: {reason}") from e


def _separator(text: str, known: str) -> str:
    """Return the first of `known` that stands outside quotes in the first line.

    Spreadsheets write `;` where the comma is decimal.
    """
    head = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
    return next((s for s in known if s in head), known[0])


def _parse_separated(text: str, separator: str) -> dict[str, list[Any]]:
    """Parse separated values. Every value stays the text it is: "NA", "007" and "1.0" too."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
        try:
            table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
        except pd.errors.ParserWarning as e:
            why = f"a row has more fields than the head; a text that holds {separator!r} needs double quotes"
            raise ValueError(why) from e
    return {str(name): column.tolist() for name, column in table.items()}


def _parse_lines(text: str) -> list[Any]:
    """Parse one JSON value a line. Raises `ValueError` that names the line."""
    out = []
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other line breaks, such as U+2028
        if line.strip():
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise ValueError(f"line {number} is not a JSON object ({e.msg})") from e
    return out


def _columns_of(rows: Any) -> dict[str, list[Any]]:
    """Return a list of objects by column; None where an object lacks one."""
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ValueError("a list of objects is wanted, one a row")
    names = dict.fromkeys(str(name) for r in rows for name in r)
    return {name: [r.get(name) for r in rows] for name in names}


def _texts(column: list[Any], key: str, name: str, file: str) -> list[str]:
    """Return cells as text. Raises `ConfigError` where one is no text or number, such as the messages of a chat."""
    for number, value in enumerate(column, 1):
        if isinstance(value, (list, tuple, dict, set, bytes)) or getattr(value, "shape", None):
            kind = type(value).__name__
            raise ConfigError(key, name, f"a column of texts or numbers; row {number} of {file} holds a {kind}")
    return [_text(v) for v in column]


def _text(value: Any) -> str:
    """Return a cell as text: "" for a missing one (None, NaN), "1" for 1.0."""
    if value is None or isinstance(value, float) and value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
