"""The report's directory on disk: ours or empty, and replaced as a whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from lorabench.schema import ConfigError, ExistingWork

OURS = {"report.md", "report.html", "runs.csv", "figures", "tables"}
INSIDE = {"figures": (".svg", ".png"), "tables": (".tex", ".csv")}
IGNORED = {".gitkeep", ".DS_Store"}


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


def replace(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Write all files beside `out`, then put them in its place: a reader sees the old report or the new one."""
    check(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    fresh, old = out.with_name(f".{out.name}.{token}.new"), out.with_name(f".{out.name}.{token}.old")
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
