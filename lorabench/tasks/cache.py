"""One tokenisation a data set: encoded examples on disk, under a name that says all they were made from.

<cache root>/encoded/<key>/arrays.npz    a column a field: flat arrays with offsets, or numbers. No pickles
<cache root>/encoded/<key>/notes.json    what the arrays are, the notes, a SHA-256 over both; written last

The cache is an aid and never in the way: what is torn, foreign or cannot be written counts as not there.
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

from lorabench.config.contracts.task import Encoded, Task, TaskData
from lorabench.config.runs import digest
from lorabench.runtime.files import atomic_write, cache_root
from lorabench.runtime.provenance import code_fingerprint

LIMIT = 2 * 2**30  # bytes; beyond them the entries longest unused go
ARRAYS, NOTES = "arrays.npz", "notes.json"
KEY = re.compile(r"[0-9a-f]{64}")
# Whatever a tokenizer may read; config.json too, which can name its class.
TOKENIZER = re.compile(r"(token|vocab|merges|chat_template).*|.*\.(json|txt|model|jinja|spm|codes)")


def encode_cached(task: Task, model: Any, data: TaskData, processor: Any) -> Encoded:
    """Return what `task.encode(data, processor)` gives, read from the cache if it is there, else encoded and kept."""
    entry = _entry(task, model, data, processor)
    found = _read(entry) if entry else None
    if found is None:
        found = _encode(task, data, processor)
        if entry:
            _write(entry, found)
    return found


def _encode(task: Task, data: TaskData, processor: Any) -> Encoded:
    """Encode the data, and ask the task for the work units of each example where `encode` did not count them."""
    made = task.encode(data, processor)
    lengths = {name: [task.work_units(e) for e in examples] for name, examples in made.splits.items()}
    return made if made.lengths else dataclasses.replace(made, lengths=lengths)


def _entry(task: Any, model: Any, data: TaskData, processor: Any) -> Path | None:
    """The folder of these examples; None where no key covers all they depend on: code of the user's own (`local` tasks
    and models) and processors without files."""
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
    """SHA-256 over names and content of the files a tokenizer may be made of."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if TOKENIZER.fullmatch(path.name) and path.is_file():
            found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _read(entry: Path) -> Encoded | None:
    try:
        seal, notes = json.loads((entry / NOTES).read_text(encoding="utf-8"))
        raw = (entry / ARRAYS).read_bytes()
        if notes["key"] != entry.name or seal != digest([notes, hashlib.sha256(raw).hexdigest()]):
            return None
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            found = _unpack(notes, (arrays[name] for name in arrays.files))
    except Exception:  # whatever a torn or foreign file leads to, the examples can be made again
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(entry)
    return found


def _write(entry: Path, made: Encoded) -> None:
    buffer = io.BytesIO()
    try:
        arrays, splits = _pack(made)
        np.savez(buffer, *arrays)
        raw = buffer.getvalue()
        notes = {"key": entry.name, "splits": splits, "lengths": list(made.lengths), "notes": made.notes}
        text = json.dumps([digest([notes, hashlib.sha256(raw).hexdigest()]), notes])
        if len(raw) <= LIMIT and json.loads(text)[1]["notes"] == made.notes:
            atomic_write(entry / ARRAYS, raw)
            atomic_write(entry / NOTES, text)
            _trim(entry.parent)
    except (OSError, ValueError, TypeError, OverflowError):  # no room, no right, or examples that do not fit
        pass


def _pack(made: Encoded) -> tuple[list[np.ndarray], list[Any]]:
    """Arrays; per split its name, fields and which are ragged. `ValueError`: examples would not come back as they are."""
    arrays, splits = [], []
    for name, examples in made.splits.items():
        fields = list(examples[0]) if examples else []
        if any(not e or list(e) != fields for e in examples):
            raise ValueError(f"examples of {name} differ in their fields")
        columns = [_column([e[f] for e in examples]) for f in fields]
        arrays += [part for column in columns for part in column]
        splits.append([name, fields, [len(column) == 2 for column in columns]])
    return arrays + [_column(n)[0] if n else np.zeros(0, np.int64) for n in made.lengths.values()], splits


def _column(values: Sequence[Any]) -> list[np.ndarray]:
    """Integers or floats as one array [N]; arrays [T_i] of one type as their concatenation and offsets [N + 1]."""
    kinds = {(type(v), getattr(v, "dtype", None), getattr(v, "ndim", 0)) for v in values}
    kind, dtype, ndim = kinds.pop()
    if not kinds and kind in (int, float):
        return [np.asarray(values, dtype=np.int64 if kind is int else np.float64)]
    if not kinds and dtype is not None and dtype.kind in "biuf" and dtype.isnative and (kind, ndim) == (np.ndarray, 1):
        return [np.concatenate(values), np.cumsum([0, *map(len, values)])]
    raise ValueError(f"no column for {kind}")


def _unpack(notes: dict[str, Any], arrays: Iterator[np.ndarray]) -> Encoded:
    splits = {}
    for name, fields, ragged in notes["splits"]:
        columns: list[list[Any]] = []
        for of_arrays in ragged:
            flat = next(arrays)
            columns.append([flat[a:b] for a, b in pairwise(next(arrays).tolist())] if of_arrays else flat.tolist())
        splits[name] = [dict(zip(fields, values)) for values in zip(*columns, strict=True)]
    return Encoded(splits, {name: next(arrays).tolist() for name in notes["lengths"]}, notes["notes"])


def _trim(root: Path) -> None:
    """Drop the entries longest unused, as far as all together hold more than `LIMIT` bytes."""
    total, entries = 0, [p for p in root.iterdir() if KEY.fullmatch(p.name)]
    for entry in sorted(entries, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        total += sum(f.stat().st_size for f in entry.iterdir())
        if total > LIMIT:
            shutil.rmtree(entry, ignore_errors=True)
