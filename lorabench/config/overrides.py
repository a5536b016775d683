"""Values in Hydra's override grammar."""

from __future__ import annotations

import re
from typing import Any


def _hydra(value: Any) -> str:
    """A value in Hydra's grammar, to the last digit."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = str(value)
    return text if isinstance(value, int) else in_hydra(text)


def in_hydra(text: str) -> str:
    """A text as a value in Hydra's override grammar: in quotes unless it is plain. Only backslashes before a quote are doubled."""
    if re.fullmatch(r"([\w./+-]|\\(?=[\w.]))+", text, re.ASCII):
        return text
    return "'" + re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text)) + "'"
