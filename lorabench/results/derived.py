"""Sweeps without a manifest: cells made of the configs of runs that were launched one by one, or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorabench.config import alpha_rules
from lorabench.config.cells import cell_id, cell_settings
from lorabench.config.method_names import display_name
from lorabench.config.overrides import flatten
from lorabench.store.records import Record

LABEL_FIELDS = {"method.name", "method.r", "method.alpha", "method.target_modules", "method.use_rslora"}
TARGETS = {"full": "everything", "head": "head", "bitfit": "biases"}


def derive_cells(records: Mapping[str, Record]) -> dict[str, Any]:
    """Cells from configs: one for each method, r, alpha, targets and value of any other field that differs."""
    axes, times = _axes([r.config for r in records.values()]), _multiples(records.values())
    cells: dict[str, dict[str, Any]] = {}
    for run_id, record in sorted(records.items()):
        label = _label(record.config, axes)
        if (kind := _kind(record.config)) in times and label["alpha"] is not None:
            label["alpha_rule"] = times[kind]
        name = cell_id(label)
        cell = cells.setdefault(name, {"id": name, "label": label, "runs": {"tune": [], "confirm": []}})
        cell["runs"]["confirm" if record.role == "confirm" else "tune"].append(run_id)
    return {"cells": list(cells.values())}


def _kind(config: Mapping[str, Any]) -> tuple[str, ...]:
    method = config["method"]
    return tuple(setting_text(method.get(key)) for key in ("name", "target_modules", "use_rslora"))


def _multiples(records: Iterable[Record]) -> dict[tuple[str, ...], str]:
    """The alpha rule by kind of method where alpha is one multiple of r at two ranks or more: `2r`, as one would ask
    for it."""
    ranks, ratios = dict[tuple[str, ...], set[float]](), dict[tuple[str, ...], set[float]]()
    for config in (r.config for r in records):
        r, alpha = config["method"].get("r"), config["method"].get("alpha")
        if all(isinstance(x, (int, float)) and x > 0 for x in (r, alpha)):
            ranks.setdefault(_kind(config), set()).add(r)
            ratios.setdefault(_kind(config), set()).add(round(alpha / r, 9))
    return {
        kind: alpha_rules.rule_text(f"{min(found):g}r", use_rslora=kind[2] == "True")
        for kind, found in ratios.items()
        if len(found) == 1 < len(ranks[kind])
    }


def _axes(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted fields, beside those of the label, that have more than one value among the configs that have them."""
    seen: dict[str, set[str]] = {}
    for config in configs:
        settings = {".".join(key.split(".")[:2]) for key in cell_settings(config)}
        for key, value in flatten(config):
            if ".".join(key.split(".")[:2]) not in settings:
                continue  # it changes no number, or is rate, seed or role
            seen.setdefault(key, set()).add(setting_text(value))
    return sorted(key for key, values in seen.items() if len(values) > 1 and key not in LABEL_FIELDS)


def _label(config: Mapping[str, Any], axes: Sequence[str]) -> dict[str, Any]:
    method = config["method"]
    name, target, alpha = str(method["name"]), method.get("target_modules"), method.get("alpha")
    use_rslora = bool(method.get("use_rslora"))
    shown = display_name(name, use_rslora=use_rslora)
    rule = None if alpha is None else alpha_rules.rule_text(setting_text(alpha), use_rslora=use_rslora)
    flat = dict(flatten(config))
    return {
        "method": shown,
        "r": method.get("r"),
        "alpha": alpha,
        "alpha_rule": rule,
        "targets": setting_text(target) if target is not None else TARGETS.get(name, ""),
        "extra": {key: setting_text(flat[key]) for key in axes if key in flat},
    }


def setting_text(value: Any) -> str:
    """A setting as text: 16 for 16.0, a+b for a list."""
    if isinstance(value, (list, tuple)):
        return "+".join(setting_text(v) for v in value)
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:g}"
    return "none" if value is None else str(value)
