"""The design as a test: packages import one way, as the table of docs/architecture.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Which packages may know a library at all, inside functions too. A library that is not here is anybody's.
KNOWN_TO = {
    "hydra": {"__main__", "launch", "hydra_plugins"},
    "omegaconf": {"config", "launch", "__main__", "hydra_plugins"},
    "pytorch_lightning": {"training"},
    "transformers": {"models", "tasks"},
    "wandb": {"trackers"},
    "tensorboard": {"trackers"},
    "submitit": {"clusters"},
    "ray": {"clusters"},
    "optuna": {"launch", "hydra_plugins"},
    "peft": set(),  # its format is read and written here; its code is what the tests compare with
}
# Everything else is there before torch is: `--help`, `--cfg job`, bad input and reports start in under a second.
NEEDS_TORCH = (
    "lorabench.adapters",
    "lorabench.training",
    "lorabench.sweep.dry_run",
    "lorabench.sweep.execute",
    "lorabench.sweep.progress",
    "lorabench.sweep.protocol",
    "lorabench.sweep.ranks",
    "lorabench.sweep.resume",
    "lorabench.sweep.sharing",
    "lorabench.sweep.workers",
    "lorabench.clusters",
    "lorabench.export",
    "lorabench.predict",
    "lorabench.plan.study",
    "lorabench.analyze.spectra",
    "lorabench.analyze.updates",
    "lorabench.analyze.deltas",
    "lorabench.analyze.subspaces",
    "lorabench.costs.timings",
)


SCIENTIFIC = {"stats", "results", "claims", "report", "plan", "compare"}  # pandas, scipy and matplotlib may be there


@dataclass(frozen=True)
class Import:
    module: str  # dotted, as imported; for our own: the module's file
    line: int
    top: bool  # runs when the module is imported
    typing: bool  # under `if TYPE_CHECKING`


@cache
def modules() -> dict[str, Path]:
    """Our modules by dotted name."""
    found = {}
    for top in ("lorabench", "hydra_plugins"):
        for path in sorted((REPO / top).rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def unit(module: str) -> str:
    """The row of the table a module belongs to: a package, or a command at the top."""
    parts = module.split(".")
    return parts[1] if parts[0] == "lorabench" and len(parts) > 1 else parts[0]


@cache
def imports(module: str) -> tuple[Import, ...]:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return tuple(_walk(tree, top=True, typing=False))


def _walk(node: ast.AST, *, top: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(_file(alias.name), child.lineno, top, typing)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import in line {child.lineno}: write it out"
            for alias in child.names:
                yield Import(_file(f"{child.module}.{alias.name}"), child.lineno, top, typing)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _walk(child, top=top and not inside, typing=typing or guard)


def _file(dotted: str) -> str:
    """`lorabench.config.contracts.method.SlicePlan` is an import of the file `lorabench.config.contracts.method`."""
    return dotted if dotted in modules() or "." not in dotted else dotted.rsplit(".", 1)[0]


def own(found: Import) -> bool:
    return found.module.split(".")[0] in ("lorabench", "hydra_plugins")


@cache
def table() -> dict[str, frozenset[str]]:
    """Unit -> units it may import, from the document; who may import a unit may import what that one may."""
    text = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
    body = text.split("## Packages, bottom up", 1)[1].split("\n## ", 1)[0]
    allowed: dict[str, frozenset[str]] = {}
    for line in body.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3 or "`" not in cells[0]:
            continue
        earlier = frozenset(allowed)
        named = frozenset(_names(cells[2].split("(")[0]))
        unknown = named - earlier
        assert not unknown, (
            f"docs/architecture.md: {cells[0]} may import {sorted(unknown)}, which stand below it or nowhere"
        )
        if cells[2].startswith("all above"):
            may = earlier
        elif cells[2].startswith("anything below"):
            may = frozenset().union(*(allowed[name] for name in named))
        else:
            may = named.union(*(allowed[name] for name in named))
        allowed |= dict.fromkeys(_names(cells[0]), may)
    return allowed


def _names(cell: str) -> list[str]:
    return [name.removesuffix("/*") for name in re.findall(r"`([^`]+)`", cell)]


def test_the_table_lists_every_module() -> None:
    units = {unit(module) for module in modules()}
    assert units <= set(table()), f"not in the table of docs/architecture.md: {sorted(units - set(table()))}"


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    home = unit(module)
    may = table().get(home, frozenset()) | {home, "lorabench"}
    wrong = {f"{i.module} (line {i.line})" for i in imports(module) if own(i) and unit(i.module) not in may}
    assert not wrong, f"{module} may import {sorted(may)}, and imports {sorted(wrong)}"


@pytest.mark.parametrize("package", ["methods", "models", "tasks", "trackers"])
def test_siblings_do_not_know_each_other(package: str) -> None:
    """A method, model, task or tracker is one file: what two share is a file of its own that is neither."""
    prefix = f"lorabench.{package}."
    members = {m for m, path in modules().items() if m.startswith(prefix) and _is_member(path)}
    for module in members:
        others = [i.module for i in imports(module) if i.module in members - {module}]
        assert not others, f"{module} imports {others}"


def _is_member(path: Path) -> bool:
    return re.search(r"^(class Config\b|def build\()", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def test_no_import_cycles() -> None:
    graph = {m: {i.module for i in imports(m) if own(i) and not i.typing} - {m} for m in modules()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("library", KNOWN_TO)
def test_libraries_stay_where_they_belong(library: str) -> None:
    outsiders = [module for module in modules() if unit(module) not in KNOWN_TO[library]]
    wrong = {f"{m} (line {i.line})" for m in outsiders for i in imports(m) if i.module.split(".")[0] == library}
    assert not wrong, f"{library} is known to {sorted(KNOWN_TO[library])} only: {sorted(wrong)}"


@pytest.mark.parametrize(
    "module", [m for m in modules() if not f"{m}.".startswith(tuple(f"{name}." for name in NEEDS_TORCH))]
)
def test_starts_without_torch(module: str) -> None:
    """No chain of module-level imports leads to a library that takes a second to import."""
    heavy = {"torch", "pytorch_lightning", "transformers", "datasets", "peft", "wandb", "pandas", "scipy", "matplotlib"}
    light = heavy - {"pandas", "scipy", "matplotlib"} if unit(module) in SCIENTIFIC else heavy
    seen, stack = {module: [module]}, [module]
    while stack:
        here = stack.pop()
        for i in imports(here):
            if not i.top or i.typing:
                continue
            chain = [*seen[here], i.module]
            assert i.module.split(".")[0] not in light, " -> ".join(chain)
            if i.module in modules() and i.module not in seen:
                seen[i.module] = chain
                stack.append(i.module)


def test_seconds_come_from_one_steady_clock() -> None:
    """A clock that is set while a run goes on gives negative seconds. Ages of files alone need the system's clock."""
    clocks = re.compile(r"\btime\.(time|time_ns|perf_counter|perf_counter_ns)\b|datetime\.(now|utcnow)")
    users = {module for module, path in modules().items() if clocks.search(path.read_text(encoding="utf-8"))}
    assert users == {"lorabench.status"}


def test_no_drawers() -> None:
    drawers = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    assert not [m for m in modules() if m.rsplit(".", 1)[-1] in drawers]


def test_hydra_plugins_is_a_namespace_package() -> None:
    """With an __init__.py it would hide the plugins that other packages put there."""
    assert not (REPO / "hydra_plugins/__init__.py").exists()


def test_no_two_test_files_share_a_name() -> None:
    """They are imported by their bare names: a second one would stop the whole suite."""
    names = [path.name for path in (REPO / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
