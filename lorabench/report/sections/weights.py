"""What `lorabench.analyze` measured on a sweep's weights, as tidy rows: by cell, by layer, subspaces, spectra. No torch.

Pure functions of what `analysis` reads; every row names the runs its numbers come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from lorabench.config.method_names import LORA
from lorabench.report import theme
from lorabench.report.tables import Column, Row, Table
from lorabench.report.theme import Drawing, Look
from lorabench.results import formatting
from lorabench.results.sweep import shorten
from lorabench.results.weights import MEASURES, AnalysedCell, Analysis, Layer

MEDIAN_MEASURES = (
    "amplification",
)  # one direction that W hardly holds makes a layer's vast: the median over layers is shown


INTRUDER_THRESHOLD = 0.5  # the threshold whose intruders a table shows


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


def tidy_rows(a: Analysis) -> Weights:
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


def _cell(cell: str, about: AnalysedCell, runs: Runs) -> CellWeights:
    by_run = [list(layers.values()) for _, layers in runs]
    measures = {
        name: _mean(
            [[x.measures[name] for x in layers] for layers in by_run], np.median if name in MEDIAN_MEASURES else np.mean
        )
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


def _similarity(x: Mapping[str, Any], cells: Mapping[str, AnalysedCell]) -> Similarity:
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
            yield f"{about.name}: {len(why)} of {formatting.plural(len(about.runs), 'run')} not analysed, as this asks for {why[0]}"
        for run in about.runs:
            for layer, reason in a.layers_left_out.get(run, {}).items():
                yield f"{about.name}: {layer} of run {run} not analysed: {reason}"


COLUMNS = {  # measure -> title, decimals
    "relative_norm": ("‖ΔW‖ / ‖W‖", 4), "stable_rank": ("stable rank", 2), "effective_rank": ("effective rank", 2),
    "variance_rank": ("90 % rank", 1), "intruders": (f"intruders < {INTRUDER_THRESHOLD:g}", 2), "amplification": ("amplification", 2),
    "magnitude": ("Δ row norm", 4), "direction": ("1 − row cosine", 4),
}  # fmt: skip


OPTIONAL_MEASURES = ("magnitude", "direction")  # measures that files of earlier versions lack


KIND_NOTES = {  # kind -> what its ΔW is, and what that makes of the measures
    "dora": "DoRA: ΔW = m (W + s B A) / ‖W + s B A‖ − W, row by row. Its scaled rows give it as many directions as W has: ranks and amplification are "
            "those of all of ΔW, as under full fine-tuning; φ of A is that of its low-rank part.",
    "vera": "VeRA: ΔW = diag(b) B diag(d) A, of rank r at most. A and B are frozen and the same in every run, so its directions all lie in A's rows: φ(r, r) "
            "between seeds is 1 before anything is learned.",
    "ia3": "IA3: ΔW = diag(l − 1) W (W diag(l − 1) where it scales the input), W's rows or columns rescaled: its ranks say how many directions of W "
           "that reaches, not how many numbers trained. What it does to a bias is not counted.",
}  # fmt: skip


def table(w: Weights) -> Table:
    """A row a cell: means over layers and seeds."""
    keys = [key for key in COLUMNS if key not in OPTIONAL_MEASURES or any(key in c.measures for c in w.cells)]
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
        f"{INTRUDER_THRESHOLD:g}. Amplification: ‖ΔW‖ over what W holds in ΔW's directions, an adapter's rank of them, else those that hold 90 % of ΔW."
    )
    if "magnitude" in keys:
        yield "Δ row norm: how far the norm of a row of W (an output's weights) moved, as a share of it; 1 − row cosine: how far the row turned; means over rows."
    kinds = {"ia3" if kind.startswith("ia3") else kind for c in w.cells for kind in c.kinds}
    yield from (KIND_NOTES[kind] for kind in sorted(kinds & set(KIND_NOTES)))
    if any(c.role == "tune" for c in w.cells):
        yield "Cells without confirmation runs: tuning runs at the chosen rate."


def _texts(c: CellWeights, keys: Sequence[str]) -> Iterator[str]:
    for name in keys:
        found = c.intruders.get(INTRUDER_THRESHOLD) if name == "intruders" else c.measures.get(name)
        yield formatting.number(None if found is None else found.mean, COLUMNS[name][1])


MAX_SPECTRA = 8  # spectra in one picture


def draw(w: Weights, looks: Mapping[str, Look]) -> list[Drawing]:
    """The figures this analysis has the data for. looks: by cell id, as the report's other figures have them."""
    return [d for d in (draw_subspaces(w.similarities), draw_spectra(w.spectra, looks)) if d is not None]


# -- subspaces -----------------------------------------------------------------------------------------------------------


def draw_subspaces(found: Sequence[Similarity]) -> Drawing | None:
    """phi(i, j) of A before and after training and of dW, for the widest pair of ranks, else for one cell's seeds."""
    mine = shown_similarities(found)
    if not mine:
        return None
    a = next((s for s in mine if s.of == "A"), None)
    dW = next((s for s in mine if s.of == "dW"), None)
    panels = [("A before training", a, a.start)] if a is not None and a.start is not None else []
    panels += [("A after training", a, a.phi)] if a is not None else []
    panels += [("ΔW", dW, dW.phi)] if dW is not None else []
    first = mine[0]
    with theme.canvas(2.9 * len(panels) + 0.9, 3.1) as figure:
        axes = [figure.add_subplot(1, len(panels), k + 1) for k in range(len(panels))]
        for ax, (title, s, phi) in zip(axes, panels, strict=True):
            mesh = _heat(ax, s, phi, title, named=ax is axes[0])
        bar = figure.colorbar(mesh, ax=axes, shrink=0.85)
        bar.set_label("φ(i, j)")
        bar.outline.set_visible(False)
        caption = _subspace_caption(first)
        alt = f"Subspace similarity of {_pair(first)}: " + "; ".join(
            f"{title} φ(1, 1) = {formatting.number(float(phi[0, 0]), 2)}, "
            f"φ({s.i[-1]}, {s.j[-1]}) = {formatting.number(float(phi[-1, -1]), 2)}"
            for title, s, phi in panels
        )
        return theme.render_drawing("subspaces", "Do runs find the same directions?", caption, f"{alt}.", figure)


def shown_similarities(found: Sequence[Similarity]) -> list[Similarity]:
    """Both entries of the comparison a picture shows: the largest of the ranks up to a quarter of what it is held against
    (the paper's is 8 against 64), else the smallest; without ranks the widest cell's seeds."""

    def order(s: Similarity) -> tuple[bool, bool, int]:
        near = s.kind == "ranks" and 4 * s.i[-1] > s.j[-1]
        return s.kind != "ranks", near, s.i[-1] if near else -s.i[-1]

    first = min(found, key=order, default=None)
    return [s for s in found if first is not None and (s.kind, s.cells) == (first.kind, first.cells)]


def _pair(s: Similarity) -> str:
    return f"seeds of {s.names[0]}" if s.kind == "seeds" else f"{s.names[0]} and {s.names[1]} at different seeds"


def _subspace_caption(s: Similarity) -> str:
    corner = formatting.number(float(s.random[-1, -1]), 2)
    pair = _pair(s)
    return (
        f"{pair[:1].upper()}{pair[1:]}: φ(i, j) of the i and j leading right-singular directions, "
        f"0 where they are orthogonal, 1 where the smaller lies in the larger; the mean over layers and {formatting.plural(len(s.runs), 'pair')} of runs. "
        f"Random directions have {formatting.number(float(s.random[0, 0]), 3)} at (1, 1) and {corner} at ({s.i[-1]}, {s.j[-1]})."
    )


def _heat(ax: Axes, s: Similarity, phi: np.ndarray, title: str, *, named: bool) -> QuadMesh:
    """Cells of one size whatever the numbers between two i: the axes are lists of what was kept."""
    ax.grid(False)
    colours = sns.light_palette(theme.HUES[LORA], as_cmap=True)
    mesh = ax.pcolormesh(phi, vmin=0, vmax=1, cmap=colours, linewidth=0)
    for axis, ticks in ((ax.xaxis, s.j), (ax.yaxis, s.i)):
        every = max(1, len(ticks) // 7)
        kept = sorted({*range(0, len(ticks), every), len(ticks) - 1})
        if len(kept) > 1 and kept[-1] - kept[-2] < every:
            del kept[-2]
        axis.set_ticks([k + 0.5 for k in kept], [str(ticks[k]) for k in kept])
    ax.invert_yaxis()
    ax.set_title(title)
    ax.set_xlabel(f"j ({shorten(s.names[1], 24)})")
    if named:
        ax.set_ylabel(f"i ({shorten(s.names[0], 24)})")
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return mesh


# -- spectra -------------------------------------------------------------------------------------------------------------


def draw_spectra(found: Sequence[Spectrum], looks: Mapping[str, Look]) -> Drawing | None:
    """The leading singular values of dW beside ||W||, a curve a cell; bands are the quartiles over layers and runs."""
    shown = [s for s in found if s.cell in looks]
    if len(shown) > MAX_SPECTRA:
        shown = [
            shown[k] for k in sorted({round(i * (len(shown) - 1) / (MAX_SPECTRA - 1)) for i in range(MAX_SPECTRA)})
        ]
    if not shown:
        return None
    with theme.canvas(theme.panel_width(s.name for s in shown), 3.4) as figure:
        ax = figure.add_subplot()
        labels = [_curve(ax, s, looks[s.cell]) for s in shown]
        most = max(len(s.median) for s in shown)
        theme.set_rank_axis(ax, [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= most] or [1])
        ax.set_xlim(1 / 1.15, most * 1.15)
        _per_cent(ax)
        theme.label_axes(ax, x="singular value of ΔW, by size (log scale)", y="share of ‖W‖ (%, log scale)")
        theme.draw_end_labels(ax, labels)
        caption = (
            "Singular values of ΔW over the Frobenius norm of W: median over layers and runs, bands are the quartiles."
        )
        said = "; ".join(
            f"{s.name} from {_share(s.median[0])} to {_share(s.median[-1])} at {len(s.median)}" for s in shown
        )
        return theme.render_drawing(
            "spectra", "How many directions training used", caption, f"Singular values of ΔW: {said}.", figure
        )


def _curve(ax: Axes, s: Spectrum, look: Look) -> theme.Label:
    """On log10 of the share, as end labels need an even axis; what rounding left of a zero is not drawn."""
    least = s.median[0] * 1e-6
    n = int((s.median > least).sum())
    x, middle = np.arange(1, n + 1), np.log10(s.median[:n])
    low, high = (np.log10(np.maximum(values[:n], least)) for values in (s.low, s.high))
    ax.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)
    ax.plot(
        x, middle, color=look.colour, linestyle=look.dashes, marker=look.marker if n <= 12 else None, markersize=4.5
    )
    return float(x[-1]), float(middle[-1]), s.name, look.colour


def _per_cent(ax: Axes) -> None:
    """Ticks at 1, 2 and 5 of each decade while they are few."""
    low, high = ax.get_ylim()
    steps = (1, 2, 5) if high - low < 1.5 else (1,)
    decades = range(int(np.floor(low)) - 1, int(np.ceil(high)) + 1)
    ticks = [t for d in decades for s in steps if low <= (t := d + float(np.log10(s))) <= high]
    ax.set_yticks(ticks, [f"{100 * 10**t:.3g}" for t in ticks])
    ax.set_ylim(low, high)


def _share(x: float) -> str:
    return f"{100 * x:.3g} %"
