"""What the JSON files of a sweep must look like before anything is read out of them: they may be torn, or not ours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[
    [Any], str | None
]  # None where a value fits, else the first thing wrong: `config.seed: a whole number`. Never raises
RUN_ID = re.compile(r"[0-9a-f]{12}")
STATUSES = ("completed", "failed", "diverged", "pruned")


def is_a(what: str, test: Callable[[Any], bool], *, or_none: bool = False) -> Shape:
    def check(value: Any) -> str | None:
        return None if (or_none and value is None) or test(value) else what

    return check


def fields(*, needs: Mapping[str, Shape] | None = None, may: Mapping[str, Shape] | None = None) -> Shape:
    """A mapping with the fields it `needs`, those it `may` have, and others as they come."""

    def check(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return "a mapping"
        for key in needs or {}:
            if key not in value:
                return f"{key}: is missing"
        for key, shape in {**(needs or {}), **(may or {})}.items():
            if key in value and (wrong := shape(value[key])):
                return _at(key, wrong)
        return None

    return check


def each(shape: Shape, key: Shape | None = None) -> Shape:
    """A list of one shape; with `key`, a mapping whose keys and values have these shapes."""

    def check(value: Any) -> str | None:
        if not isinstance(value, Mapping if key else list):
            return "a mapping" if key else "a list"
        for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            if wrong := (key(name) if key else None) or shape(inner):
                return _at(str(name), wrong)
        return None

    return check


def _at(key: str, wrong: str) -> str:
    path, _, what = wrong.rpartition(": ")
    return f"{key}.{path}: {what}" if path else f"{key}: {what}"


def _number(value: Any) -> bool:
    """A finite number that a float holds."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


TEXT = is_a("a text", lambda v: isinstance(v, str))
MAYBE_TEXT = is_a("a text or null", lambda v: isinstance(v, str), or_none=True)
MAYBE_NUMBER = is_a("a finite number or null", _number, or_none=True)
WHOLE = is_a("a whole number, not negative", _whole)
MAYBE_WHOLE = is_a("a whole number or null", _whole, or_none=True)
RATE = is_a("a number above 0", lambda v: _number(v) and v > 0)
RUN = is_a("12 hex digits", lambda v: isinstance(v, str) and RUN_ID.fullmatch(v) is not None)
ROLE = is_a("tune or confirm", lambda v: v in ("tune", "confirm") if isinstance(v, str) else False)
SECTION = fields()
SCALAR = is_a("a number, a text, true, false or null", lambda v: v is None or isinstance(v, (str, bool)) or _number(v))
NAMES = is_a(
    "a text or a list of texts",
    lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(x, str) for x in v)),
    or_none=True,
)

_METHOD = fields(
    needs={"name": TEXT}, may={"r": MAYBE_WHOLE, "alpha": is_a("a number, a text or null", lambda v: isinstance(v, str) or _number(v), or_none=True), "target_modules": NAMES}
)  # fmt: skip
CONFIG = fields(
    needs={"method": _METHOD, "optimizer": fields(needs={"lr": RATE}), "seed": WHOLE},
    may={"model": SECTION, "task": SECTION, "trainer": SECTION, "role": ROLE},
)
RESOURCES = fields(
    may=dict.fromkeys(
        ("train_seconds", "eval_seconds", "pack_seconds", "peak_memory_bytes", "tokens_per_second"), MAYBE_NUMBER
    )
    | dict.fromkeys(("pack_size", "trainable_parameters", "total_parameters", "steps", "examples", "tokens", "train_examples", "val_examples", "test_examples"), MAYBE_WHOLE)
)  # fmt: skip


def _metrics(value: Any) -> str | None:
    """What has a slash (`val/loss`, `test/accuracy`, `probe/...`) is a number; what stands beside it (`primary`, `best_step`) as it comes."""
    if wrong := each(SCALAR, TEXT)(value):
        return wrong
    scores = {k: v for k, v in value.items() if "/" in k and k != "probe/name"}
    return each(MAYBE_NUMBER, TEXT)(scores) or fields(may={"best_step": MAYBE_WHOLE, "pruned_step": MAYBE_WHOLE})(value)


RECORD = fields(
    needs={
        "run_id": RUN,
        "role": ROLE,
        "status": is_a(", ".join(STATUSES), lambda v: isinstance(v, str) and v in STATUSES),
        "config": CONFIG,
    },
    may={
        "metrics": _metrics,
        "resources": RESOURCES,
        "provenance": SECTION,
        "error": MAYBE_TEXT,
        "schema": is_a("1", lambda v: v == 1),
    },
)  # fmt: skip
_LABEL = fields(
    needs={"method": TEXT},
    may={"r": MAYBE_WHOLE, "alpha": MAYBE_NUMBER, "alpha_rule": MAYBE_TEXT, "targets": MAYBE_TEXT, "trainable": MAYBE_WHOLE,
         "extra": is_a("a mapping or null", lambda v: isinstance(v, Mapping), or_none=True)},
)  # fmt: skip
_SOLO = fields(
    may=dict.fromkeys(
        ("seconds", "tokens", "steps", "peak_memory_bytes", "reused_blocks", "trunk_seconds"), MAYBE_NUMBER
    )
)
_CELL = fields(
    needs={"id": TEXT, "label": _LABEL, "runs": fields(may={"tune": each(RUN), "confirm": each(RUN)})},
    may={"solo": _SOLO},
)
_LISTED = fields(needs={"lr": RATE, "seed": WHOLE}, may={"role": ROLE, "config": CONFIG, "asked": each(TEXT)})
_STUDY = fields(
    may={
        "question": MAYBE_TEXT,
        "reference": MAYBE_TEXT,
        "margin": is_a("a number above 0", lambda v: _number(v) and v > 0, or_none=True),
    }
)
MANIFEST = fields(
    needs={"schema": is_a("1", lambda v: v == 1)},
    may={
        "name": MAYBE_TEXT, "experiment": MAYBE_TEXT, "command": each(TEXT), "study": _STUDY, "study_hash": MAYBE_TEXT, "units": each(TEXT, TEXT), "cells": each(_CELL),
        "runs": each(_LISTED, RUN), "packs": each(fields(needs={"id": TEXT, "runs": each(RUN)})),
        "settled": fields(may={"device": TEXT, "precision": TEXT}),
    },
)  # fmt: skip
