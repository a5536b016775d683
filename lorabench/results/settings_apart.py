"""One cell, one setting: records of one cell that were trained otherwise become cells of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorabench.config.cells import canonical, cell_id, cell_settings
from lorabench.results.derived import setting_text
from lorabench.store.records import Record

# What a run was trained on and in, beside its settings: `sweep.accept_drift` lets it differ.
TRAINED_ON = ("data_fingerprint", "model_fingerprint", "probe_fingerprint", "user_code", "precision")
Facts = Mapping[str, Any]


def split_cells(manifest: Mapping[str, Any], records: Mapping[str, Record]) -> dict[str, Any]:
    """Return the manifest with every cell of several settings split, and each difference shown as an axis.

    The runs that a cell listed first keep its id, so that a declared reference stays one. Where cells of one method
    differ in data, base or budget and no axis of theirs says so, all cells show it.
    """
    facts = {i: _facts(i, manifest, records) for c in manifest["cells"] for ids in c["runs"].values() for i in ids}
    cells = [part for cell in manifest["cells"] for part in _split(cell, facts)]
    return {**manifest, "cells": _show_hidden(cells, facts)}


def differences(a: Facts, b: Facts) -> list[str]:
    """Return the keys on which two runs' settings differ."""
    return sorted(key for key in {*a, *b} if canonical(a.get(key)) != canonical(b.get(key)))


def _facts(run_id: str, manifest: Mapping[str, Any], records: Mapping[str, Record]) -> dict[str, Any]:
    record = records.get(run_id)
    entry = manifest.get("runs", {}).get(run_id) or {}
    facts = cell_settings(record.config if record else entry.get("config") or {})
    said = {key: record.provenance.get(key) for key in TRAINED_ON} if record else {}
    return facts | {f"provenance.{key}": str(value) for key, value in said.items() if value is not None}


def _split(cell: Mapping[str, Any], facts: Mapping[str, Facts]) -> list[dict[str, Any]]:
    runs = [i for ids in cell["runs"].values() for i in ids if facts[i]]
    apart = _varied(facts[i] for i in runs)
    usual = {key: _usual(facts[i].get(key) for i in runs) for key in apart if key.startswith("provenance.")}

    def values(run_id: str) -> dict[str, Any]:
        return {key: facts[run_id].get(key, usual.get(key)) for key in apart} if facts[run_id] else {}

    groups: dict[str, list[str]] = {}
    for run_id in runs:
        groups.setdefault(canonical(values(run_id)), []).append(run_id)
    if len(groups) < 2:
        return [dict(cell)]
    parts: list[dict[str, Any]] = []
    for members in groups.values():
        label = {**cell["label"], "extra": {**cell["label"].get("extra", {}), **_texts(values(members[0]))}}
        kept = {role: [i for i in ids if i in members] for role, ids in cell["runs"].items()}
        parts.append({"id": cell_id(label) if parts else cell["id"], "label": label, "runs": kept})
    return parts


def _varied(several: Iterable[Facts]) -> list[str]:
    """Return the keys with several values. What nothing is recorded of (a failed run's data) is no other value."""
    seen: dict[str, set[str]] = {}
    several = list(several)
    for key in {key for facts in several for key in facts}:
        for facts in several:
            if key in facts or not key.startswith("provenance."):
                seen.setdefault(key, set()).add(canonical(facts.get(key)))
    return sorted(key for key, values in seen.items() if len(values) > 1)


def _usual(values: Iterable[Any]) -> Any:
    return Counter(v for v in values if v is not None).most_common(1)[0][0]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: value[:8] if key.endswith("fingerprint") else setting_text(value) for key, value in values.items()}


def _show_hidden(cells: Sequence[dict[str, Any]], facts: Mapping[str, Facts]) -> list[dict[str, Any]]:
    """Add the axes beside the method on which cells of one method and equal axes differ."""
    of = {c["id"]: next((facts[i] for ids in c["runs"].values() for i in ids if facts[i]), {}) for c in cells}
    alike: dict[str, list[Facts]] = {}
    for cell in cells:
        extra = {k: v for k, v in (cell["label"].get("extra") or {}).items() if not k.startswith("method")}
        if of[cell["id"]]:
            alike.setdefault(canonical([cell["label"]["method"], extra]), []).append(of[cell["id"]])
    hidden = {key for group in alike.values() for key in _varied(group) if not key.startswith(("method", "provenance"))}
    if not hidden:
        return list(cells)
    return [{**c, "label": {**c["label"], "extra": _with_axes(c, of[c["id"]], hidden)}} for c in cells]


def _with_axes(cell: Mapping[str, Any], facts: Facts, hidden: Iterable[str]) -> dict[str, Any]:
    extra = cell["label"].get("extra") or {}
    return _texts({key: facts.get(key) for key in hidden}) | extra if facts else extra
