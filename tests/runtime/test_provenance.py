"""Which code stands behind a number: an edit there refuses to go on in the middle of training, and one of a report does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorabench.runtime.provenance import FOUND_BY_NAME, fingerprint, training_code
from test_architecture import imports, modules, own


@pytest.fixture
def package(repo: Path, tmp_path: Path) -> Path:
    """A copy of the package's source."""
    return Path(
        shutil.copytree(repo / "lorabench", tmp_path / "lorabench", ignore=shutil.ignore_patterns("__pycache__"))
    )


def edited(path: Path) -> None:
    assert path.is_file()
    path.write_text(path.read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")


ELSEWHERE = [
    "report/tables.py",
    "trackers/wandb/tracker.py",
    "status.py",
    "claims/judge.py",
    "plan/study.py",
    "costs/measurement.py",
    "sweep/execute.py",
    "__init__.py",
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_edit_of_what_cannot_change_a_number_leaves_it(package: Path, name: str) -> None:
    before = fingerprint(package)
    edited(package / name)
    assert fingerprint(package) == before


INSIDE = [
    "adapters/layers.py",
    "adapters/__init__.py",
    "training/module.py",
    "training/optimizer.py",
    "training/batches.py",
    "methods/ia3.py",
    "tasks/planted.py",
]


@pytest.mark.parametrize("name", INSIDE)
def test_an_edit_of_training_code_changes_it(package: Path, name: str) -> None:
    before = fingerprint(package)
    edited(package / name)
    assert fingerprint(package) != before


def test_a_new_file_counts_once_training_imports_it(package: Path) -> None:
    before = fingerprint(package)
    (package / "tricks.py").write_text("FACTOR = 2\n")
    assert fingerprint(package) == before
    with open(package / "training/optimizer.py", "a") as f:
        f.write("\n\ndef later():\n    from lorabench import (\n        tricks as t,\n    )\n\n    return t\n")
    assert package / "tricks.py" in training_code(package)


def test_it_is_what_an_import_walk_of_the_syntax_tree_finds(repo: Path) -> None:
    """The walk in the package goes by lines of text, since parsing takes seconds; here it is held against the real thing."""
    named = [m for m in modules() if m.split(".")[1:2] and m.split(".")[1] in FOUND_BY_NAME]
    seen, todo = set[str](), ["lorabench.training.train", *named]
    while todo:
        module = todo.pop()
        if module in seen or module not in modules() or module == "lorabench":
            continue
        seen.add(module)
        todo += [module.rpartition(".")[0], *(i.module for i in imports(module) if own(i))]
    assert set(training_code(repo / "lorabench")) == {modules()[m] for m in seen}
    assert not {"report", "trackers", "clusters", "sweep"} & {m.split(".")[1] for m in seen}
