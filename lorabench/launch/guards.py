"""Refuse what makes Hydra run code by name or fill the memory, and explain Hydra's errors."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import OverrideParseException
from omegaconf import _utils as omegaconf_yaml

from lorabench.config.aliases import ALIASES
from lorabench.config.errors import ConfigError

MAX_YAML_VALUES = 200_000  # that a file may stand for; a shipped one has about fifty
# An override's key that is a name of code or a place for one, or a value that holds one.
_NAMES_CODE = re.compile(
    r"[+~]*(?:hydra\.(?:callbacks|job_logging|hydra_logging)\b.*|(?:.*\.)?_target_|[^=]*=.*\b_target_['\"]?\s*:.*)",
    re.S,
)
# Of a handler of Python's logging: by any other name it calls what the file names.
_LOGGING_CLASS = re.compile(r"logging\.\w+")
_NO_SUCH_SETTING = re.compile(
    r"Could not override '(?P<key>[^']+)'\.\s+To append to your config use \+(?P<argument>.*)", re.S
)
_SEVERAL_VALUES = re.compile(r"Ambiguous value for argument '(?P<key>[^'=]+)=(?P<values>.*)'$", re.M)
# Flags that say what Hydra is to do; it does one thing.
_ACTIONS = ({"-m", "--multirun"}, {"-r", "--run"}, {"-c", "--cfg"}, {"-i", "--info"}, {"-sc", "--shell-completion"})


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise `ConfigError` for overrides that name code to run. Groups (`hydra/launcher=basic`) name files, not code."""
    names = [argument.partition("=")[0] for argument in arguments]
    actions = [next(name for name in names if name in flags) for flags in _ACTIONS if flags & set(names)]
    if len(actions) > 1 and not {"-h", "--help", "--hydra-help"} & set(arguments):
        raise ConfigError("argument", " ".join(actions), "one of -m, --cfg and --info; --cfg and --info need no -m")
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.startswith("--e"):  # Hydra takes it for --experimental-rerun, which opens a pickle
            raise ConfigError("argument", argument, "an experiment is +experiment=NAME, a setting key=value")
        if equals and not key.startswith("-") and (_NAMES_CODE.fullmatch(key) or _NAMES_CODE.fullmatch(argument)):
            allowed = "settings only: what runs is chosen by name (method.name, task.kind, model.kind, hydra/launcher)"
            raise ConfigError(key.lstrip("+~"), value, allowed)


def explain_grammar_error(error: OverrideParseException) -> ConfigError:
    """Return the error of an argument that Hydra's grammar refused, which says how such a value is written."""
    reason = next((line for line in error.message.splitlines()[::-1] if not line.startswith("See http")), "")
    key, equals, value = error.override.partition("=")
    if not equals:
        return ConfigError("argument", key, f"a setting, key=value ({reason})")
    bare = value.strip("'\"").replace('"', "'")
    quoted = f"""'{key}="{bare}"'"""
    return ConfigError(key, value, f"{reason}; a text with brackets, quotes, commas or = is written {quoted}")


def explain_unknown_setting(message: str) -> ConfigError | None:
    """Return the error of a setting that the config lacks, with its name here where other tools name it so, or of one
    that has several values outside a sweep.

    message: Hydra's. None for any other message.
    """
    if several := _SEVERAL_VALUES.search(message):
        key, values = several["key"], several["values"]
        is_number = re.fullmatch(r"[-+\d.,e]+", values) and not key.endswith("seeds")
        as_list = "" if is_number else f"; a list is written '{key}=[{values}]'"
        return ConfigError(key, values, f"one value; several are tried one by one with -m {key}={values}{as_list}")
    match = _NO_SUCH_SETTING.search(message)
    if match is None:
        return None
    key, last = match["key"], match["key"].rpartition(".")[2].lower()
    ours = next((name for name, others in ALIASES.items() if last in others and name.count(".")), None)
    if ours and ours != key:
        hint = f"here it is {ours}"
    else:
        hint = f"--cfg job prints the settings there are, and one that a config file leaves out is added as +{key}=..."
    return ConfigError(key, match["argument"].partition("=")[2].strip(), f"no such setting in the config; {hint}")


_HYDRA_FILES = str(Path(hydra.__file__).parent) + os.sep
_get_yaml_loader = omegaconf_yaml.get_yaml_loader


def guard_yaml() -> None:
    """Make OmegaConf, and so Hydra, refuse YAML whose aliases multiply to more than `MAX_YAML_VALUES` values, and files
    that name code: `_target_`, `()` or a `class` that is none of Python's logging. Hydra's own files may."""
    omegaconf_yaml.get_yaml_loader = _get_guarded_loader


def _get_guarded_loader() -> Any:
    class Loader(_get_yaml_loader()):  # type: ignore[misc]
        def compose_document(self) -> Any:
            node = super().compose_document()
            if _size(node, {}) > MAX_YAML_VALUES:
                allowed = f"at most {MAX_YAML_VALUES:,} values, aliases counted where they stand"
                raise ConfigError("config file", str(self.name), allowed)
            if not str(self.name).startswith(_HYDRA_FILES):
                _check_names_no_code(node, str(self.name), set())
            return node

    return Loader


def _check_names_no_code(node: Any, file: str, seen: set[int]) -> None:
    """Raise `ConfigError` where a file's node, or one inside it, names code to run. seen: ids of nodes looked at."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, said = getattr(key, "value", None), getattr(value, "value", None)
            is_code = name in ("_target_", "()") or (name == "class" and not _LOGGING_CLASS.fullmatch(str(said)))
            if is_code:
                told = f"settings only; line {key.start_mark.line + 1} names code to run: {name}: {said}"
                raise ConfigError("config file", file, told)
            _check_names_no_code(value, file, seen)
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _check_names_no_code(inner, file, seen)


def _size(node: Any, sizes: dict[int, int]) -> int:
    """Return the number of values of a node, aliased ones counted again; over the limit for one that holds itself.

    sizes: of the nodes counted so far, by id.
    """
    if id(node) not in sizes:
        sizes[id(node)] = MAX_YAML_VALUES + 1  # while it is being counted: met again only if it holds itself
        inner: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [n for pair in node.value for n in pair]
        sizes[id(node)] = 1 + sum(_size(n, sizes) for n in inner)
    return sizes[id(node)]
