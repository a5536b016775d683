"""Every setting that an error or a message names is there, and every override it quotes can be typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lorabench.config.runs import parse
from lorabench.launch.command_line import config_dir

PACKAGE = Path(__file__).parents[2] / "lorabench"
SECTIONS = "model|task|method|optimizer|trainer|sweep|study|report"
SETTING = re.compile(rf"(?<![\w./'{{-])({SECTIONS})\.([a-z_]+)(?![\w.(/])(=\[[\w,.]*\]|=[^\s,;:)`'\"]*)?")
# Dotted as a setting is: names of files, a column that `adopt` maps, and what another tool calls a setting.
OTHERS = {"model.safetensors", "report.html", "report.md", "sweep.json", "method.r=rank_of_adapter", "method.use_dora"}
GROUPS = (
    [],
    ["task=text_file", "task.file=a.csv", "task.text_column=a", "task.label_column=b"],
    ["method=full"],
    ["task@task.probe=news"],
)


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a module, docstrings left out; what an f-string fills in is {}."""
    left_out = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    left_out |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value


def hints() -> dict[str, set[str]]:
    """Return the quoted overrides, or settings, with the files that quote them."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
            for section, name, value in SETTING.findall(text):
                literal = value if not set("{}<>…*") & set(value) and not value.endswith("...") else ""
                found.setdefault(f"{section}.{name}{literal.rstrip('.')}", set()).add(path.name)
    return {hint: files for hint, files in found.items() if hint not in OTHERS}


HINTS = hints()
OVERRIDES = sorted(hint for hint in HINTS if "=" in hint and not hint.endswith("="))


def test_every_setting_that_is_named_is_there(repo: Path) -> None:
    known = set(re.findall(r"^\| `([\w.]+)`", (repo / "docs" / "settings.md").read_text(encoding="utf-8"), re.M))
    unknown = {hint: files for hint, files in HINTS.items() if hint.partition("=")[0] not in known}
    assert len(HINTS) > 50
    assert not unknown


def composes(override: str) -> bool:
    for group in GROUPS:
        try:
            with initialize_config_dir(config_dir(), version_base="1.3"):
                parse(compose("config", overrides=[*group, override]))
            return True
        except Exception as e:  # the next group may know the setting
            print(override, group, e)
        finally:
            GlobalHydra.instance().clear()
    return False


@pytest.mark.parametrize("override", OVERRIDES)
def test_every_override_that_is_quoted_can_be_typed(override: str) -> None:
    assert composes(override)


def test_a_dead_hint_is_found() -> None:
    assert not composes("trainer.keep=newest")
    assert not composes("sweep.no_such=true")
