"""What `lorabench.analyze` measured on a sweep's weights, as tidy rows: by cell, by layer, subspaces, spectra. No torch.

Pure functions of the content of <sweep>/analysis/weights.json; every row names the runs its numbers come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorabench.report import formats
from lorabench.report.tables import Column, Row, Table
from lorabench.schema import ConfigError

FILE = Path("analysis", "weights.json")
SCHEMA = 1
RATIOS = ("amplification",)  # one direction that W hardly holds makes a layer's vast: the median over layers is shown
MEASURES = ("relative_norm", "stable_rank", "effective_rank", "variance_rank", "amplification")
SHOWN = 0.5  # the threshold whose intruders a table shows


@dataclass(frozen=True)
class Mean:
    """Over seeds, of each run's mean over its layers. sd: over seeds; None where there is one."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class CellWeights:
    """One cell's measures. A measure that no layer has (a zero update has no rank) is not among them."""

    id: str
    name: str
    method: str
    r: int | None
    role: str  # of the runs: confirm, or tune where nothing is confirmed
    runs: tuple[str, ...]
    layers: int
    measures: Mapping[str, Mean]
    intruders: Mapping[float, Mean]  # threshold -> count a layer, of the ten leading directions; empty: not counted


@dataclass(frozen=True)
class LayerWeights:
    """One layer of one run; None where the layer has no such measure."""

    cell: str
    run: str
    layer: str
    measures: Mapping[str, float | None]
    intruders: Mapping[float, int]


@dataclass(frozen=True)
class Similarity:
    """phi(i, j), the mean over layers and pairs of runs: rows i of the first cell, columns j of the second."""

    kind: str  # seeds: of one cell; ranks: of two ranks at different seeds
    of: str  # A, dW
    cells: tuple[str, str]
    names: tuple[str, str]
    runs: tuple[tuple[str, str], ...]
    i: tuple[int, ...]
    j: tuple[int, ...]
    phi: np.ndarray  # [i, j]
    start: np.ndarray | None  # [i, j], of A before training
    random: np.ndarray  # [i, j], the mean between random subspaces: max(i, j) / d


@dataclass(frozen=True)
class Spectrum:
    """The leading singular values of dW over ||W||_F: median and quartiles over layers and runs, [n] each."""

    cell: str
    name: str
    runs: tuple[str, ...]
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Weights:
    cells: tuple[CellWeights, ...]
    layers: tuple[LayerWeights, ...]
    similarities: tuple[Similarity, ...]
    spectra: tuple[Spectrum, ...]
    left_out: tuple[str, ...]  # sentences: what was not analysed, and why
    notes: tuple[str, ...]


def load(sweep_dir: str | Path) -> Weights | None:
    """None where nothing was analysed. Raises `ConfigError` for a file that this version did not write."""
    path = Path(sweep_dir) / FILE
    try:
        doc = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ConfigError(
            "analysis", str(path), f"a whole JSON file ({type(e).__name__}); analyse the sweep again"
        ) from e
    if not isinstance(doc, dict) or doc.get("schema") != SCHEMA:
        raise ConfigError("analysis", str(path), f"an analysis of schema {SCHEMA}; analyse the sweep again")
    try:
        return tidy(doc)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(
            "analysis", str(path), f"an analysis as this version writes it ({type(e).__name__}: {e})"
        ) from e


def tidy(doc: Mapping[str, Any]) -> Weights:
    """From the file's content to rows, cells in the order of the report's tables."""
    cells = dict(sorted(doc["cells"].items(), key=lambda item: item[1]["order"]))
    measured = {
        i: [(run, doc["runs"][run]["layers"]) for run in c["runs"] if run in doc["runs"]] for i, c in cells.items()
    }
    have = {i: runs for i, runs in measured.items() if any(layers for _, layers in runs)}
    return Weights(
        cells=tuple(_cell(i, cells[i], runs) for i, runs in have.items()),
        layers=tuple(row for i, runs in have.items() for row in _layers(i, runs)),
        similarities=tuple(_similarity(x, cells) for x in doc["similarity"]),
        spectra=tuple(s for i, runs in have.items() if (s := _spectrum(i, cells[i]["name"], runs)) is not None),
        left_out=tuple(_left_out(doc, cells)),
        notes=tuple(doc["notes"]),
    )


Runs = Sequence[tuple[str, Mapping[str, Any]]]  # run_id, layers


def _cell(cell: str, about: Mapping[str, Any], runs: Runs) -> CellWeights:
    by_run = [list(layers.values()) for _, layers in runs]
    measures = {
        name: _mean([[x[name] for x in layers] for layers in by_run], np.median if name in RATIOS else np.mean)
        for name in MEASURES
    }
    thresholds = sorted({t for layers in by_run for x in layers for t in x["intruders"] or {}}, key=float)
    intruders = {
        float(t): _mean([[(x["intruders"] or {}).get(t) for x in layers] for layers in by_run]) for t in thresholds
    }
    return CellWeights(
        cell, about["name"], about["method"], about["r"], about["role"], tuple(run for run, _ in runs),
        len({name for _, layers in runs for name in layers}),
        {name: m for name, m in measures.items() if m is not None}, {t: m for t, m in intruders.items() if m is not None},
    )  # fmt: skip


def _mean(by_run: Sequence[Sequence[float | None]], over_layers: Callable[[list[float]], Any] = np.mean) -> Mean | None:
    """by_run: [runs][layers]; layers without the measure are left out, runs without one too."""
    runs = [float(over_layers(known)) for layers in by_run if (known := [x for x in layers if x is not None])]
    return Mean(float(np.mean(runs)), float(np.std(runs, ddof=1)) if len(runs) > 1 else None) if runs else None


def _layers(cell: str, runs: Runs) -> Iterator[LayerWeights]:
    for run, layers in runs:
        for name, x in sorted(layers.items()):
            intruders = {float(t): int(n) for t, n in (x["intruders"] or {}).items()}
            yield LayerWeights(cell, run, name, {key: x[key] for key in MEASURES}, intruders)


def _similarity(x: Mapping[str, Any], cells: Mapping[str, Any]) -> Similarity:
    a, b = x["cells"]
    width = 1 / x["inverse_width"]
    random = np.maximum.outer(np.array(x["i"]), np.array(x["j"])) / width
    start = None if x["start"] is None else np.array(x["start"])
    return Similarity(
        x["kind"], x["of"], (a, b), (cells[a]["name"], cells[b]["name"]), tuple((p, q) for p, q in x["runs"]),
        tuple(x["i"]), tuple(x["j"]), np.array(x["phi"]), start, random,
    )  # fmt: skip


def _spectrum(cell: str, name: str, runs: Runs) -> Spectrum | None:
    """Over the values that every layer has, zero updates left out."""
    curves = [
        np.array(x["singular_values"]) / x["weight_norm"]
        for _, layers in runs
        for x in layers.values()
        if x["singular_values"] and x["norm"] > 0
    ]
    if not curves:
        return None
    n = min(map(len, curves))
    low, median, high = np.quantile(np.stack([c[:n] for c in curves]), [0.25, 0.5, 0.75], axis=0)
    return Spectrum(cell, name, tuple(run for run, _ in runs), median, low, high)


def _left_out(doc: Mapping[str, Any], cells: Mapping[str, Any]) -> Iterator[str]:
    for about in cells.values():
        why = [doc["left_out"][run] for run in about["runs"] if run in doc["left_out"]]
        if why:
            yield f"{about['name']}: {len(why)} of {formats.plural(len(about['runs']), 'run')} not analysed, as this asks for {why[0]}"
        for run in about["runs"]:
            for layer, reason in doc["runs"].get(run, {}).get("left_out", {}).items():
                yield f"{about['name']}: {layer} of run {run} not analysed: {reason}"


def table(w: Weights) -> Table:
    """A row a cell: means over layers and seeds."""
    columns = (
        Column("cell", "cell"), Column("seeds", "seeds", "right"), Column("relative_norm", "‖ΔW‖ / ‖W‖", "right"),
        Column("stable_rank", "stable rank", "right"), Column("effective_rank", "effective rank", "right"),
        Column("variance_rank", "90 % rank", "right"), Column("intruders", f"intruders < {SHOWN:g}", "right"),
        Column("amplification", "amplification", "right"),
    )  # fmt: skip
    rows = tuple(Row((c.name, str(len(c.runs)), *_texts(c)), c.runs) for c in w.cells)
    notes = [
        "Means over layers and seeds; of amplification the median over layers. Intruders: of the ten leading singular vectors of W + ΔW those whose largest cosine with one of W's is below "
        f"{SHOWN:g}. Amplification: ‖ΔW‖ over what W holds in ΔW's directions, an adapter's rank of them, else those that hold 90 % of ΔW."
    ]  # fmt: skip
    if any(c.role == "tune" for c in w.cells):
        notes.append("Cells without confirmation runs: tuning runs at the chosen rate.")
    return Table("weights", "What training added to the weights", columns, rows, (*notes, *w.notes, *w.left_out))


def _texts(c: CellWeights) -> Iterator[str]:
    decimals = {
        "relative_norm": 4,
        "stable_rank": 2,
        "effective_rank": 2,
        "variance_rank": 1,
        "intruders": 2,
        "amplification": 2,
    }
    for name in ("relative_norm", "stable_rank", "effective_rank", "variance_rank", "intruders", "amplification"):
        found = c.intruders.get(SHOWN) if name == "intruders" else c.measures.get(name)
        yield formats.number(None if found is None else found.mean, decimals[name])
