"""The report's directory on disk: ours by a mark that we wrote, and replaced as a whole.

<report>/.lorabench-report.json    {"schema": 1, "files": {"report.md": SHA-256, ...}}: all that a renderer wrote

Names prove nothing: a folder of a user's own may hold a `report.md` and `figures/` too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.runtime.files import aside_path, atomic_folder, name_unwritable, restore_folder
from lorabench.runtime.leases import Leases
from lorabench.store.records import OWN_NAMES

MARK = ".lorabench-report.json"
IGNORED_NAMES = {MARK, ".gitkeep", ".DS_Store"}
WAY_OUT = "choose another folder, or move this one away"


def check_replaceable(out: Path) -> None:
    """Raise `ExistingWork` unless `out` is absent, empty, or holds nothing but a report as it was written.

    Ours are the files that the mark lists, as long as their content is the one it lists.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("out", str(out), "a directory; this is a file")
    found = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_symlink() or not p.is_dir()}
    marked = _marked_files(out / MARK)
    foreign = [name for name in found if name not in marked and found[name].name not in IGNORED_NAMES]
    if foreign:
        allowed = f"an empty or a report's directory; this one holds {', '.join(foreign[:5])}"
        unmarked = "" if marked else f" and no {MARK}, by which a report is known"
        raise ExistingWork("out", str(out), f"{allowed}{unmarked}: {WAY_OUT}")
    changed = [name for name, checksum in marked.items() if name in found and _checksum(found[name]) != checksum]
    if changed:
        allowed = f"a report as it was written; {', '.join(changed[:5])} changed since, which would be lost"
        raise ExistingWork("out", str(out), f"{allowed}: {WAY_OUT}")


def check_place(out: Path, sweep_dir: Path) -> None:
    """Raise `ConfigError` for a `report.dir` into which the sweep's report cannot go, before anything is trained."""
    place, sweep = out.resolve(), sweep_dir.resolve()
    if place == sweep or place in sweep.parents:
        raise ConfigError("report.dir", str(out), "a folder of its own; this one holds the sweep itself")
    if sweep in place.parents and place.relative_to(sweep).parts[0] in OWN_NAMES:
        raise ConfigError("report.dir", str(out), f"a folder that is not the sweep's own, as {sweep_dir}/report is")
    try:
        check_replaceable(out)
    except ConfigError as e:
        raise type(e)("report.dir", e.value, e.allowed) from e
    above = next(p for p in (place.parent, *place.parents) if p.exists() or p.is_symlink())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError("report.dir", str(out), f"a folder that can be written; {above} is none")


def _marked_files(mark: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a mark lists, by name; {} where there is no mark of ours."""
    try:
        files = json.loads(mark.read_text(encoding="utf-8"))["files"]
        return {str(name): str(checksum) for name, checksum in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def mark_text(files: Mapping[str, bytes]) -> str:
    """Return the mark of a report of these files."""
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    return json.dumps({"schema": 1, "files": listed}, indent=1) + "\n"


def _checksum(path: Path) -> str:
    """Return a file's SHA-256; "" for a link, which no report holds."""
    return "" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the directory against other processes that render into it, and clear up after those that were killed."""
    out = out.resolve()
    leases = Leases(out.parent / ".locks")
    try:
        with name_unwritable(out):
            lease = leases.wait(out.name)
        with lease:
            check_replaceable(aside_path(out))  # what a killed writer set aside is removed: it must be a report too
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
        raw = {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}
        for name, content in {**raw, MARK: mark_text(raw).encode()}.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
