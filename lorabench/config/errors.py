"""What an error about a setting says."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """Bad input from a user: names the dotted key, the value got and what is allowed. Exit code 2."""

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{key}={_show(value)}: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.value, self.allowed)  # a worker hands it on; its one argument would not do


class ExistingWork(ConfigError):
    """What is on disk does not fit what was asked (foreign files, changed data): nothing was touched."""


class Unwritable(OSError):
    """A file of a store or a report cannot be written (disk full, gone, no right): no run's fault. Exit code 1."""


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
