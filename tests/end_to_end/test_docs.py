"""The pages a stranger reads: links lead somewhere, settings are all there, commands exist, the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted(
    p for pattern in ("*.md", "docs/**/*.md", "experiments/*.md", "sweeps/README.md", "reports/README.md", "benchmarks/*.md")
    for p in REPO.glob(pattern) if "_build" not in p.parts
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_lead_to_files_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not (page.parent / t).exists()]
    assert not missing


def test_every_setting_is_on_the_page() -> None:
    """`python docs/write_settings.py` writes it anew."""
    spec = importlib.util.spec_from_file_location("write_settings", REPO / "docs/write_settings.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPO / "docs/settings.md").read_text(encoding="utf-8") == module.page()


def test_the_page_of_commands_names_every_command() -> None:
    """What you type is what you open: a file at the top of the package, or a folder with `__main__.py`."""
    package = REPO / "lorabench"
    commands = {p.stem for p in package.glob("*.py")} | {p.parent.name for p in package.glob("*/__main__.py")}
    page = (REPO / "docs/commands.md").read_text(encoding="utf-8")
    assert {c for c in commands if not c.startswith("_")} == set(re.findall(r"lorabench\.(\w+)", page))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "cache")]
    done = subprocess.run(
        [*argv, str(REPO / "docs"), str(tmp_path / "html")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html/settings.html").is_file()
