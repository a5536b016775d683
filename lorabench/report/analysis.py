"""Weight-space results of a sweep's runs, as `python -m lorabench.analyze` left them, and the width of what was adapted.

<sweep dir>/analysis/weights.json    {"runs": {run_id: {"layers": {name: {"variance_rank": .., "intruders": {"0.5": ..},
                                      "relative_norm": .., "shape": [out, in]}}}}}
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lorabench.report.load import Sweep
from lorabench.schema import ConfigError

FILE = Path("analysis", "weights.json")
SCHEMA = 1
ADAPTER = Path("adapter", "adapter_model.safetensors")
INTRUDER = 0.5  # cosine to every singular vector of W below which a direction counts (2410.21228, section 4)
HEADER = 2**26  # bytes; a longer one is not a header


@dataclass(frozen=True)
class Layer:
    """One adapted or fine-tuned matrix of one run."""

    variance_rank: float | None  # singular values that hold 90 % of the variance of ΔW
    intruders: Mapping[float, float] = field(default_factory=dict)  # threshold -> directions
    relative_norm: float | None = None  # ‖ΔW‖ / ‖W‖
    shape: tuple[int, int] | None = None  # out, in


@dataclass(frozen=True)
class Analysis:
    runs: Mapping[str, Mapping[str, Layer]]  # run_id -> layer -> what was measured

    @property
    def threshold(self) -> float:
        """Of intruder counts: .5, else the measured one nearest to it."""
        found = {t for run in self.runs.values() for x in run.values() for t in x.intruders}
        return min(sorted(found), key=lambda t: abs(t - INTRUDER), default=INTRUDER)

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


def read(sweep: Sweep) -> Analysis | None:
    """None where nothing was analysed. Raises `ConfigError` for a file that is not the analysis."""
    path = sweep.store.root / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema", SCHEMA) != SCHEMA:
            raise ValueError("written by another version")
        return Analysis({str(i): _layers(run) for i, run in data["runs"].items()})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(FILE.as_posix(), str(path), "what `python -m lorabench.analyze` writes") from e


def _layers(run: Mapping[str, Any]) -> dict[str, Layer]:
    return {str(name): _layer(x) for name, x in run["layers"].items()}


def _layer(x: Mapping[str, Any]) -> Layer:
    counts = {float(t): float(n) for t, n in (x.get("intruders") or {}).items() if n is not None}
    shape = x.get("shape")
    return Layer(
        _number(x.get("variance_rank")), counts, _number(x.get("relative_norm")),
        (int(shape[0]), int(shape[1])) if shape else None,
    )  # fmt: skip


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def width(sweep: Sweep, analysis: Analysis | None) -> int | None:
    """The smallest side of an adapted matrix: from the analysis, else from a saved adapter; None where neither is there."""
    if analysis is not None and analysis.width is not None:
        return analysis.width
    for run_id in sweep.planned:
        sides = _sides(sweep.store.run_dir(run_id) / ADAPTER)
        if sides:
            return min(sides)
    return None


def _sides(path: Path) -> list[int]:
    """`in` of every lora_A [r, in] and `out` of every lora_B [out, r], from the file's header alone."""
    try:
        with open(path, "rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size)) if size < HEADER else {}
    except (OSError, ValueError, struct.error):
        return []
    shapes = {name: x["shape"] for name, x in header.items() if "shape" in x}
    sides = [s[1] for name, s in shapes.items() if "lora_A" in name and len(s) == 2]
    return sides + [s[0] for name, s in shapes.items() if "lora_B" in name and len(s) == 2]
