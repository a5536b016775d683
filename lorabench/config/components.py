"""Methods, tasks and model families by file name: one dataclass `Config`, one file, one YAML. No registry to edit."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

from lorabench.config.contracts.component import Component
from lorabench.config.errors import ConfigError

# What a user's own dataclass that inherits no contract is taken for: a task of such a file reads tokens.
DEFAULTS = {"model": ("lorabench.config.contracts.model", "Model"), "task": ("lorabench.tasks.text_task", "TextTask")}


def available(section: str) -> list[str]:
    """Names a section's selector takes: the modules of its package that hold a `Config`."""
    package = importlib.import_module(f"lorabench.{section}s")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return sorted(n for n in names if _defines_config(package, n)) + (["local"] if section != "method" else [])


def _defines_config(package: ModuleType, name: str) -> bool:
    source = Path(package.__path__[0], f"{name}.py")
    return source.is_file() and "class Config" in source.read_text(encoding="utf-8")


def component(section: str, name: str, file: str | None) -> type[Component]:
    """The `Config` dataclass behind a selector. `local` reads a Python file the user names: it runs that file."""
    key = f"{section}.{'name' if section == 'method' else 'kind'}"
    if name == "local" and section != "method":
        return _local(section, file)
    if name not in available(section):
        raise ConfigError(key, name, f"allowed: {', '.join(available(section))}")
    config: type[Component] = importlib.import_module(f"lorabench.{section}s.{name}").Config
    return config


def _local(section: str, file: str | None) -> type[Component]:
    if not file:
        raise ConfigError(f"{section}.file", file, f"the Python file that holds your {section}'s `Config` dataclass")
    path = Path(file).expanduser().resolve()
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"{section}.file", file, "an existing .py file")
    name = f"lorabench_local_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as e:
            del sys.modules[name]
            raise ConfigError(f"{section}.file", file, f"the file does not import: {type(e).__name__}: {e}") from e
    config: Any = getattr(sys.modules[name], "Config", None)
    if not dataclasses.is_dataclass(config) or not isinstance(config, type):
        raise ConfigError(f"{section}.file", file, "the file must define a dataclass named Config")
    config = _with_contract(section, config)
    if missing := sorted(config.__abstractmethods__):
        raise ConfigError(f"{section}.file", file, f"its Config must define {', '.join(missing)}")
    config.local_file = str(path)
    return config


def _with_contract(section: str, config: type) -> Any:
    """Return a user's dataclass itself where it inherits the contract, else a subclass with the contract's defaults.

    A class that inherits nothing is not asked for its methods: one that is missing raises where it is called.
    """
    if issubclass(config, Component):
        return config
    module, name = sys.modules[config.__module__], "ConfigWithDefaults"
    if not hasattr(module, name):
        path, contract = DEFAULTS[section]
        bases = (config, getattr(importlib.import_module(path), contract))
        names = {"__module__": config.__module__, "__doc__": config.__doc__}
        adopted: Any = types.new_class(name, bases, exec_body=lambda space: space.update(names))
        adopted.__abstractmethods__ = frozenset()
        setattr(module, name, adopted)  # where pickle looks for it
    return getattr(module, name)
