"""Methods, tasks and models by file name: one dataclass `Config`, one file, one YAML. There is no registry to edit."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lorabench.config.contracts.component import Component
from lorabench.config.errors import ConfigError, UntrustedFile

# The contract of a user's own dataclass that inherits none. Such a task reads tokens.
_DEFAULT_CONTRACTS = {
    "model": ("lorabench.config.contracts.model", "Model"),
    "task": ("lorabench.tasks.text_task", "TextTask"),
}

_may_run_files: ContextVar[bool] = ContextVar("may_run_files", default=True)

# Modules that users' own files imported before 0.1.0, and where their contents are now.
MOVED_MODULES = {
    "lorabench.base": "lorabench.config.contracts.model and lorabench.models.inventory",
    "lorabench.schema": "lorabench.config.fields and lorabench.config.errors",
    "lorabench.slice_plan": "lorabench.config.contracts.method",
    "lorabench.tasks.contract": "lorabench.config.contracts.task",
}


def component_names(section: str) -> list[str]:
    """Return what a section's selector may name. section: `model`, `task` or `method`."""
    package = importlib.import_module(f"lorabench.{section}s")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if _defines_config(package, m.name))
    return names if section == "method" else [*names, "local"]


@cache
def _defines_config(package: ModuleType, name: str) -> bool:
    source = Path(package.__path__[0], f"{name}.py")
    return source.is_file() and "class Config" in source.read_text(encoding="utf-8")


def load_component(section: str, name: str, file: str | None) -> type[Component]:
    """Return the `Config` dataclass that a selector names. Raises `ConfigError`.

    file: for the name `local`, a Python file of the user's own, which is run.
    """
    if name == "local" and section != "method":
        return _load_local(section, file)
    if name not in component_names(section):
        key = f"{section}.{'name' if section == 'method' else 'kind'}"
        raise ConfigError(key, name, f"allowed: {', '.join(component_names(section))}")
    config: type[Component] = importlib.import_module(f"lorabench.{section}s.{name}").Config
    return config


def _load_local(section: str, file: str | None) -> type[Component]:
    key = f"{section}.file"
    if not file:
        raise ConfigError(key, file, f"the Python file that holds your {section}'s `Config` dataclass")
    path = Path(file).expanduser().resolve()
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(key, file, "an existing .py file")
    module = import_file(path, key)
    config: Any = getattr(module, "Config", None)
    if not dataclasses.is_dataclass(config) or not isinstance(config, type):
        raise ConfigError(key, file, "the file must define a dataclass named Config")
    config = _with_contract(section, config)
    if undefined := sorted(config.__abstractmethods__):
        raise ConfigError(key, file, f"its Config must define {', '.join(undefined)}")
    config.local_file = str(path)
    return config


def _moved_hint(error: Exception) -> str:
    """Return where a module of lorabench is now that an import of a user's file did not find; "" for any other
    error."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return f"; what it held is in {MOVED_MODULES[name]} now" if name in MOVED_MODULES else ""


@contextmanager
def trust_files(trusted: bool) -> Iterator[None]:
    """Let Python files that a config names run in the block, or raise `UntrustedFile` for the first."""
    before = _may_run_files.set(trusted)
    try:
        yield
    finally:
        _may_run_files.reset(before)


def import_file(path: Path, key: str) -> ModuleType:
    """Return a Python file of the user's own as a module, named by its path and content and run once.

    key: the setting that names it. Raises `ConfigError` where it does not import, and `UntrustedFile` where it may not
    run (`trust_files`).
    """
    if not _may_run_files.get():
        allowed = "a record names this Python file, which would run with your rights: read it, then add --trust"
        raise UntrustedFile(key, str(path), allowed)
    name = f"lorabench_local_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as e:
            del sys.modules[name]
            why = f"the file does not import: {type(e).__name__}: {e}{_moved_hint(e)}"
            raise ConfigError(key, str(path), why) from e
    return sys.modules[name]


def _with_contract(section: str, config: type) -> Any:
    """Return a user's dataclass itself where it inherits a contract, else a subclass with the contract's defaults.

    A class that inherits nothing is not asked for its methods: one that is missing raises where it is called.
    """
    if issubclass(config, Component):
        return config
    module, name = sys.modules[config.__module__], "ConfigWithDefaults"
    if not hasattr(module, name):
        contract_module, contract = _DEFAULT_CONTRACTS[section]
        bases = (config, getattr(importlib.import_module(contract_module), contract))
        attributes = {"__module__": config.__module__, "__doc__": config.__doc__}
        subclass: Any = types.new_class(name, bases, exec_body=lambda namespace: namespace.update(attributes))
        subclass.__abstractmethods__ = frozenset()
        setattr(module, name, subclass)  # where pickle looks for it
    return getattr(module, name)
