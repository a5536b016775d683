"""Per-example results as `.npz` files of [N] columns, without pickles.

In a copy that `lorabench.slim` made, columns that several runs share (ids, labels, groups) stand once, in the sweep's
`shared.npz` under the digest of their content, and a run's own file names them.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SHARED_FILE = "shared.npz"
NAMES_COLUMN = "columns"  # of a slim file: "example=<digest>" where it is shared, else "loss=", in their order
MAX_UNPACKED = 512 << 20  # bytes of all columns of a file; a million test examples take some 40 MiB
Columns = Mapping[str, np.ndarray]  # name -> [N]


def pack_columns(columns: Columns) -> bytes:
    """Return columns as the bytes of a compressed `.npz` file."""
    raw = io.BytesIO()
    np.savez_compressed(raw, **columns)  # type: ignore[arg-type]
    return raw.getvalue()


def read_columns(path: Path, root: Path) -> dict[str, np.ndarray]:
    """Return all columns of a run's file, name -> [N].

    root: the sweep's directory, which holds what a slim copy shares. Raises `FileNotFoundError` where there is no file,
    and a dozen kinds of error for one that is torn.
    """
    with open(path, "rb") as f, np.load(f, allow_pickle=False) as data:
        _check_size(data, path)
        found = {key: data[key] for key in data.files}
    if NAMES_COLUMN not in found:
        return found
    names = [str(name).partition("=")[::2] for name in found.pop(NAMES_COLUMN)]
    if not (root / SHARED_FILE).is_file():  # not FileNotFoundError: the run has results
        raise ValueError(f"no {SHARED_FILE}")
    with open(root / SHARED_FILE, "rb") as f, np.load(f, allow_pickle=False) as data:
        _check_size(data, root / SHARED_FILE)
        shared = {key: data[key] for _, key in names if key}
    if any(digest(column) != key for key, column in shared.items()):
        raise ValueError(f"{SHARED_FILE} holds other columns")
    return {name: shared[key] if key else found[name] for name, key in names}


def _check_size(data: Any, path: Path) -> None:
    """Raise `ValueError` where an open `.npz` file unpacks to more than `MAX_UNPACKED` bytes; none is unpacked here."""
    size = sum(member.file_size for member in data.zip.infolist())
    if size > MAX_UNPACKED:
        raise ValueError(f"{path.name} unpacks to {size >> 20:,} MiB; at most {MAX_UNPACKED >> 20:,} MiB are read")


def digest(column: np.ndarray) -> str:
    """Return 16 hex digits of the SHA-256 over a column's type, shape and content."""
    about = f"{column.dtype.str}{column.shape}".encode()
    return hashlib.sha256(about + np.ascontiguousarray(column).tobytes()).hexdigest()[:16]


def shared_columns(files: Iterable[Columns]) -> dict[str, np.ndarray]:
    """Return the columns that more than one of the files hold, by digest."""
    times: Counter[str] = Counter()
    by_digest: dict[str, np.ndarray] = {}
    for columns in files:
        for column in columns.values():
            times[key := digest(column)] += 1
            by_digest.setdefault(key, column)
    return {key: column for key, column in by_digest.items() if times[key] > 1}


def slim_columns(columns: Columns, shared: Columns) -> dict[str, np.ndarray]:
    """Return a run's columns with names in place of what is shared; unchanged where nothing is shared."""
    keys = {name: key if (key := digest(column)) in shared else "" for name, column in columns.items()}
    own = {name: column for name, column in columns.items() if not keys[name]}
    named = {NAMES_COLUMN: np.array([f"{name}={key}" for name, key in keys.items()])} if any(keys.values()) else {}
    return {**named, **own}
