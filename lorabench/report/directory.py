"""The report's directory on disk: ours or empty, and replaced as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.runtime.files import atomic_folder, name_unwritable, restore_folder
from lorabench.runtime.leases import Leases

REPORT_NAMES = {"report.md", "report.html", "runs.csv", "figures", "tables"}
FOLDER_SUFFIXES = {"figures": (".svg", ".png"), "tables": (".tex", ".csv")}
IGNORED_NAMES = {".gitkeep", ".DS_Store"}


def check_replaceable(out: Path) -> None:
    """Raise `ExistingWork` unless `out` is absent, empty, or holds nothing but a report."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("out", str(out), "a directory; this is a file")
    foreign = [p.name for p in out.iterdir() if p.name not in REPORT_NAMES | IGNORED_NAMES]
    for name, endings in FOLDER_SUFFIXES.items():
        if (out / name).is_dir():
            foreign += [
                f"{name}/{p.name}"
                for p in (out / name).iterdir()
                if p.suffix not in endings and p.name not in IGNORED_NAMES
            ]
    if foreign:
        raise ExistingWork(
            "out", str(out), f"an empty or a report's directory; this one holds {', '.join(sorted(foreign)[:5])}"
        )


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the directory against other processes that render into it, and clear up after those that were killed."""
    out = out.resolve()
    leases = Leases(out.parent / ".locks")
    try:
        with name_unwritable(out):
            lease = leases.wait(out.name)
        with lease:
            restore_folder(out)
            yield
    finally:
        with suppress(OSError):  # others wait in it
            leases.folder.rmdir()


def replace(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Write all files beside `out`, then put them in its place: a reader sees the old report or the new one.

    files: content by name, such as `figures/pareto.svg`. The caller holds the directory (`locked`).
    Raises `Unwritable` where it cannot be written, and then what was there stays.
    """
    check_replaceable(out)
    with name_unwritable(out), atomic_folder(out.resolve()) as fresh:
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
