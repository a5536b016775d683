"""What a command line or a YAML file must not make Hydra do: run code by name, or fill the memory; what it cannot read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import _utils as omegaconf_yaml

from lorabench.config.aliases import ALIASES
from lorabench.config.errors import ConfigError

MOST = 200_000  # values a YAML file may stand for; a shipped one has about fifty
CODE = re.compile(  # an override's key that is a name of code or a place for one, or a value that holds one
    r"[+~]*(?:hydra\.(?:callbacks|job_logging|hydra_logging)\b.*|(?:.*\.)?_target_|[^=]*=.*\b_target_['\"]?\s*:.*)",
    re.S,
)


WHAT = ({"-m", "--multirun"}, {"-r", "--run"}, {"-c", "--cfg"}, {"-i", "--info"}, {"-sc", "--shell-completion"})


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse overrides that name code to run. Raises `ConfigError`. Groups (`hydra/launcher=basic`) name files, not code."""
    given = [argument.partition("=")[0] for argument in arguments]
    asked = [next(argument for argument in given if argument in names) for names in WHAT if names & set(given)]
    if len(asked) > 1 and not {"-h", "--help", "--hydra-help"} & set(arguments):
        raise ConfigError("argument", " ".join(asked), "one of -m, --cfg and --info; --cfg and --info need no -m")
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.startswith("--exp") and key != "--experimental-rerun":  # Hydra would take it for short for that
            raise ConfigError("argument", argument, "an experiment is +experiment=NAME, a setting key=value")
        if equals and not key.startswith("-") and (CODE.fullmatch(key) or CODE.fullmatch(argument)):
            allowed = "settings only: what runs is chosen by name (method.name, task.kind, model.kind, hydra/launcher)"
            raise ConfigError(key.lstrip("+~"), value, allowed)


def unreadable(argument: str, message: str) -> ConfigError:
    """For an argument that Hydra's grammar stumbled over, with its message: how a value with brackets or spaces is written."""
    reason = next((line for line in message.splitlines()[::-1] if not line.startswith("See http")), "")
    key, equals, value = argument.partition("=")
    if not equals:
        return ConfigError("argument", key, f"a setting, key=value ({reason})")
    bare = value.strip("'\"").replace('"', "'")
    quoted = f"""'{key}="{bare}"'"""
    return ConfigError(key, value, f"{reason}; a text with brackets, quotes, commas or = is written {quoted}")


NO_SETTING = re.compile(
    r"Could not override '(?P<key>[^']+)'\.\s+To append to your config use \+(?P<argument>.*)", re.S
)


def unknown_setting(message: str) -> ConfigError | None:
    """For what Hydra says of a setting that the config has not: how it is called here, where other tools name it so.

    None for any other message.
    """
    found = NO_SETTING.search(message)
    if found is None:
        return None
    key, last = found["key"], found["key"].rpartition(".")[2].lower()
    ours = next((name for name, others in ALIASES.items() if last in others and name.count(".")), None)
    told = (
        f"here it is {ours}"
        if ours and ours != key
        else (f"--cfg job prints the settings there are, and one that a config file leaves out is added as +{key}=...")
    )
    return ConfigError(key, found["argument"].partition("=")[2].strip(), f"no such setting in the config; {told}")


def guard_yaml() -> None:
    """From here on OmegaConf, and so Hydra, refuses YAML whose aliases multiply to more than `MOST` values."""
    made = omegaconf_yaml.get_yaml_loader
    if getattr(made, "guarded", False):
        return

    def get_yaml_loader() -> Any:
        class Loader(made()):  # type: ignore[misc]
            def compose_document(self) -> Any:
                node = super().compose_document()
                if _size(node, {}) > MOST:
                    raise ConfigError(
                        "config file", str(self.name), f"at most {MOST:,} values, aliases counted where they stand"
                    )
                return node

        return Loader

    get_yaml_loader.guarded = True  # type: ignore[attr-defined]
    omegaconf_yaml.get_yaml_loader = get_yaml_loader


def _size(node: Any, known: dict[int, int]) -> int:
    """Values below a node, what an alias repeats counted again; more than `MOST` for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # while it is being counted: met again only if it holds itself
        inner: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [n for pair in node.value for n in pair]
        known[id(node)] = 1 + sum(_size(n, known) for n in inner)
    return known[id(node)]
