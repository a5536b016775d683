"""Where a number comes from: code, packages, machine. No torch, no secrets: nothing of the environment is kept."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("lorabench", "torch", "pytorch-lightning", "transformers", "peft", "datasets", "numpy", "hydra-core")


IMPORT = re.compile(r"^[ \t]*(?:from (lorabench[\w.]*) import (\([^)]*\)|.*)|import (lorabench[\w.]+))", re.MULTILINE)
FOUND_BY_NAME = ("methods", "models", "tasks")  # `components` imports their files, whichever a config names


def training_code(root: Path) -> list[Path]:
    """The files of a package lorabench that can change a number of a run: all that `train` reaches by import, inside functions
    too, and every method, model and task. Reports, mirrors, launchers and other faces are none of them."""
    files, found = set(root.rglob("*.py")), set[Path]()
    todo = [root / "training" / "train.py", *(path for part in FOUND_BY_NAME for path in (root / part).rglob("*.py"))]
    while todo:
        path = todo.pop()
        if path in found or path not in files:
            continue
        found.add(path)
        for source, names, plain in IMPORT.findall(path.read_text(encoding="utf-8")):
            for dotted in (plain, *(f"{source}.{name}" for name in re.findall(r"\w+", names))):
                parts = dotted.split(".")[1:]
                for at in (root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)):
                    todo += [at.with_suffix(".py"), at / "__init__.py"]
    return sorted(found)


def fingerprint(root: Path) -> str:
    """SHA-256 prefix over `training_code`."""
    h = hashlib.sha256()
    for path in training_code(root):
        h.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return h.hexdigest()[:16]


@cache
def code_fingerprint() -> str:
    """That of this package."""
    return fingerprint(Path(__file__).parent.parent)


@cache
def git_state() -> dict[str, Any]:
    """Revision and dirtiness of the checkout this package runs from; empty when it is installed from a wheel."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return {}

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=20
        ).stdout

    try:
        return {
            "revision": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "-uno").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


@cache
def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def machine() -> dict[str, Any]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "host": platform.node(),
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cpus": cpus,
        "python": platform.python_version(),
    }
