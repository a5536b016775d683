"""What every test shares: no network, one thread (two workers share the machine), folders that go away, fixed seeds."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Read at import time by the libraries they name, so they are set before any test module is imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
    os.environ.pop(key, None)

gc.disable()  # while test modules and all they need are imported: `pytest_collection_finish` turns it on
REPO = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """What is there now stays: collections between packs, hundreds of them, need not look through it."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """One seed a test for every generator there is; torch only if the test's module has imported it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded data stays out of the user's cache; weights converted there already (540 MB) are used from there."""
    from lorabench.runtime.files import cache_root

    own, converted = tmp_path_factory.mktemp("cache"), cache_root() / "gguf"
    if converted.is_dir():
        (own / "gguf").symlink_to(converted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORABENCH_CACHE", str(own))
        yield


@pytest.fixture
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture
def sweep_dir(tmp_path: Path) -> Path:
    """Where a test's sweep goes: not there yet."""
    return tmp_path / "sweeps" / "test"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's figures are made, and not rendered: that is nine tenths of a report, and its words do not need it."""
    from lorabench.report import theme

    def drawing(key: str, title: str, caption: str, alt: str, figure: Any) -> theme.Drawing:
        return theme.Drawing(key, title, caption, alt, '<svg viewBox="0 0 1 1"></svg>', b"", figure)

    monkeypatch.setattr(theme, "render_drawing", drawing)


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run `python -m lorabench` in an empty folder; returns (exit code, stdout + stderr)."""
    from lorabench import __main__ as entry

    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["lorabench", *argv])
        try:
            entry.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of the fault suite; here and not beside it, because a run over several processes reads this file alone."""
    reports = [r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", None) == "call"]
    rows = sorted(value for r in reports for name, value in r.user_properties if name == "fault")
    if rows:
        terminalreporter.section("faults")
        width = max(len(row[0]) for row in rows)
        for name, tried, lost, doubled in [("fault", "times tried", "runs lost", "runs doubled"), *rows]:
            terminalreporter.write_line(f"{name:<{width}} | {tried:>11} | {lost:>9} | {doubled:>12}")
