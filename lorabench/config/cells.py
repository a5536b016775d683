"""The id of a cell: one thing compared, of whatever rate and seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cell_id(label: Mapping[str, Any]) -> str:
    """Return a readable, stable id, such as `lora-r4-a2r-query+value`.

    label: method, r, alpha_rule and targets (None where there is none), and `extra`, the values of other axes.
    """
    parts = [str(label["method"]).lower()]
    for letter, key in (("r", "r"), ("a", "alpha_rule"), ("", "targets")):
        if label.get(key) is not None:
            parts.append(f"{letter}{label[key]}")
    parts += [f"{axis}={value}" for axis, value in sorted(label["extra"].items())]
    return "-".join(parts).replace(" ", "")
