"""Errors whose text a user reads. The commands map them to exit codes."""

from __future__ import annotations

from typing import Any

MAX_SHOWN_CHARACTERS = 200  # of a value in a message


class ConfigError(ValueError):
    """Bad input: the message names the dotted key, the value it had and what is allowed. Exit code 2."""

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{key}={_shorten(value)}: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.value, self.allowed)  # pickle would call it with the message alone


class ExistingWork(ConfigError):
    """What is on disk does not fit what was asked (foreign files, changed data). Nothing was touched. Exit code 2."""


class UntrustedFile(ConfigError):
    """A record names a Python file, which runs only with the user's word. Nothing of it ran. Exit code 2."""


class Unwritable(OSError):
    """A file of a store or a report cannot be written (disk full, gone, no right). No run failed by it. Exit code 1."""


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."
