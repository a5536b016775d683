"""What is on disk when the power goes."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabench.config.errors import ConfigError, Unwritable

UNKNOWN_CALL_ERRORS = (
    errno.EINVAL,
    errno.EBADF,
    errno.ENOTSUP,
)  # what a file system says to a call that it does not know


def sync(path: Path) -> None:
    """A file's bytes, or a directory's names (a rename is one), are on disk when this returns; names as soon as the file
    system writes them where it knows no such call for directories, as some network ones."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in UNKNOWN_CALL_ERRORS or not path.is_dir():
            raise
    finally:
        os.close(handle)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write to a temporary name beside `path`, fsync, rename, fsync the folder: the old file is there or the new one."""
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    with name_unwritable(path):
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


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place, fsynced, when the block ends well; else it is removed.

    An existing folder steps aside as `.<name>.old` for the instant between two renames; whoever reads such folders looks there too.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    tmp.mkdir()
    try:
        yield tmp
        mode = tmp.stat().st_mode & 0o666  # what the user's umask allows; safetensors makes its files private
        for path in tmp.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        sync(tmp)
        _swap(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _swap(tmp: Path, folder: Path) -> None:
    old = aside_path(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(tmp, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def aside_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def check_empty(folder: Path, key: str) -> None:
    """Raise `ConfigError` for a folder to write that holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(key, str(folder), "a folder that does not exist yet, or an empty one")


@contextmanager
def name_unwritable(path: Path) -> Iterator[None]:
    """What the system says against a write becomes `Unwritable`, with the path."""
    try:
        yield
    except OSError as e:
        raise Unwritable(e.errno or errno.EIO, e.strerror or str(e), str(path)) from e


def cache_root() -> Path:
    """LORABENCH_CACHE, or lorabench in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("LORABENCH_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lorabench")
