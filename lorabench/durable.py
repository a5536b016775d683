"""What is on disk when the power goes."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from lorabench.schema import writing

UNKNOWN = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # what a file system says to a call that it does not know


def sync(path: Path) -> None:
    """A file's bytes, or a directory's names (a rename is one), are on disk when this returns; names as soon as the file
    system writes them where it knows no such call for directories, as some network ones."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in UNKNOWN or not path.is_dir():
            raise
    finally:
        os.close(handle)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write to a temporary name beside `path`, fsync, rename, fsync the folder: the old file is there or the new one."""
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(tmp, "xb") as f:
                f.write(raw)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
            sync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)
