"""Who may do what among launchers that share a directory: a lease is held by one process and ends with it. No torch.

    <folder>/<name>/<token>    a lease: a directory with one file, named at random, which says who holds it

A directory is renamed onto another only while that one is empty or absent. So one process gets a lease, on a network
file system too. A dead holder's lease is ended by the name of its own file: what a slow launcher has found out about an
old holder cannot touch a new one.

A holder touches its file every `BEAT_SECONDS`. It is dead when its process is gone, where that can be seen from here:
same machine, boot and process namespace. Elsewhere it is dead when its file has not changed for `SILENT_SECONDS` of the
watcher's own steady clock. No two clocks are ever compared.

filelock's leases were tried instead (4.2). They take a lease from a holder of this machine that is merely suspended,
and have no public way to tell who holds one and since when.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorabench.config.errors import ExistingWork

BEAT_SECONDS, SILENT_SECONDS = 15.0, 120.0  # seconds; a network file system may hold a touch back for 60
SECONDS_UNTIL_TOLD = 5.0  # of a wait; shorter ones are the rule
TAKEN_ERRORS = (errno.ENOTEMPTY, errno.EEXIST)


class LeaseLost(Exception):
    """Another process holds what this one held: it was suspended, or cut off from the file system, for too long."""


@dataclass(frozen=True)
class Holder:
    """A process: its machine, its number there, and what tells it from a later process with that number.

    place: boot and process namespace, as `place()` gives them. start: when it was started, in ticks since boot.
    """

    host: str
    pid: int
    place: str = ""
    start: str = ""

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(platform.node(), os.getpid(), place(), _start(os.getpid()) or "")

    def __str__(self) -> str:
        host = "".join(c for c in self.host[:64] if c.isprintable())  # another's file: no control characters of it
        return f"process {self.pid} on {host}"

    @property
    def gone(self) -> bool | None:
        """Whether the process is no more; None where that cannot be seen from here.

        A cloned machine has the same boot, so the host is compared too. Where /proc hides another user's process, the
        system is asked for it.
        """
        if not self.place or self.place != place() or self.host != platform.node() or not self.start:
            return None
        start = _start(self.pid)
        if start is None:
            return None if _is_there(self.pid) else True
        return start != self.start


@cache
def place() -> str:
    """Return boot and process namespace of this process; "" where the system does not tell.

    Processes of equal places can be compared by their numbers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_there(pid: int) -> bool:
    """Whether a process has this number, be it another user's; True where the system does not tell."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        pass
    return True


def _start(pid: int) -> str | None:
    """Return when a process was started, in ticks since boot; "" for a zombie; None where /proc has nothing to read.

    psutil counts seconds since the epoch, which change with the system's clock.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Held:
    """A lease that somebody has taken, as it looks from here.

    since, heard: when it was taken and when its holder last touched it, in seconds since the epoch by the file system's
    clock. dead: its holder is gone, or silent for too long.
    """

    file: Path
    who: Holder
    since: float
    heard: float
    dead: bool


class Lease:
    """A lease that this process holds until it releases it or dies; a context manager. `file` exists as long as it is
    held."""

    def __init__(self, file: Path) -> None:
        self.file, self._pid, self._over = file, os.getpid(), threading.Event()
        threading.Thread(target=self._renew, daemon=True, name=f"lease {file.parent.name}").start()

    def _renew(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError):  # the next beat tries again; one that is lost shows when something is written
                os.utime(self.file, follow_symlinks=False)

    def release(self) -> None:
        """Give the lease up. In a forked child it does nothing: the lease is the parent's."""
        self._over.set()
        if os.getpid() == self._pid:
            _end(self.file)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *args: Any) -> None:
        self.release()


class Leases:
    """The leases of one folder, which is made when the first is taken.

    Its methods raise OSError where the folder cannot be written, and `ExistingWork` where something in it is a symbolic
    link or no lease.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, tuple[Any, float]] = {}  # a lease as it last looked, and since when it looks so

    def take(self, name: str, *, again: int = 9) -> Lease | None:
        """Take a lease and return it; None while another holds it.

        again: how often to begin anew where others clean up at the same time.
        """
        path = self._path(name)
        if self.holder(name) is not None:
            return None
        token = secrets.token_hex(8)
        nest = self.folder / f".{name}.{token}"
        try:
            self._fill(nest, token)
            with suppress(OSError):
                os.rmdir(path)  # what a holder that was put out has left; some file systems rename onto nothing only
            os.rename(nest, path)
        except OSError as e:
            held = e.errno in TAKEN_ERRORS or (
                e.errno == errno.EPERM and _holds(path)
            )  # sshfs has no word for "not empty"
            meanwhile = e.errno in (errno.ENOENT, errno.EPERM)  # another cleaned up, or released it
            if not held and meanwhile and again:
                return self.take(name, again=again - 1)
            if not held and not (path / token).exists():
                raise
        finally:
            shutil.rmtree(nest, ignore_errors=True)
        if not (path / token).exists():  # asked for by name: a network file system may lose the answer to a rename
            return None
        self._clean(name)
        return Lease(path / token)

    def wait(self, name: str, tell: Callable[[Holder], None] | None = None) -> Lease:
        """Wait until whoever holds a lease releases it or dies; then take it and return it.

        tell: called with the holder, once for each, where the wait is longer than `SECONDS_UNTIL_TOLD`.
        """
        pause, began, told = 0.005, time.monotonic(), None
        while (lease := self.take(name)) is None:
            if tell and time.monotonic() - began >= SECONDS_UNTIL_TOLD:
                who = self.holder(name)
                if who is not None and who != told:
                    tell(who)
                    told = who
            time.sleep(pause)
            pause = min(0.25, pause * 1.5)
        return lease

    def tidy(self, name: str) -> None:
        """Remove what dead holders have left of a lease that nobody will take again."""
        self.holder(name)
        self._clean(name)

    def holder(self, name: str) -> Holder | None:
        """Return who holds a lease now; None for nobody. A dead holder's lease is ended."""
        held = self.look(name)
        if held is not None and held.dead:
            _end(held.file)
            return None
        return held.who if held else None

    def look(self, name: str) -> Held | None:
        """Return a lease as it is, a dead holder's too; None for nobody's. Changes nothing.

        A holder that cannot be seen from here counts as dead only for one who has looked for `SILENT_SECONDS`.
        """
        found = _look(self._path(name))
        if found is None:
            self._seen.pop(name, None)
            return None
        file, who, state, taken = found
        before, since = self._seen.get(name, (None, 0.0))
        if before != (file, state):
            since = time.monotonic()
            self._seen[name] = (file, state), since
        gone = who.gone
        dead = bool(gone or (gone is None and time.monotonic() - since > SILENT_SECONDS))
        return Held(file, who, taken, state[0] / 1e9, dead)

    def _path(self, name: str) -> Path:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ExistingWork("lease", name, "a plain name")
        refuse_link(self.folder)
        return self.folder / name

    def _fill(self, nest: Path, token: str) -> None:
        """Make the directory that is to be renamed to the lease, with this process's file in it."""
        while True:
            self.folder.mkdir(0o775, parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # the folder went away in between
                nest.mkdir(0o775)
                break
        handle = os.open(nest / token, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with open(handle, "w", encoding="utf-8") as f:
            json.dump(asdict(Holder.here()), f)

    def _clean(self, name: str) -> None:
        """Remove what processes that died in `_fill` have left. A living one whose directory goes with it begins
        anew."""
        for nest in self.folder.glob(f".{name}.{'[0-9a-f]' * 16}"):
            with suppress(OSError, ExistingWork):
                found = _look(nest)
                if found is None:
                    os.rmdir(nest)
                elif found[1].gone or not found[0].stat().st_size:
                    _end(found[0])


def _holds(path: Path) -> bool:
    """Whether a lease's directory has a holder's file in it."""
    try:
        return any(path.iterdir())
    except OSError:
        return False


def check_held(lease: Path | None) -> None:
    """Raise `LeaseLost` unless the file of a lease (`Lease.file`) is still there. None: no lease is asked for."""
    if lease is not None and not lease.exists():
        raise LeaseLost(f"the lease {lease.parent} was taken over: this process was away for too long")


def refuse_link(path: Path, key: str = "path") -> None:
    """Raise `ExistingWork` for a symbolic link: it would lead reads and writes elsewhere."""
    if path.is_symlink():
        raise ExistingWork(key, str(path), f"no symbolic link; this one leads to {os.readlink(path)}")


def _look(path: Path) -> tuple[Path, Holder, tuple[int, int], float] | None:
    """Return the file in a lease, who wrote it, its state, and when the lease was taken; None for one that nobody
    holds.

    The state changes with every beat.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # `.nfs...` is a file that was deleted while someone had it open
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
            return (*_read(path / names[0], folder), os.fstat(folder).st_mtime) if names else None
        finally:
            os.close(folder)
    except FileNotFoundError:  # nobody's, or released while we looked
        return None
    except OSError as e:
        if e.errno == errno.ESTALE:  # the same, on a network file system
            return None
        if e.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise ExistingWork("lease", str(path), "a lease of lorabench; this is a file or a symbolic link") from e


def _read(file: Path, folder: int) -> tuple[Path, Holder, tuple[int, int]]:
    handle = os.open(file.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)  # opened: a network file system asks anew
    with open(handle, "rb") as f:
        about = os.fstat(handle)
        try:
            who = Holder(**json.loads(f.read(4096)))
            if not (isinstance(who.pid, int) and isinstance(who.host, str)):
                raise TypeError
        except (ValueError, TypeError, RecursionError):
            who = Holder("an unknown machine", 0)
    return file, who, (about.st_mtime_ns, about.st_ctime_ns)


def _end(file: Path) -> None:
    """Remove a holder's own file, and the directory unless it is another's by now."""
    with suppress(OSError):
        os.unlink(file)
        os.rmdir(file.parent)
