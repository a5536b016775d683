"""Figures of what training added to the weights: subspace similarity as heat maps, singular values as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from lorabench.report import formats, style
from lorabench.report.load import short
from lorabench.report.style import Drawing, Look
from lorabench.report.weights import Similarity, Spectrum, Weights

MOST = 8  # spectra in one picture


def draw(w: Weights, looks: Mapping[str, Look]) -> list[Drawing]:
    """The figures this analysis has the data for. looks: by cell id, as the report's other figures have them."""
    return [d for d in (subspaces(w.similarities), spectra(w.spectra, looks)) if d is not None]


# -- subspaces -----------------------------------------------------------------------------------------------------------


def subspaces(found: Sequence[Similarity]) -> Drawing | None:
    """phi(i, j) of A before and after training and of dW, for the widest pair of ranks, else for one cell's seeds."""
    mine = telling(found)
    if not mine:
        return None
    a = next((s for s in mine if s.of == "A"), None)
    dW = next((s for s in mine if s.of == "dW"), None)
    panels = [("A before training", a, a.start)] if a is not None and a.start is not None else []
    panels += [("A after training", a, a.phi)] if a is not None else []
    panels += [("ΔW", dW, dW.phi)] if dW is not None else []
    first = mine[0]
    with style.canvas(2.9 * len(panels) + 0.9, 3.1) as figure:
        axes = [figure.add_subplot(1, len(panels), k + 1) for k in range(len(panels))]
        for ax, (title, s, phi) in zip(axes, panels, strict=True):
            mesh = _heat(ax, s, phi, title, named=ax is axes[0])
        bar = figure.colorbar(mesh, ax=axes, shrink=0.85)
        bar.set_label("φ(i, j)")
        bar.outline.set_visible(False)
        caption = _subspace_caption(first)
        alt = f"Subspace similarity of {_pair(first)}: " + "; ".join(
            f"{title} φ(1, 1) = {formats.number(float(phi[0, 0]), 2)}, "
            f"φ({s.i[-1]}, {s.j[-1]}) = {formats.number(float(phi[-1, -1]), 2)}"
            for title, s, phi in panels
        )
        return style.drawing("subspaces", "Do runs find the same directions?", caption, f"{alt}.", figure)


def telling(found: Sequence[Similarity]) -> list[Similarity]:
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
    corner = formats.number(float(s.random[-1, -1]), 2)
    pair = _pair(s)
    return (
        f"{pair[:1].upper()}{pair[1:]}: φ(i, j) of the i and j leading right-singular directions, "
        f"0 where they are orthogonal, 1 where the smaller lies in the larger; the mean over layers and {formats.plural(len(s.runs), 'pair')} of runs. "
        f"Random directions have {formats.number(float(s.random[0, 0]), 3)} at (1, 1) and {corner} at ({s.i[-1]}, {s.j[-1]})."
    )


def _heat(ax: Axes, s: Similarity, phi: np.ndarray, title: str, *, named: bool) -> QuadMesh:
    """Cells of one size whatever the numbers between two i: the axes are lists of what was kept."""
    ax.grid(False)
    colours = sns.light_palette(style.HUES["LoRA"], as_cmap=True)
    mesh = ax.pcolormesh(phi, vmin=0, vmax=1, cmap=colours, linewidth=0)
    for axis, ticks in ((ax.xaxis, s.j), (ax.yaxis, s.i)):
        every = max(1, len(ticks) // 7)
        kept = sorted({*range(0, len(ticks), every), len(ticks) - 1})
        if len(kept) > 1 and kept[-1] - kept[-2] < every:
            del kept[-2]
        axis.set_ticks([k + 0.5 for k in kept], [str(ticks[k]) for k in kept])
    ax.invert_yaxis()
    ax.set_title(title)
    ax.set_xlabel(f"j ({short(s.names[1], 24)})")
    if named:
        ax.set_ylabel(f"i ({short(s.names[0], 24)})")
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return mesh


# -- spectra -------------------------------------------------------------------------------------------------------------


def spectra(found: Sequence[Spectrum], looks: Mapping[str, Look]) -> Drawing | None:
    """The leading singular values of dW beside ||W||, a curve a cell; bands are the quartiles over layers and runs."""
    shown = [s for s in found if s.cell in looks]
    if len(shown) > MOST:
        shown = [shown[k] for k in sorted({round(i * (len(shown) - 1) / (MOST - 1)) for i in range(MOST)})]
    if not shown:
        return None
    with style.canvas(style.single(s.name for s in shown), 3.4) as figure:
        ax = figure.add_subplot()
        labels = [_curve(ax, s, looks[s.cell]) for s in shown]
        most = max(len(s.median) for s in shown)
        style.rank_axis(ax, [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= most] or [1])
        ax.set_xlim(1 / 1.15, most * 1.15)
        _per_cent(ax)
        style.tidy(ax, x="singular value of ΔW, by size (log scale)", y="share of ‖W‖ (%, log scale)")
        style.end_labels(ax, labels)
        caption = (
            "Singular values of ΔW over the Frobenius norm of W: median over layers and runs, bands are the quartiles."
        )
        said = "; ".join(
            f"{s.name} from {_share(s.median[0])} to {_share(s.median[-1])} at {len(s.median)}" for s in shown
        )
        return style.drawing(
            "spectra", "How many directions training used", caption, f"Singular values of ΔW: {said}.", figure
        )


def _curve(ax: Axes, s: Spectrum, look: Look) -> style.Label:
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
