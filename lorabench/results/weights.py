"""What `python -m lorabench.analyze` left of a sweep's weights, read once for tables, figures and claims. No torch.

<sweep dir>/analysis/weights.json    {"schema": 1, "cells": {id: {"order", "name", "method", "r", "role", "runs", ...}},
    "runs": {run_id: {"layers": {name: {"kind", "shape", "relative_norm", "intruders": {"0.5": ..}, ...}}, "left_out": {..}}},
    "similarity": [...], "left_out": {run_id: reason}, "notes": [...]}
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lorabench.config.errors import ConfigError
from lorabench.results.sweep import Sweep
from lorabench.store.analysis import WEIGHTS_FILE

ADAPTER_FILE = Path("adapter", "adapter_model.safetensors")
INTRUDER_COSINE = 0.5  # cosine to every singular vector of W below which a direction counts (2410.21228, section 4)
MAX_HEADER_BYTES = 2**26  # bytes; a longer one is not a header
MEASURES = (
    "relative_norm",
    "stable_rank",
    "effective_rank",
    "variance_rank",
    "amplification",
    "magnitude",
    "direction",
)


@dataclass(frozen=True)
class Layer:
    """One adapted or fine-tuned matrix of one run. A measure that it does not have (a zero update has no rank) is
    None."""

    measures: Mapping[str, float | None]  # of MEASURES
    intruders: Mapping[float, float] = field(default_factory=dict)  # threshold -> directions; empty: not counted
    shape: tuple[int, int] | None = None  # out, in
    kind: str | None = None  # lora, dora, vera, ia3, ia3_input, full; None: of an earlier version
    norm: float | None = None  # ‖ΔW‖
    weight_norm: float | None = None  # ‖W‖
    singular_values: tuple[float, ...] = ()  # the leading ones of ΔW

    @property
    def variance_rank(self) -> float | None:
        """Singular values that hold 90 % of the variance of ΔW."""
        return self.measures["variance_rank"]

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖ / ‖W‖"""
        return self.measures["relative_norm"]


@dataclass(frozen=True)
class AnalysedCell:
    """A cell as it was when it was analysed."""

    name: str
    method: str
    r: int | None
    role: str  # of the runs: confirm, or tune where nothing is confirmed
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """The file's content. cells: in the order of the report's tables; similarity: its entries as they are."""

    runs: Mapping[str, Mapping[str, Layer]]  # run_id -> layer -> what was measured
    cells: Mapping[str, AnalysedCell] = field(default_factory=dict)
    similarity: Sequence[Mapping[str, Any]] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)  # run_id -> why it was not analysed
    layers_left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # run_id -> layer -> why
    notes: tuple[str, ...] = ()

    @property
    def threshold(self) -> float:
        """The threshold of intruder counts: .5, else the measured one nearest to it."""
        found = {t for run in self.runs.values() for x in run.values() for t in x.intruders}
        return min(sorted(found), key=lambda t: abs(t - INTRUDER_COSINE), default=INTRUDER_COSINE)

    @property
    def width(self) -> int | None:
        shapes = [x.shape for run in self.runs.values() for x in run.values() if x.shape]
        return min((min(s) for s in shapes), default=None)

    def variance_rank(self, run_id: str) -> float | None:
        """Median over the run's matrices."""
        found = [x.variance_rank for x in self.runs.get(run_id, {}).values() if x.variance_rank is not None]
        return float(median(found)) if found else None

    def intruders(self, run_id: str) -> float | None:
        """Mean count a matrix."""
        at = self.threshold
        found = [x.intruders[at] for x in self.runs.get(run_id, {}).values() if at in x.intruders]
        return fmean(found) if found else None

    def relative_norm(self, run_id: str) -> float | None:
        """Mean over the run's matrices."""
        found = [x.relative_norm for x in self.runs.get(run_id, {}).values() if x.relative_norm is not None]
        return fmean(found) if found else None


def read_analysis(root: Path) -> Analysis | None:
    """root: the sweep's directory. None where nothing was analysed. Raises `ConfigError` for a file that is no
    analysis."""
    path = str(WEIGHTS_FILE.path(root))
    try:
        doc = WEIGHTS_FILE.read(root)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        allowed = f"a whole JSON file ({type(e).__name__}); analyse the sweep again"
        raise ConfigError("analysis", path, allowed) from e
    except ValueError as e:
        allowed = f"an analysis of schema {WEIGHTS_FILE.schema}; analyse the sweep again"
        raise ConfigError("analysis", path, allowed) from e
    try:
        return None if doc is None else parse(doc)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        allowed = f"an analysis as this version writes it ({type(e).__name__}: {e})"
        raise ConfigError("analysis", path, allowed) from e


def parse(doc: Mapping[str, Any]) -> Analysis:
    """The file's content, typed. Raises KeyError, TypeError, ValueError or AttributeError for what is none."""
    cells = sorted(doc["cells"].items(), key=lambda item: item[1]["order"])
    runs = doc["runs"].items()
    return Analysis(
        {str(i): {str(name): _layer(x) for name, x in run["layers"].items()} for i, run in runs},
        {i: AnalysedCell(c["name"], c["method"], c["r"], c["role"], tuple(c["runs"])) for i, c in cells},
        tuple(doc["similarity"]),
        dict(doc["left_out"]),
        {str(i): dict(run["left_out"]) for i, run in runs if run.get("left_out")},
        tuple(doc["notes"]),
    )


def _layer(x: Mapping[str, Any]) -> Layer:
    counts = {float(t): float(n) for t, n in (x.get("intruders") or {}).items() if n is not None}
    shape = x.get("shape")
    return Layer(
        {key: _number(x.get(key)) for key in MEASURES},
        counts,
        (int(shape[0]), int(shape[1])) if shape else None,
        x.get("kind"),
        _number(x.get("norm")),
        _number(x.get("weight_norm")),
        tuple(map(float, x.get("singular_values") or ())),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def width(sweep: Sweep, analysis: Analysis | None) -> int | None:
    """The smallest side of an adapted matrix: from the analysis, else from a saved adapter; None where neither is
    there."""
    if analysis is not None and analysis.width is not None:
        return analysis.width
    for run_id in sweep.planned:
        sides = _sides(sweep.store.run_dir(run_id) / ADAPTER_FILE)
        if sides:
            return min(sides)
    return None


def _sides(path: Path) -> list[int]:
    """`in` of every lora_A [r, in] and `out` of every lora_B [out, r], from the file's header alone."""
    try:
        with open(path, "rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size)) if size < MAX_HEADER_BYTES else {}
    except (OSError, ValueError, struct.error):
        return []
    shapes = {name: x["shape"] for name, x in header.items() if "shape" in x}
    sides = [s[1] for name, s in shapes.items() if "lora_A" in name and len(s) == 2]
    return sides + [s[0] for name, s in shapes.items() if "lora_B" in name and len(s) == 2]
