"""Write docs/settings.md from the help texts and ranges that the settings themselves declare.

    python docs/write_settings.py

A test holds the page against what this gives, so a new setting cannot be forgotten there.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lorabench.config.components import component_names, load_component
from lorabench.config.settings import (
    OptimizerConfig,
    ReportConfig,
    StudyConfig,
    SweepConfig,
    TrackerConfig,
    TrainerConfig,
)

PAGE = Path(__file__).resolve().parent / "settings.md"
SECTIONS = {
    "sweep": SweepConfig, "study": StudyConfig, "trainer": TrainerConfig, "optimizer": OptimizerConfig,
    "report": ReportConfig, "tracker": TrackerConfig,
}  # fmt: skip
INTRODUCTION = """# Settings

Every setting is `key=value` on the command line, and a key of the YAML files under `conf/`. `python -m lorabench --cfg job`
prints all of them with their values. This page is written from the settings' own help by `python docs/write_settings.py`.

"Pack" says what a difference between two runs means for packing. *may differ*: the runs can share a pack. *splits*: they train
in packs of their own. *no matter*: the setting changes no number, and is no part of a run's identity.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the whole page as Markdown."""
    parts = [INTRODUCTION]
    for name, section in SECTIONS.items():
        parts.append(f"## {name}\n{table(section, name, packs=name in ('trainer', 'optimizer'))}")
    for kind in ("model", "task", "method"):
        for name in component_names(kind):
            if name != "local":
                selector = "name" if kind == "method" else "kind"
                parts.append(
                    f"## {kind}, {selector} {name}\n{table(load_component(kind, name, None), kind, packs=True)}"
                )
    return "\n".join(parts)


def table(section: type, prefix: str, *, packs: bool) -> str:
    """Return a Markdown table of a section's fields: key, default, what it does, what is allowed, what it means for packs."""
    head = "| setting | default | what it does | allowed |" + (" pack |" if packs else "")
    lines = [head, "|---|---|---|---|" + ("---|" if packs else "")]
    for field in dataclasses.fields(section):
        meta = field.metadata
        cells = [f"`{prefix}.{field.name}`", f"`{default_of(field)}`", meta.get("help", ""), allowed_of(meta)]
        if packs:
            cells.append(
                "no matter" if not meta.get("identity", True) else "may differ" if meta.get("varies") else "splits"
            )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as YAML writes it; ??? where it must be set."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "???"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def allowed_of(meta: Any) -> str:
    """Return the range or the choices of a setting in words; nothing where its type says all."""
    if not meta:
        return ""
    if meta["choices"]:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    words = [f"at least {meta['low']:g}" if meta["low"] is not None else "", f"above {meta['above']:g}" if meta["above"] is not None else "",
             f"at most {meta['high']:g}" if meta["high"] is not None else ""]  # fmt: skip
    return ", ".join(word for word in words if word)


if __name__ == "__main__":
    main()
