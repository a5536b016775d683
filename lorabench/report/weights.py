"""What `lorabench.analyze` measured on a sweep's weights, as tidy rows: by cell, by layer, subspaces, spectra. No torch.

Pure functions of what `analysis` reads; every row names the runs its numbers come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorabench.report import formats
from lorabench.report.analysis import MEASURES, About, Analysis, Layer
from lorabench.report.tables import Column, Row, Table

RATIOS = ("amplification",)  # one direction that W hardly holds makes a layer's vast: the median over layers is shown
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
    kinds: frozenset[str] = field(default_factory=frozenset)  # of its layers' updates; empty: of an earlier version


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


def tidy(a: Analysis) -> Weights:
    """From the file's content to rows, cells in the order of the report's tables."""
    measured = {i: [(run, a.runs[run]) for run in c.runs if run in a.runs] for i, c in a.cells.items()}
    have = {i: runs for i, runs in measured.items() if any(layers for _, layers in runs)}
    return Weights(
        cells=tuple(_cell(i, a.cells[i], runs) for i, runs in have.items()),
        layers=tuple(row for i, runs in have.items() for row in _layers(i, runs)),
        similarities=tuple(_similarity(x, a.cells) for x in a.similarity),
        spectra=tuple(s for i, runs in have.items() if (s := _spectrum(i, a.cells[i].name, runs)) is not None),
        left_out=tuple(_left_out(a)),
        notes=a.notes,
    )


Runs = Sequence[tuple[str, Mapping[str, Layer]]]  # run_id, layers


def _cell(cell: str, about: About, runs: Runs) -> CellWeights:
    by_run = [list(layers.values()) for _, layers in runs]
    measures = {
        name: _mean([[x.measures[name] for x in layers] for layers in by_run], np.median if name in RATIOS else np.mean)
        for name in MEASURES
    }
    thresholds = sorted({t for layers in by_run for x in layers for t in x.intruders})
    intruders = {t: _mean([[x.intruders.get(t) for x in layers] for layers in by_run]) for t in thresholds}
    return CellWeights(
        cell, about.name, about.method, about.r, about.role, tuple(run for run, _ in runs),
        len({name for _, layers in runs for name in layers}),
        {name: m for name, m in measures.items() if m is not None}, {t: m for t, m in intruders.items() if m is not None},
        frozenset(x.kind for layers in by_run for x in layers if x.kind),
    )  # fmt: skip


def _mean(by_run: Sequence[Sequence[float | None]], over_layers: Callable[[list[float]], Any] = np.mean) -> Mean | None:
    """by_run: [runs][layers]; layers without the measure are left out, runs without one too."""
    runs = [float(over_layers(known)) for layers in by_run if (known := [x for x in layers if x is not None])]
    return Mean(float(np.mean(runs)), float(np.std(runs, ddof=1)) if len(runs) > 1 else None) if runs else None


def _layers(cell: str, runs: Runs) -> Iterator[LayerWeights]:
    for run, layers in runs:
        for name, x in sorted(layers.items()):
            yield LayerWeights(cell, run, name, x.measures, {t: int(n) for t, n in x.intruders.items()})


def _similarity(x: Mapping[str, Any], cells: Mapping[str, About]) -> Similarity:
    a, b = x["cells"]
    width = 1 / x["inverse_width"]
    random = np.maximum.outer(np.array(x["i"]), np.array(x["j"])) / width
    start = None if x["start"] is None else np.array(x["start"])
    return Similarity(
        x["kind"], x["of"], (a, b), (cells[a].name, cells[b].name), tuple((p, q) for p, q in x["runs"]),
        tuple(x["i"]), tuple(x["j"]), np.array(x["phi"]), start, random,
    )  # fmt: skip


def _spectrum(cell: str, name: str, runs: Runs) -> Spectrum | None:
    """Over the values that every layer has, zero updates left out."""
    curves = [
        np.array(x.singular_values) / x.weight_norm
        for _, layers in runs
        for x in layers.values()
        if x.singular_values and x.norm and x.weight_norm
    ]
    if not curves:
        return None
    n = min(map(len, curves))
    low, median, high = np.quantile(np.stack([c[:n] for c in curves]), [0.25, 0.5, 0.75], axis=0)
    return Spectrum(cell, name, tuple(run for run, _ in runs), median, low, high)


def _left_out(a: Analysis) -> Iterator[str]:
    for about in a.cells.values():
        why = [a.left_out[run] for run in about.runs if run in a.left_out]
        if why:
            yield f"{about.name}: {len(why)} of {formats.plural(len(about.runs), 'run')} not analysed, as this asks for {why[0]}"
        for run in about.runs:
            for layer, reason in a.layers_left_out.get(run, {}).items():
                yield f"{about.name}: {layer} of run {run} not analysed: {reason}"


COLUMNS = {  # measure -> title, decimals
    "relative_norm": ("‖ΔW‖ / ‖W‖", 4), "stable_rank": ("stable rank", 2), "effective_rank": ("effective rank", 2),
    "variance_rank": ("90 % rank", 1), "intruders": (f"intruders < {SHOWN:g}", 2), "amplification": ("amplification", 2),
    "magnitude": ("Δ row norm", 4), "direction": ("1 − row cosine", 4),
}  # fmt: skip
LATER = ("magnitude", "direction")  # measures that files of earlier versions lack
MEANING = {  # kind -> what its ΔW is, and what that makes of the measures
    "dora": "DoRA: ΔW = m (W + s B A) / ‖W + s B A‖ − W, row by row. Its scaled rows give it as many directions as W has: ranks and amplification are "
            "those of all of ΔW, as under full fine-tuning; φ of A is that of its low-rank part.",
    "vera": "VeRA: ΔW = diag(b) B diag(d) A, of rank r at most. A and B are frozen and the same in every run, so its directions all lie in A's rows: φ(r, r) "
            "between seeds is 1 before anything is learned.",
    "ia3": "IA3: ΔW = diag(l − 1) W (W diag(l − 1) where it scales the input), W's rows or columns rescaled: its ranks say how many directions of W "
           "that reaches, not how many numbers trained. What it does to a bias is not counted.",
}  # fmt: skip


def table(w: Weights) -> Table:
    """A row a cell: means over layers and seeds."""
    keys = [key for key in COLUMNS if key not in LATER or any(key in c.measures for c in w.cells)]
    columns = (
        Column("cell", "cell"), Column("seeds", "seeds", "right"), *(Column(key, COLUMNS[key][0], "right") for key in keys)
    )  # fmt: skip
    rows = tuple(Row((c.name, str(len(c.runs)), *_texts(c, keys)), c.runs) for c in w.cells)
    return Table(
        "weights", "What training added to the weights", columns, rows, (*_notes(w, keys), *w.notes, *w.left_out)
    )


def _notes(w: Weights, keys: Sequence[str]) -> Iterator[str]:
    yield (
        "Means over layers and seeds; of amplification the median over layers. Intruders: of the ten leading singular vectors of W + ΔW those whose largest cosine with one of W's is below "
        f"{SHOWN:g}. Amplification: ‖ΔW‖ over what W holds in ΔW's directions, an adapter's rank of them, else those that hold 90 % of ΔW."
    )
    if "magnitude" in keys:
        yield "Δ row norm: how far the norm of a row of W (an output's weights) moved, as a share of it; 1 − row cosine: how far the row turned; means over rows."
    kinds = {"ia3" if kind.startswith("ia3") else kind for c in w.cells for kind in c.kinds}
    yield from (MEANING[kind] for kind in sorted(kinds & set(MEANING)))
    if any(c.role == "tune" for c in w.cells):
        yield "Cells without confirmation runs: tuning runs at the chosen rate."


def _texts(c: CellWeights, keys: Sequence[str]) -> Iterator[str]:
    for name in keys:
        found = c.intruders.get(SHOWN) if name == "intruders" else c.measures.get(name)
        yield formats.number(None if found is None else found.mean, COLUMNS[name][1])
