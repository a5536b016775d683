"""A report's bytes do not depend on the CPU: neither on its threads and instructions nor on the last bits of numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

RENDER = "from lorabench.report import render; render('sweep', 'report', title='Ranks')"
CPU_FEATURES = "from numpy._core._multiarray_umath import __cpu_features__ as f, __cpu_dispatch__ as d"


def next_float(value: Any, rng: random.Random) -> Any:
    """Every float inside, moved to one of its two neighbours."""
    if isinstance(value, dict):
        return {key: next_float(inner, rng) for key, inner in value.items()}
    if isinstance(value, float) and value:
        return float(np.nextafter(value, rng.choice([-np.inf, np.inf])))
    return value


def move_last_bits(sweep: Path) -> None:
    rng = random.Random(0)
    for path in sorted(sweep.glob("runs/*/run.json")):
        record = json.loads(path.read_text())
        record |= {key: next_float(record[key], rng) for key in ("metrics", "resources")}
        path.write_text(json.dumps(record))
    for path in sorted(sweep.glob("runs/*/history.jsonl")):
        rows = [next_float(json.loads(line), rng) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rendered(folder: Path, **env: str) -> dict[str, bytes]:
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | env
    subprocess.run([sys.executable, "-c", RENDER], cwd=folder, env=path, check=True, timeout=300)
    report = folder / "report"
    return {str(p.relative_to(report)): p.read_bytes() for p in sorted(report.rglob("*")) if p.is_file()}


def test_two_kinds_of_cpu_give_the_same_bytes(repo: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one/place", tmp_path / "two/place"  # a command in a report names the folder above a sweep
    for folder in (one, two):
        shutil.copytree(repo / "sweeps/ref_planted_rank", folder / "sweep")
    move_last_bits(two / "sweep")
    code = f"{CPU_FEATURES}; print(*(name for name in d if f.get(name)))"
    newer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    older = {"NPY_DISABLE_CPU_FEATURES": newer, "OPENBLAS_CORETYPE": "Nehalem"} if newer else {}
    first, second = rendered(one, OMP_NUM_THREADS="1"), rendered(two, OMP_NUM_THREADS="2", **older)
    assert first.keys() == second.keys() and any(name.endswith(".svg") for name in first)
    assert [name for name in first if first[name] != second[name]] == []
