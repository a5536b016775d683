"""Encoded examples on disk, so that a data set is tokenized once. The name of an entry is a hash of all it depends on.

<cache root>/encoded/<key>/arrays.npz    one or two arrays a field: numbers, or flat arrays with offsets. No pickles
<cache root>/encoded/<key>/notes.json    what the arrays are, the notes, a SHA-256 over both; written last

The cache only saves time: an entry that is torn, foreign or cannot be written counts as missing. The folder is its
user's alone (0700); one that is a link or another user's is not used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lorabench.config.contracts.model import Model
from lorabench.config.contracts.task import Encoded, Task, TaskData
from lorabench.config.runs import digest
from lorabench.runtime.files import atomic_write, cache_root, is_cache_kept_as_it_is, is_private
from lorabench.runtime.provenance import code_fingerprint

MAX_BYTES = 2 * 2**30  # of all entries together; beyond that the entries longest unused are removed
ARRAYS_FILE, NOTES_FILE = "arrays.npz", "notes.json"
ENTRY_NAME = re.compile(r"[0-9a-f]{64}")
# Files a tokenizer may read; config.json too, which can name its class.
TOKENIZER_FILE = re.compile(r"(token|vocab|merges|chat_template).*|.*\.(json|txt|model|jinja|spm|codes)")


def encode_cached(task: Task, model: Model, data: TaskData, processor: Any) -> Encoded:
    """Return what `task.encode(data, processor)` gives, read from the cache if it is there, else encoded and kept.

    Lengths that `encode` leaves out are the task's work units. Raises `ConfigError` as `encode` does.
    """
    entry = _entry_folder(task, model, data, processor)
    if entry and os.path.lexists(entry.parent) and not _is_usable(entry.parent):
        entry = None
    cached = _read(entry) if entry else None
    if cached is not None:
        return cached
    encoded = task.encode(data, processor)
    if not encoded.lengths:
        lengths = {name: [task.work_units(e) for e in examples] for name, examples in encoded.splits.items()}
        encoded = dataclasses.replace(encoded, lengths=lengths)
    if entry and not is_cache_kept_as_it_is():
        _write(entry, encoded)
    return encoded


def _is_usable(root: Path) -> bool:
    """Whether nobody else can have written in a cache's folder."""
    try:
        return is_private(root)
    except OSError:
        return False


def _entry_folder(task: Task, model: Model, data: TaskData, processor: Any) -> Path | None:
    """Return the folder of these examples, or None where no key covers all that they depend on.

    That is so for `local` tasks and models, which are code of the user's own, and for processors without files.
    """
    folder = getattr(processor, "name_or_path", None)
    if "local" in (task.kind, model.kind) or not folder or not os.path.isdir(folder):
        return None
    template = str(getattr(processor, "chat_template", None))
    today = date.today().isoformat() if "strftime_now" in template else None  # some templates write the date
    try:
        code = [code_fingerprint(), *map(metadata.version, ("transformers", "tokenizers"))]
        about = [data.fingerprint, data.label_names, dataclasses.asdict(task)]
        return cache_root() / "encoded" / digest([*about, _tokenizer_digest(Path(folder)), template, today, *code])
    except (OSError, RuntimeError, ImportError, ValueError):  # unreadable files, no home, a package without metadata
        return None


def _tokenizer_digest(folder: Path) -> str:
    """Return the SHA-256 over names and content of the files a tokenizer may be made of."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if TOKENIZER_FILE.fullmatch(path.name) and path.is_file():
            total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _read(entry: Path) -> Encoded | None:
    """Read an entry and mark it as used; None where it is missing, torn or foreign."""
    try:
        seal, notes = json.loads((entry / NOTES_FILE).read_text(encoding="utf-8"))
        raw = (entry / ARRAYS_FILE).read_bytes()
        if notes["key"] != entry.name or seal != digest([notes, hashlib.sha256(raw).hexdigest()]):
            return None
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            encoded = _unpack(notes, (arrays[name] for name in arrays.files))
    except Exception:  # whatever a torn or foreign file leads to, the examples can be encoded again
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(entry)
    return encoded


def _write(entry: Path, encoded: Encoded) -> None:
    """Write an entry where it can be written and would come back as it is; else do nothing."""
    buffer = io.BytesIO()
    try:
        arrays, splits = _pack(encoded)
        np.savez(buffer, *arrays)
        raw = buffer.getvalue()
        notes = {"key": entry.name, "splits": splits, "lengths": list(encoded.lengths), "notes": encoded.notes}
        text = json.dumps([digest([notes, hashlib.sha256(raw).hexdigest()]), notes])
        kept = len(raw) <= MAX_BYTES and json.loads(text)[1]["notes"] == encoded.notes
        if kept and _is_usable(entry.parent):
            atomic_write(entry / ARRAYS_FILE, raw)
            atomic_write(entry / NOTES_FILE, text)
            _remove_unused(entry.parent)
    except (OSError, ValueError, TypeError, OverflowError):  # no room, no right, or examples that do not fit
        pass


def _pack(encoded: Encoded) -> tuple[list[np.ndarray], list[Any]]:
    """Return all arrays, and per split its name, its fields and which of these are arrays of their own lengths.

    Raises `ValueError` where the examples would not come back as they are.
    """
    arrays, splits = [], []
    for name, examples in encoded.splits.items():
        fields = list(examples[0]) if examples else []
        if any(not e or list(e) != fields for e in examples):
            raise ValueError(f"examples of {name} differ in their fields")
        columns = [_pack_column([e[f] for e in examples]) for f in fields]
        arrays += [part for column in columns for part in column]
        splits.append([name, fields, [len(column) == 2 for column in columns]])
    lengths = [_pack_column(n)[0] if n else np.zeros(0, np.int64) for n in encoded.lengths.values()]
    return arrays + lengths, splits


def _pack_column(values: Sequence[Any]) -> list[np.ndarray]:
    """Return numbers as one array [N], and arrays [T_i] of one type as their concatenation and offsets [N + 1]."""
    kinds = {(type(v), getattr(v, "dtype", None), getattr(v, "ndim", 0)) for v in values}
    kind, dtype, ndim = kinds.pop()
    if not kinds and kind in (int, float):
        return [np.asarray(values, dtype=np.int64 if kind is int else np.float64)]
    if not kinds and dtype is not None and dtype.kind in "biuf" and dtype.isnative and (kind, ndim) == (np.ndarray, 1):
        return [np.concatenate(values), np.cumsum([0, *map(len, values)])]
    raise ValueError(f"no column for {kind}")


def _unpack(notes: dict[str, Any], arrays: Iterator[np.ndarray]) -> Encoded:
    """Return the examples that `_pack` was given."""
    splits = {}
    for name, fields, ragged in notes["splits"]:
        columns: list[list[Any]] = []
        for has_offsets in ragged:
            flat = next(arrays)
            columns.append([flat[a:b] for a, b in pairwise(next(arrays).tolist())] if has_offsets else flat.tolist())
        splits[name] = [dict(zip(fields, values)) for values in zip(*columns, strict=True)]
    return Encoded(splits, {name: next(arrays).tolist() for name in notes["lengths"]}, notes["notes"])


def _remove_unused(root: Path) -> None:
    """Remove the entries longest unused, as far as all together hold more than `MAX_BYTES`. A link is no entry, and
    none is followed."""
    total, entries = 0, [p for p in root.iterdir() if ENTRY_NAME.fullmatch(p.name) and not p.is_symlink()]
    for entry in sorted(entries, key=lambda p: p.lstat().st_mtime_ns, reverse=True):
        total += sum(f.lstat().st_size for f in entry.iterdir())
        if total > MAX_BYTES:
            shutil.rmtree(entry, ignore_errors=True)
