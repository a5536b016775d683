"""Settings as a command line has them: dotted keys, and values in Hydra's override grammar."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorabench.config.errors import ConfigError

_PLAIN_KEY = re.compile(r"[\w.*+/-]+", re.ASCII)  # what Hydra's grammar takes as a key without quotes
_ENTRY = r"(.+?)\s*:\s*(\d+(?:\.\d+)?)\s*(?:,|$)"


def override_value(value: Any, *, floats_keep_point: bool = False) -> str:
    """Return a value as an override's text has it, to the last digit.

    floats_keep_point: 16.0 is written so, not as 16.
    """

    def text(inner: Any) -> str:
        return override_value(inner, floats_keep_point=floats_keep_point)

    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        whole = "{" + ",".join(f"{key}:{text(inner)}" for key, inner in value.items()) + "}"
        return whole if all(_PLAIN_KEY.fullmatch(str(key)) for key in value) else f'"{_escape(whole)}"'
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(text, value)) + "]"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value and not floats_keep_point else repr(value)
    return str(value) if isinstance(value, int) else quote(str(value))


def mapping(value: Any, key: str) -> Any:
    """Return a setting's mapping of names or regexes to numbers, of which a command line may make a text.

    Hydra's grammar has no brackets in keys: `method.rank_pattern="{layer.[01].query:4}"` arrives as text. None is an
    empty mapping; what is neither stays. Raises `ConfigError` for a text that is no such mapping.
    """
    if not isinstance(value, str):
        return {} if value is None else value
    inside = re.fullmatch(r"\s*\{(.*)\}\s*", value, re.S)
    entries = inside and re.fullmatch(rf"(?:{_ENTRY})*", inside[1])
    if not inside or not entries:
        raise ConfigError(
            key, value, 'a mapping of names or regexes to numbers, such as {query:4} or "{layer.[01].q:4}"'
        )
    return {m[1].strip(" '"): float(m[2]) if "." in m[2] else int(m[2]) for m in re.finditer(_ENTRY, inside[1])}


def _escape(text: str) -> str:
    """Return a text as it stands between double quotes; Hydra doubles only the backslashes before a quote."""
    return re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', text))


def quote(text: str) -> str:
    """Return a text as an override's value, in quotes unless it is plain.

    Hydra's grammar doubles only the backslashes before a quote.
    """
    if re.fullmatch(r"([\w./+-]|\\(?=[\w.]))+", text, re.ASCII):
        return text
    return "'" + re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text)) + "'"


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give each setting of nested mappings as its dotted key and its value. An empty mapping is a value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
