"""What `lorabench.analyze` measured on a sweep's weights, as tidy rows: by cell, by layer, subspaces, spectra. No
torch.

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

MEDIAN_MEASURES = ("amplification",)  # one direction that W hardly holds makes a layer's vast
OPTIONAL_MEASURES = ("magnitude", "direction")  # files of earlier versions lack them
INTRUDER_THRESHOLD = 0.5  # whose intruders the table shows
MAX_SPECTRA = 8  # in one picture
MAX_MARKED_VALUES = 12  # up to which every value of a spectrum has a marker
MIN_SHARE_OF_LARGEST = 1e-6  # a smaller singular value is what rounding left of a zero

# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """The mean over seeds of each run's mean over its layers."""

    mean: float
    sd: float | None  # over seeds; None where there is one


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
    """All rows of one analysis."""

    cells: tuple[CellWeights, ...]
    layers: tuple[LayerWeights, ...]
    similarities: tuple[Similarity, ...]
    spectra: tuple[Spectrum, ...]
    left_out: tuple[str, ...]  # sentences: what was not analysed, and why
    notes: tuple[str, ...]


Runs = Sequence[tuple[str, Mapping[str, Layer]]]  # run_id, layers


def tidy_rows(a: Analysis) -> Weights:
    """Return the file's content as rows, cells in the order of the report's tables."""
    analysed = {i: [(run, a.runs[run]) for run in c.runs if run in a.runs] for i, c in a.cells.items()}
    by_cell = {i: runs for i, runs in analysed.items() if any(layers for _, layers in runs)}
    spectra = (_spectrum(i, a.cells[i].name, runs) for i, runs in by_cell.items())
    return Weights(
        cells=tuple(_cell_weights(i, a.cells[i], runs) for i, runs in by_cell.items()),
        layers=tuple(row for i, runs in by_cell.items() for row in _layer_weights(i, runs)),
        similarities=tuple(similarity(x, a.cells) for x in a.similarity),
        spectra=tuple(s for s in spectra if s is not None),
        left_out=tuple(_left_out(a)),
        notes=a.notes,
    )


def _cell_weights(cell: str, about: AnalysedCell, runs: Runs) -> CellWeights:
    by_run = [list(layers.values()) for _, layers in runs]
    measures = {}
    for name in MEASURES:
        over_layers = np.median if name in MEDIAN_MEASURES else np.mean
        measures[name] = _mean([[x.measures[name] for x in layers] for layers in by_run], over_layers)
    thresholds = sorted({t for layers in by_run for x in layers for t in x.intruders})
    intruders = {t: _mean([[x.intruders.get(t) for x in layers] for layers in by_run]) for t in thresholds}
    return CellWeights(
        id=cell,
        name=about.name,
        method=about.method,
        r=about.r,
        role=about.role,
        runs=tuple(run for run, _ in runs),
        layers=len({name for _, layers in runs for name in layers}),
        measures={name: m for name, m in measures.items() if m is not None},
        intruders={t: m for t, m in intruders.items() if m is not None},
        kinds=frozenset(x.kind for layers in by_run for x in layers if x.kind),
    )


def _mean(by_run: Sequence[Sequence[float | None]], over_layers: Callable[[list[float]], Any] = np.mean) -> Mean | None:
    """Return the mean over runs of what `over_layers` gives for each. by_run: [runs][layers].

    Layers without the measure are left out, and so are runs without any.
    """
    runs = [float(over_layers(known)) for layers in by_run if (known := [x for x in layers if x is not None])]
    return Mean(float(np.mean(runs)), float(np.std(runs, ddof=1)) if len(runs) > 1 else None) if runs else None


def _layer_weights(cell: str, runs: Runs) -> Iterator[LayerWeights]:
    for run, layers in runs:
        for name, x in sorted(layers.items()):
            yield LayerWeights(cell, run, name, x.measures, {t: int(n) for t, n in x.intruders.items()})


def similarity(x: Mapping[str, Any], cells: Mapping[str, AnalysedCell]) -> Similarity:
    """Return one entry of the file's `similarity`, typed. cells: by id."""
    a, b = x["cells"]
    width = 1 / x["inverse_width"]
    return Similarity(
        kind=x["kind"],
        of=x["of"],
        cells=(a, b),
        names=(cells[a].name, cells[b].name),
        runs=tuple((p, q) for p, q in x["runs"]),
        i=tuple(x["i"]),
        j=tuple(x["j"]),
        phi=np.array(x["phi"]),
        start=None if x["start"] is None else np.array(x["start"]),
        random=np.maximum.outer(np.array(x["i"]), np.array(x["j"])) / width,
    )


def _spectrum(cell: str, name: str, runs: Runs) -> Spectrum | None:
    """Return the quartiles over the singular values that every layer has; zero updates are left out."""
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
    for cell in a.cells.values():
        reasons = [a.left_out[run] for run in cell.runs if run in a.left_out]
        if reasons:
            runs = formatting.plural(len(cell.runs), "run")
            yield f"{cell.name}: {len(reasons)} of {runs} not analysed, as this asks for {reasons[0]}"
        for run in cell.runs:
            for layer, reason in a.layers_left_out.get(run, {}).items():
                yield f"{cell.name}: {layer} of run {run} not analysed: {reason}"


# -- the table -------------------------------------------------------------------------------------------------------

COLUMNS = {  # measure -> title, decimals
    "relative_norm": ("‖ΔW‖ / ‖W‖", 4),
    "stable_rank": ("stable rank", 2),
    "effective_rank": ("effective rank", 2),
    "variance_rank": ("90 % rank", 1),
    "intruders": (f"intruders < {INTRUDER_THRESHOLD:g}", 2),
    "amplification": ("amplification", 2),
    "magnitude": ("Δ row norm", 4),
    "direction": ("1 − row cosine", 4),
}
KIND_NOTES = {  # kind -> what its ΔW is, and what that makes of the measures
    "dora": (
        "DoRA: ΔW = m (W + s B A) / ‖W + s B A‖ − W, row by row. "
        "Its scaled rows give it as many directions as W has: "
        "ranks and amplification are those of all of ΔW, as under full fine-tuning; "
        "φ of A is that of its low-rank part."
    ),
    "vera": (
        "VeRA: ΔW = diag(b) B diag(d) A, of rank r at most. "
        "A and B are frozen and the same in every run, so its directions all lie in A's rows: "
        "φ(r, r) between seeds is 1 before anything is learned."
    ),
    "ia3": (
        "IA3: ΔW = diag(l − 1) W (W diag(l − 1) where it scales the input), W's rows or columns rescaled: "
        "its ranks say how many directions of W that reaches, not how many numbers trained. "
        "What it does to a bias is not counted."
    ),
}


def table(w: Weights) -> Table:
    """Return a row a cell: means over layers and seeds."""
    keys = [key for key in COLUMNS if key not in OPTIONAL_MEASURES or any(key in c.measures for c in w.cells)]
    columns = (
        Column("cell", "cell"),
        Column("seeds", "seeds", "right"),
        *(Column(key, COLUMNS[key][0], "right") for key in keys),
    )
    rows = tuple(Row((c.name, str(len(c.runs)), *_measure_texts(c, keys)), c.runs) for c in w.cells)
    notes = (*_notes(w, keys), *w.notes, *w.left_out)
    return Table("weights", "What training added to the weights", columns, rows, notes)


def _notes(w: Weights, keys: Sequence[str]) -> Iterator[str]:
    yield (
        "Means over layers and seeds; of amplification the median over layers. "
        "Intruders: of the ten leading singular vectors of W + ΔW those whose largest cosine with one of W's "
        f"is below {INTRUDER_THRESHOLD:g}. "
        "Amplification: ‖ΔW‖ over what W holds in ΔW's directions, "
        "an adapter's rank of them, else those that hold 90 % of ΔW."
    )
    if "magnitude" in keys:
        yield (
            "Δ row norm: how far the norm of a row of W (an output's weights) moved, as a share of it; "
            "1 − row cosine: how far the row turned; means over rows."
        )
    kinds = {"ia3" if kind.startswith("ia3") else kind for c in w.cells for kind in c.kinds}
    yield from (KIND_NOTES[kind] for kind in sorted(kinds & set(KIND_NOTES)))
    if any(c.role == "tune" for c in w.cells):
        yield "Cells without confirmation runs: tuning runs at the chosen rate."


def _measure_texts(c: CellWeights, keys: Sequence[str]) -> Iterator[str]:
    for name in keys:
        measure = c.intruders.get(INTRUDER_THRESHOLD) if name == "intruders" else c.measures.get(name)
        yield formatting.number(None if measure is None else measure.mean, COLUMNS[name][1])


# -- subspaces -------------------------------------------------------------------------------------------------------


def draw(w: Weights, looks: Mapping[str, Look]) -> list[Drawing]:
    """Return the figures this analysis has the data for. looks: by cell id, as the report's other figures have them."""
    return [d for d in (draw_subspaces(w.similarities), draw_spectra(w.spectra, looks)) if d is not None]


def draw_subspaces(similarities: Sequence[Similarity]) -> Drawing | None:
    """Draw phi(i, j) of A before and after training and of dW.

    For the widest pair of ranks, else for one cell's seeds.
    """
    shown = shown_similarities(similarities)
    if not shown:
        return None
    panels = _subspace_panels(shown)
    with theme.canvas(2.9 * len(panels) + 0.9, 3.1) as figure:
        axes = [figure.add_subplot(1, len(panels), k + 1) for k in range(len(panels))]
        for ax, (title, s, phi) in zip(axes, panels, strict=True):
            mesh = _draw_heat_map(ax, s, phi, title, has_y_label=ax is axes[0])
        bar = figure.colorbar(mesh, ax=axes, shrink=0.85)
        bar.set_label("φ(i, j)")
        bar.outline.set_visible(False)
        corners = "; ".join(
            f"{title} φ(1, 1) = {formatting.number(float(phi[0, 0]), 2)}, "
            f"φ({s.i[-1]}, {s.j[-1]}) = {formatting.number(float(phi[-1, -1]), 2)}"
            for title, s, phi in panels
        )
        alt = f"Subspace similarity of {_pair(shown[0])}: {corners}."
        title = "Do runs find the same directions?"
        return theme.render_drawing("subspaces", title, _subspace_caption(shown[0]), alt, figure)


def _subspace_panels(shown: Sequence[Similarity]) -> list[tuple[str, Similarity, np.ndarray]]:
    """Return title, axes and values [i, j] of each panel."""
    panels = []
    if a := next((s for s in shown if s.of == "A"), None):
        panels += [("A before training", a, a.start)] if a.start is not None else []
        panels.append(("A after training", a, a.phi))
    if dW := next((s for s in shown if s.of == "dW"), None):
        panels.append(("ΔW", dW, dW.phi))
    return panels


def shown_similarities(similarities: Sequence[Similarity]) -> list[Similarity]:
    """Return both entries of the comparison a picture shows.

    It is the largest of the ranks up to a quarter of what it is held against (the paper's is 8 against 64), else the
    smallest; without ranks the widest cell's seeds.
    """

    def order(s: Similarity) -> tuple[bool, bool, int]:
        near = s.kind == "ranks" and 4 * s.i[-1] > s.j[-1]
        return s.kind != "ranks", near, s.i[-1] if near else -s.i[-1]

    first = min(similarities, key=order, default=None)
    return [s for s in similarities if first is not None and (s.kind, s.cells) == (first.kind, first.cells)]


def _pair(s: Similarity) -> str:
    return f"seeds of {s.names[0]}" if s.kind == "seeds" else f"{s.names[0]} and {s.names[1]} at different seeds"


def _subspace_caption(s: Similarity) -> str:
    pair, pairs = _pair(s), formatting.plural(len(s.runs), "pair")
    first, last = formatting.number(float(s.random[0, 0]), 3), formatting.number(float(s.random[-1, -1]), 2)
    return (
        f"{pair[:1].upper()}{pair[1:]}: φ(i, j) of the i and j leading right-singular directions, "
        "0 where they are orthogonal, 1 where the smaller lies in the larger; "
        f"the mean over layers and {pairs} of runs. "
        f"Random directions have {first} at (1, 1) and {last} at ({s.i[-1]}, {s.j[-1]})."
    )


def _draw_heat_map(ax: Axes, s: Similarity, phi: np.ndarray, title: str, *, has_y_label: bool) -> QuadMesh:
    """Draw cells of one size, whatever the numbers between two i: the axes are lists of what was kept."""
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
    if has_y_label:
        ax.set_ylabel(f"i ({shorten(s.names[0], 24)})")
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return mesh


# -- spectra ---------------------------------------------------------------------------------------------------------


def draw_spectra(spectra: Sequence[Spectrum], looks: Mapping[str, Look]) -> Drawing | None:
    """Draw the leading singular values of dW beside ||W||, a curve a cell.

    Bands are the quartiles over layers and runs.
    """
    shown = [s for s in spectra if s.cell in looks]
    if len(shown) > MAX_SPECTRA:
        step = (len(shown) - 1) / (MAX_SPECTRA - 1)
        shown = [shown[k] for k in sorted({round(i * step) for i in range(MAX_SPECTRA)})]
    if not shown:
        return None
    with theme.canvas(theme.panel_width(s.name for s in shown), 3.4) as figure:
        ax = figure.add_subplot()
        labels = [draw_spectrum(ax, s, looks[s.cell]) for s in shown]
        longest = max(len(s.median) for s in shown)
        theme.set_rank_axis(ax, [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= longest] or [1])
        ax.set_xlim(1 / 1.15, longest * 1.15)
        _label_shares(ax)
        theme.label_axes(ax, x="singular value of ΔW, by size (log scale)", y="share of ‖W‖ (%, log scale)")
        theme.draw_end_labels(ax, labels)
        caption = (
            "Singular values of ΔW over the Frobenius norm of W: median over layers and runs, bands are the quartiles."
        )
        ends = "; ".join(
            f"{s.name} from {_share(s.median[0])} to {_share(s.median[-1])} at {len(s.median)}" for s in shown
        )
        alt = f"Singular values of ΔW: {ends}."
        return theme.render_drawing("spectra", "How many directions training used", caption, alt, figure)


def draw_spectrum(ax: Axes, s: Spectrum, look: Look) -> theme.Label:
    """Draw one curve on log10 of the share, as end labels need an even axis, and return its label."""
    floor = s.median[0] * MIN_SHARE_OF_LARGEST
    n = int((s.median > floor).sum())
    x, middle = np.arange(1, n + 1), np.log10(s.median[:n])
    low, high = (np.log10(np.maximum(values[:n], floor)) for values in (s.low, s.high))
    theme.draw_band(ax, x, low, high, look)
    marker = look.marker if n <= MAX_MARKED_VALUES else None
    ax.plot(x, middle, color=look.colour, linestyle=look.dashes, marker=marker, markersize=4.5)
    return float(x[-1]), float(middle[-1]), s.name, look.colour


def _label_shares(ax: Axes) -> None:
    """Put ticks at 1, 2 and 5 of each decade while they are few, labelled in per cent."""
    low, high = ax.get_ylim()
    steps = (1, 2, 5) if high - low < 1.5 else (1,)
    decades = range(int(np.floor(low)) - 1, int(np.ceil(high)) + 1)
    ticks = [t for d in decades for s in steps if low <= (t := d + float(np.log10(s))) <= high]
    ax.set_yticks(ticks, [f"{100 * 10**t:.3g}" for t in ticks])
    ax.set_ylim(low, high)


def _share(x: float) -> str:
    return f"{100 * x:.3g} %"
