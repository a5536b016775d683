"""Files and folders that are on disk whole or not at all, even when the power goes."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.config.errors import ConfigError, Unwritable

if TYPE_CHECKING:
    from torch import Tensor

UNKNOWN_CALL_ERRORS = (
    errno.EINVAL,
    errno.EBADF,
    errno.ENOTSUP,
)  # what a file system answers to a call it does not know


def sync(path: Path) -> None:
    """Put a file's bytes, or a directory's names, on disk before returning.

    A rename is a change of a directory's names. Some network file systems do not know the call for directories: there,
    names are on disk when the file system writes them.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in UNKNOWN_CALL_ERRORS or not path.is_dir():
            raise
    finally:
        os.close(handle)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old file or the new one.

    The data go to a temporary name beside `path`, which is synced and renamed. Raises `Unwritable`, and then the old
    file stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    with name_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as f:
                f.write(raw)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a temporary folder beside `folder` that takes its place, synced, when the block ends well; else it is
    removed.

    Between two renames an existing folder stands aside as `aside_path(folder)`. A reader looks there too, or calls
    `restore_folder` where it may write. replace: False raises `FileExistsError` where the folder is there by the end of
    the block. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # what the user's umask allows; safetensors makes its files private
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        sync(temporary)
        _swap(temporary, folder, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, folder: Path, replace: bool) -> None:
    """Rename `temporary` to `folder`; what stood there steps aside first, and comes back where the second rename
    fails."""
    old = aside_path(folder)
    if folder.exists():
        if not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError as e:
        if replace and old.exists():
            os.rename(old, folder)
        if not replace and folder.exists():  # another process was faster
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from e
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def aside_path(folder: Path) -> Path:
    """Where `atomic_folder` puts the old folder for the instant between its two renames."""
    return folder.with_name(f".{folder.name}.old")


def restore_folder(folder: Path) -> None:
    """Undo what an `atomic_folder` left that was killed: bring the old folder back, remove temporary ones.

    The caller makes sure that nobody else writes the folder now.
    """
    old = aside_path(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    remove_temporaries(folder)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary folders that killed writers of `folder` left beside it."""
    prefix, suffix = f".{folder.name}.", ".tmp"
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if path.name.startswith(prefix) and path.name.endswith(suffix) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def check_empty(folder: Path, key: str) -> None:
    """Raise `ConfigError` for a folder to write that holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(key, str(folder), "a folder that does not exist yet, or an empty one")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the rights that its folder has. It is not synced.

    Tensors that are contiguous and on a CPU are not copied. Raises OSError with the system's own number: the library
    passes it on in a text, such as "I/O error: No space left on device (os error 28)".
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata=dict(metadata))
    except SafetensorError as e:
        system_error = re.search(r"os error (\d+)", str(e))
        number = int(system_error[1]) if system_error else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from e
    path.chmod(path.parent.stat().st_mode & 0o666)  # what the user's umask allows; the library makes its files private


@contextmanager
def name_unwritable(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into `Unwritable` with the path."""
    try:
        yield
    except OSError as e:
        raise Unwritable(e.errno or errno.EIO, e.strerror or str(e), str(path)) from e


_cache_kept_as_it_is = ContextVar("_cache_kept_as_it_is", default=False)


@contextmanager
def keep_cache_as_it_is(keep: bool = True) -> Iterator[None]:
    """Let the block read the cache and put nothing into it: a dry run writes nothing. keep: False changes nothing."""
    token = _cache_kept_as_it_is.set(keep or is_cache_kept_as_it_is())
    try:
        yield
    finally:
        _cache_kept_as_it_is.reset(token)


def is_cache_kept_as_it_is() -> bool:
    """Whether nothing may be put into the cache now."""
    return _cache_kept_as_it_is.get()


def is_private(folder: Path) -> bool:
    """Make a folder that only this user may enter, and return whether nobody else but root can write in it.

    An older folder of this user's is closed to others. A link is none. Raises OSError where it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid not in (os.getuid(), 0):
        return False
    if about.st_uid == os.getuid() and about.st_mode & 0o077:
        with suppress(OSError):  # a file system that may only be read
            folder.chmod(0o700)
    return not folder.lstat().st_mode & 0o022


def cache_root() -> Path:
    """The folder of what is made once a machine: LORABENCH_CACHE, else `lorabench` in the user's cache folder."""
    chosen = os.environ.get("LORABENCH_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lorabench")
