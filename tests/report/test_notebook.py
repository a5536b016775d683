"""docs/notebook.ipynb: every code cell still runs, in order, in one namespace; what it stores is whole, small and of no machine."""

from __future__ import annotations

import ast
import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import lorabench

MOST = 400_000  # bytes


@pytest.fixture(scope="module")
def path() -> Path:
    return Path(__file__).resolve().parent.parent.parent / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def cells(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["nbformat"] == 4
    return [cell for cell in found["cells"] if cell["cell_type"] == "code"]


def run(source: str, space: dict[str, Any], name: str) -> Any:
    """Execute a cell; the value of its last expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), space)


def test_every_cell_runs(path: Path, cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    space: dict[str, Any] = {}
    for n, cell in enumerate(cells):
        with pd.option_context("display.max_colwidth", pd.get_option("display.max_colwidth")):  # the notebook sets it
            shown = run("".join(cell["source"]), space, f"cell {n}")
        kinds = {kind for out in cell["outputs"] for kind in out.get("data", {})}
        assert ("image/png" in kinds) == isinstance(shown, Figure), n
        assert ("text/html" in kinds) == isinstance(shown, pd.DataFrame), n
    assert space["sweep"].name == "rank_sweep"
    assert np.isclose(space["by_example"].mean(), space["paired"].mean())  # the two ways by hand agree


def test_it_was_executed_from_top_to_bottom(cells: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
    pictures = [base64.b64decode(out["data"]["image/png"]) for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 2 and all(p.startswith(b"\x89PNG") for p in pictures)


def test_the_answer_it_stores_is_the_one_of_today(path: Path, cells: list[dict[str, Any]]) -> None:
    stored = next(c for c in cells if "".join(c["source"]) == "print(sweep.answer)")["outputs"][0]["text"]
    today = lorabench.load(path.parent.parent / "sweeps/ref_rank_sweep").answer
    assert "".join(stored).rstrip("\n") == today.rstrip("\n")


def test_it_is_small_and_of_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST
    shown = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"""(?<![\w.<*/-])/(?:tmp|home|root|work|usr|var|mnt|Users)\b|[A-Z]:\\\\""", shown)
