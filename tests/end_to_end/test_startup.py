"""What a user types most answers at once: nothing heavy is imported for it. Times are not compared: machines differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "pytorch_lightning",
    "transformers",
    "datasets",
    "peft",
    "wandb",
    "pandas",
    "matplotlib",
    "scipy",
    "numpy",
    "pydantic",
)
PROBE = """
import runpy, sys
sys.argv = ["lorabench", *sys.argv[1:]]
code = 0
try:
    runpy.run_module("lorabench", run_name="__main__", alter_sys=True)
except SystemExit as e:
    code = e.code or 0
print("heavy:", *sorted(set(sys.modules) & {heavy}), file=sys.stderr)
sys.exit(code)
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    code = PROBE.replace("{heavy}", repr(set(HEAVY)))
    return subprocess.run([sys.executable, "-c", code, *args], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("--cfg", "job"),
        ("+experiment=rank_sweep", "--cfg", "job"),
        ("method.r=16", "--cfg", "job", "--resolve"),
    ],
    ids=" ".join,
)
def test_answers_without_torch_from_any_folder(args: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "heavy:", done.stderr
    assert not list(tmp_path.iterdir())  # and leaves nothing behind


def test_help_names_groups_and_commands(tmp_path: Path) -> None:
    text = run(tmp_path, "--help").stdout
    for word in (
        "model",
        "task",
        "method",
        "optimizer",
        "trainer",
        "tracker",
        "+experiment=rank_sweep",
        "sweep.dry_run",
    ):
        assert word in text


@pytest.mark.parametrize(
    "args", [("+bogus=1",), ("nonsense=1",), ("method.r=1=2=[",), ("method=nothing",)], ids=" ".join
)
def test_bad_input_exits_2_and_writes_nothing(args: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *args)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module", ["config.runs", "store.records", "report", "methods", "trackers", "launch.task_function"]
)
def test_imports_without_torch(module: str) -> None:
    heavy = {"torch", "pytorch_lightning", "transformers"}
    code = f"import sys, lorabench.{module}; print(*sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
