"""Where a number comes from: code, packages, machine. Nothing of the environment is kept, so no secret is. No torch."""

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

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = ("lorabench", "torch", "pytorch-lightning", "transformers", "peft", "datasets", "numpy", "hydra-core")
IMPORT = re.compile(r"^[ \t]*(?:from (lorabench[\w.]*) import (\([^)]*\)|.*)|import (lorabench[\w.]+))", re.MULTILINE)
FOUND_BY_NAME = ("methods", "models", "tasks")  # `config.components` imports their files, whichever a config names


def training_code(root: Path) -> list[Path]:
    """The files of the package in `root` that can change a number of a run.

    These are all that `training/train.py` reaches by import, inside functions too, and every method, model and task.
    Reports, mirrors, launchers and commands are none of them.
    """
    files, reached = set(root.rglob("*.py")), set[Path]()
    todo = [root / "training" / "train.py", *(path for part in FOUND_BY_NAME for path in (root / part).rglob("*.py"))]
    while todo:
        path = todo.pop()
        if path in reached or path not in files:
            continue
        reached.add(path)
        for source, names, plain in IMPORT.findall(path.read_text(encoding="utf-8")):
            for dotted in (plain, *(f"{source}.{name}" for name in re.findall(r"\w+", names))):
                parts = dotted.split(".")[1:]
                for stem in (root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)):
                    todo += [stem.with_suffix(".py"), stem / "__init__.py"]
    return sorted(reached)


def fingerprint(root: Path) -> str:
    """The first 16 hex digits of the SHA-256 over names and contents of `training_code(root)`."""
    sha = hashlib.sha256()
    for path in training_code(root):
        sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


@cache
def code_fingerprint() -> str:
    """The `fingerprint` of the lorabench that runs now."""
    return fingerprint(PACKAGE)


@cache
def git_state() -> dict[str, Any]:
    """Revision of the checkout this package runs from, and whether it is dirty; {} where it runs from a wheel."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return {}

    def git(*args: str) -> str:
        argv = ["git", "-C", str(root), *args]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        return {
            "revision": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "-uno").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


@cache
def packages() -> dict[str, str]:
    """Versions of the packages that can change a number, by name; those that are not installed are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def machine() -> dict[str, Any]:
    """Name, system, CPU model, usable CPUs and Python version of this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "host": platform.node(),
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cpus": cpus,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    """The CPU's name as Linux has it, else as `platform` does. psutil does not tell it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
