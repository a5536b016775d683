"""The report's directory on disk: ours or empty, and replaced as a whole."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.runtime.files import name_unwritable
from lorabench.runtime.leases import Leases

OURS = {"report.md", "report.html", "runs.csv", "figures", "tables"}
INSIDE = {"figures": (".svg", ".png"), "tables": (".tex", ".csv")}
IGNORED = {".gitkeep", ".DS_Store"}
TOKEN = "[0-9a-f]" * 8


def check(out: Path) -> None:
    """Raise `ExistingWork` unless `out` is absent, empty, or holds nothing but a report."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("out", str(out), "a directory; this is a file")
    foreign = [p.name for p in out.iterdir() if p.name not in OURS | IGNORED]
    for name, endings in INSIDE.items():
        if (out / name).is_dir():
            foreign += [
                f"{name}/{p.name}" for p in (out / name).iterdir() if p.suffix not in endings and p.name not in IGNORED
            ]
    if foreign:
        raise ExistingWork(
            "out", str(out), f"an empty or a report's directory; this one holds {', '.join(sorted(foreign)[:5])}"
        )


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the directory against other processes that render into it, and clear up after those that were killed."""
    out = out.resolve()
    leases = Leases(out.parent / ".locks")
    try:
        with name_unwritable(out):
            lease = leases.wait(out.name)
        with lease:
            _clear_up(out)
            yield
    finally:
        with suppress(OSError):  # others wait in it
            leases.folder.rmdir()


def _clear_up(out: Path) -> None:
    for old in out.parent.glob(f".{glob.escape(out.name)}.{TOKEN}.old"):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames
            os.rename(old, out)
    for fresh in out.parent.glob(f".{glob.escape(out.name)}.{TOKEN}.new"):
        shutil.rmtree(fresh, ignore_errors=True)


def replace(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Write all files beside `out`, then put them in its place: a reader sees the old report or the new one.

    The caller holds it (`alone`). Raises `Unwritable` where it cannot be written; what was there stays.
    """
    check(out)
    out = out.resolve()
    token = secrets.token_hex(4)
    fresh, old = out.with_name(f".{out.name}.{token}.new"), out.with_name(f".{out.name}.{token}.old")
    with name_unwritable(out):
        try:
            for name, content in files.items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            if out.exists():
                os.rename(out, old)
            os.rename(fresh, out)
        except BaseException:
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
