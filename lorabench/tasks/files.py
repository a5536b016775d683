"""Columns and texts of a user's own files: csv, tsv, json, jsonl, parquet and plain text, always UTF-8."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabench.config.errors import ConfigError
from lorabench.tasks import separated

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
TEXT_SUFFIXES = (".txt", ".text", ".md")
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # the first that occurs in the header line is taken
MAX_CHARACTERS = 5_000_000  # of one cell: a tokenizer takes some 15 s for as many
_NAMELESS = re.compile(r"Unnamed: \d+")  # pandas' name for a column without one


def read_table(
    file: str, columns: Mapping[str, str], key: str, *, quoting: str = "auto", said: list[str] | None = None
) -> dict[str, list[str]]:
    """Read columns of a table, each value as text, "" where there is none. Returns setting -> values.

    columns: setting -> column, such as {"text_column": "text"}; spaces around a name in the header do not count.
    key: the setting that named the file. quoting: one of `separated.QUOTING`. said: what was assumed about the file
    is appended, one sentence each. Raises `ConfigError`.
    """
    path = _existing(file, key)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(key, file, f"a kind of file that is not read here; allowed: {', '.join(TABLE_SUFFIXES)}")
    table, assumed = _parse(path, file, key, quoting)
    if said is not None:
        said.extend(f"{path.name}: {line}" for line in assumed)
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


def _parse(path: Path, file: str, key: str, quoting: str) -> tuple[dict[str, list[Any]], list[str]]:
    """Parse a table into columns by name, and what was assumed. Raises `ConfigError` where it is torn or no table."""
    suffix = path.suffix.lower()
    text = "" if suffix == ".parquet" else decode(path, key)
    try:
        if suffix == ".parquet":
            import pandas as pd

            table = pd.read_parquet(path).astype(object)  # pandas' own types mark a missing value by their own NA
            return {str(name): column.where(column.notna(), None).tolist() for name, column in table.items()}, []
        if suffix in SEPARATORS:
            return separated.parse(text, separated.separator(text, SEPARATORS[suffix]), quoting)
        return _columns_of(_parse_json(text)), []
    except Exception as e:  # pandas and pyarrow raise many kinds of errors for a torn or foreign file
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ConfigError(key, file, f"cannot be read as {suffix[1:]}: {reason}") from e


def _parse_json(text: str) -> Any:
    """Parse an array of objects, or one object a line: the text says which, not the file's name."""
    return _parse_lines(text) if text.lstrip().startswith("{") else json.loads(text)


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
        if isinstance(value, str) and len(value) > MAX_CHARACTERS:
            allowed = f"at most {MAX_CHARACTERS:,} characters a cell; row {number} of {file} has {len(value):,}"
            raise ConfigError(key, name, f"{allowed}; cut it into rows, or train on it as plain text (task=text_lm)")
        if isinstance(value, str) and _is_chat(value):
            why = "a chat's messages as JSON, which would be trained as plain text; write one row a reply"
            columns = "its prompt and its response in columns of their own (task.prompt_column, task.response_column)"
            raise ConfigError(key, name, f"a column of texts; row {number} of {file} holds {why}, {columns}")
    return [_text(v) for v in column]


def _is_chat(text: str) -> bool:
    """Whether a text is the JSON of a list of messages, each with its "role" or "from"."""
    if not text.lstrip().startswith("[") or not ('"role"' in text or '"from"' in text):
        return False
    try:
        messages = json.loads(text)
    except ValueError:
        return False
    return bool(messages) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in messages)


def _text(value: Any) -> str:
    """Return a cell as text: "" for a missing one (None, NaN), "1" for 1.0."""
    if value is None or isinstance(value, float) and value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
