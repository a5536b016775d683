"""How pictures look: one hue a method, lighter for smaller ranks.

Hues are Okabe & Ito's, safe for colour-blind readers.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullFormatter

from lorabench.config.method_names import BITFIT, DORA, FULL, HEAD_ONLY, LORA, RSLORA
from lorabench.results import formatting
from lorabench.results.sweep import Cell, shorten

HUES = {
    LORA: "#0072B2",
    RSLORA: "#D55E00",
    BITFIT: "#009E73",
    HEAD_ONLY: "#6E6E6E",
    FULL: "#1A1A1A",
    DORA: "#B8588F",
}
OTHER_HUES = ("#8C6D00", "#5B4FA2", "#A0522D", "#3E8E9C", "#7A8B1F")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vP"
MAX_NAME_LENGTH = 40  # characters of a name inside a picture
MIN_CONTRAST = 4.5  # of text to white (WCAG 2.2, 1.4.3)
INK, FAINT, GRID = "#222222", "#666666", "#E3E3E3"
DIGITS = 9  # of a coordinate; the last of sixteen depend on the CPU
DOTTED = (0, (1, 2))  # a line that marks a value, such as the margin
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "axes.titlesize": 11,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "lines.linewidth": 1.8,
    "path.simplify": False,
    "text.parse_math": False,
    "svg.hashsalt": "lorabench",
    "svg.fonttype": "path",
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class Drawing:
    """One figure in both formats, with the words that stand for it."""

    key: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes
    figure: Figure = field(repr=False, compare=False)  # what both were rendered from, for a notebook


@dataclass(frozen=True)
class Look:
    """How one cell is drawn, in every figure of a report."""

    colour: str
    marker: str
    dashes: Any


def looks(cells: Sequence[Cell]) -> dict[str, Look]:
    """Return the look of every cell, by its id.

    Hue stands for the method, dashes and marker for the series.
    Lightness stands for the rank, or for the order of cells of one rank.
    """
    methods = sorted({c.method for c in cells})
    unknown = [m for m in methods if m not in HUES]
    hues = {**HUES, **{m: OTHER_HUES[i % len(OTHER_HUES)] for i, m in enumerate(unknown)}}
    by_cell = {}
    for method in methods:
        same_method = [c for c in cells if c.method == method]
        series = list(dict.fromkeys(c.series for c in same_method))
        has_ranks = len({(c.series, c.r) for c in same_method}) > len(series)  # some series has several
        keys = [(c.r or 0, "") if has_ranks else (0, c.id) for c in same_method]
        steps = sorted(set(keys)) if has_ranks else keys
        shades = _shades(hues[method], len(steps))
        for c, key in zip(same_method, keys, strict=True):
            i = series.index(c.series)
            by_cell[c.id] = Look(shades[steps.index(key)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
    return by_cell


def method_colour(cell: Cell, looks: Mapping[str, Look]) -> str:
    """Return the method's own colour, for what stands for a whole series."""
    return HUES.get(cell.method, looks[cell.id].colour)


def _shades(colour: str, n: int) -> list[str]:
    """Return n shades of one hue, from light to dark."""
    if n == 1:
        return [colour]
    light, dark = sns.light_palette(colour, 10)[5], sns.dark_palette(colour, 10)[2]
    return [to_hex(c) for c in sns.blend_palette([light, colour, dark], n)]


def readable_colour(colour: str) -> str:
    """Return the colour, darkened until text in it has enough contrast to white."""
    rgb = np.array(to_rgb(colour))
    while 1.05 / (_luminance(rgb) + 0.05) < MIN_CONTRAST:
        rgb = rgb * 0.95
    return str(to_hex(tuple(rgb)))


def _luminance(rgb: np.ndarray) -> float:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@contextmanager
def canvas(width: float, height: float, *, between: float | None = None) -> Iterator[Figure]:
    """Give an empty figure under the report's settings and no others.

    width, height: of the figure. between: what panels keep free around them. All in inches.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        sns.set_theme(context=None, style=None, palette=list(HUES.values()), color_codes=False, rc=RC)
        figure = Figure(figsize=(width, height), layout="constrained")
        if between is not None:
            figure.get_layout_engine().set(w_pad=between, h_pad=between)  # type: ignore[union-attr, call-arg]
        FigureCanvasAgg(figure)
        yield figure


def panel_width(names: Iterable[str]) -> float:
    """Return the width in inches of one panel with these names beside it.

    It is what a phone shows whole, unless a name is long.
    """
    return 5.2 if max(map(len, names), default=0) <= 22 else 6.2


def render_drawing(key: str, title: str, caption: str, alt: str, figure: Figure) -> Drawing:
    """Render a figure inside `canvas`. No date, no version, no random id: equal figures give equal bytes.

    Figures that differ in the last bits of their numbers, as those of two CPUs do, are equal.
    """
    _round_coordinates(figure)
    svg, png = io.StringIO(), io.BytesIO()
    meta = {"Date": None, "Creator": None, "Title": title}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a user's name in another script
        figure.savefig(svg, format="svg", bbox_inches="tight", pad_inches=0.06, metadata=meta)
        figure.savefig(png, format="png", bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
    return Drawing(key, title, caption, alt, _settled(svg.getvalue()), png.getvalue(), figure)


def _round_coordinates(figure: Figure) -> None:
    """Round all that is drawn in data coordinates, and the limits of axes, to `DIGITS` significant digits."""
    for ax in figure.axes:
        limits = _rounded([*ax.get_xlim(), *ax.get_ylim()])
        ax.set(xlim=limits[:2], ylim=limits[2:])
        for line in ax.lines:
            line.set_data(_rounded(line.get_xdata()), _rounded(line.get_ydata()))
        for collection in ax.collections:
            collection.set_offsets(_rounded(collection.get_offsets()))
            for path in collection.get_paths():
                path.vertices = _rounded(path.vertices)
        for patch in ax.patches:
            if isinstance(patch, Rectangle):
                patch.set_bounds(*_rounded([*patch.get_xy(), patch.get_width(), patch.get_height()]))
        for text in ax.texts:
            x, y = _rounded(text.get_position())
            text.set_position((x, y))
            if isinstance(text, Annotation):
                text.xy = tuple(_rounded(text.xy))


def _rounded(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return np.array([float(f"{x:.{DIGITS}g}") for x in array.flat]).reshape(array.shape)


def _settled(svg: str) -> str:
    """Return an SVG without a sign on zeros, its clip paths, markers and hatches numbered in order of appearance.

    Matplotlib names them by hashes of unrounded coordinates.
    """
    names: dict[str, str] = {}
    for kind, digits in re.findall(r'\bid="(\w*?)([0-9a-f]{10})"', svg):
        names.setdefault(kind + digits, f"{kind or 'd'}{len(names) + 1}")
    svg = re.sub(r"\b\w*?[0-9a-f]{10}\b", lambda match: names.get(match[0], match[0]), svg)
    return re.sub(r'(?<=[ "(,])-0(?=[ "),\n])', "0", svg)


def inline_svg(d: Drawing) -> str:
    """Return the SVG element for a page: ids unique to the figure, size left to the page, the alt text inside."""
    svg = d.svg[d.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{d.key}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{d.key}-", svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box
    label = f'aria-labelledby="{d.key}-alt"'
    rest = re.sub(r"<title>.*?</title>", "", rest, flags=re.S)
    text = d.alt.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} role="img" {label} {box[0]}><title id="{d.key}-alt">{text}</title>{rest.strip()}'


# -- parts of pictures -----------------------------------------------------------------------------------------------


def label_axes(ax: Axes, *, x: str, y: str, grid: str = "y") -> None:
    """Set the axes' titles, one direction of grid lines, and no box."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(False)
    ax.grid(True, axis=grid)  # type: ignore[arg-type]
    sns.despine(ax=ax)


def set_rank_axis(ax: Axes, ranks: Sequence[int]) -> None:
    """Make the x axis logarithmic to base 2, with a tick at every rank that was run."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(r) for r in ranks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()


def set_rate_axis(ax: Axes, rates: Sequence[float], axis: Literal["x", "y"] = "x") -> None:
    """Make an axis logarithmic, with a tick at every rate that was tried where the labels have room.

    Else the ticks are 1, 2 and 5 of each decade while those are few.
    """
    low, high = min(rates), max(rates)
    ticks = sorted(set(rates))
    label_size = max(len(formatting.rate(t)) for t in ticks) if axis == "x" else 1  # characters along the axis
    gap = min((np.log(b / a) for a, b in pairwise(ticks)), default=1.0) / np.log(high / low * 1.6**2)
    if gap <= 0.03 + 0.028 * label_size:
        ticks = decade_ticks(low, high)
    labels = [formatting.rate(t) for t in ticks]
    if axis == "x":
        ax.set_xscale("log")
        ax.set_xticks(ticks, labels)
    else:
        ax.set_yscale("log")
        ax.set_yticks(ticks, labels)
    ax.minorticks_off()
    ax.set(**{f"{axis}lim": (low / 1.6, high * 1.6)})


def decade_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of each decade from low to high; over more than two and a half decades the powers of ten."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    return [t for d in decades for s in steps if low / 1.5 <= (t := s * 10.0**d) <= high * 1.5]


def format_metric_ticks(ax: Axes, metric: formatting.Metric, axis: str = "y") -> None:
    """Label ticks in the metric's shown unit, all with the same decimals; the data stay in their own."""
    ticked = ax.yaxis if axis == "y" else ax.xaxis

    def text(value: float, _: int | None) -> str:
        shown = (f"{v * metric.scale:.6g}" for v in ticked.get_majorticklocs())
        decimals = max((len(t.partition(".")[2]) for t in shown if "e" not in t), default=0)
        return formatting.number(value * metric.scale, decimals)

    ticked.set_major_formatter(FuncFormatter(text))


def draw_point(ax: Axes, x: float, y: float, look: Look, *, size: float = 7.0, zorder: float = 4, **style: Any) -> None:
    """Draw a cell's marker with a white edge. style: what differs from that, as `Axes.plot` takes it."""
    default: dict[str, Any] = {"marker": look.marker, "color": look.colour}
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.8}
    ax.plot(x, y, markersize=size, zorder=zorder, **(default | edge | style))


def draw_band(ax: Axes, x: Sequence[float] | np.ndarray, low: np.ndarray, high: np.ndarray, look: Look) -> None:
    """Shade a curve's spread."""
    ax.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)


Label = tuple[float | None, float, str, str]  # x and y in data (x None: the right edge), text, colour


def draw_end_labels(ax: Axes, labels: Sequence[Label], *, size: float = 9.5) -> None:
    """Write names at the right edge, moved apart where they would overlap, each tied to its point."""
    low, high = ax.get_ylim()
    figure = ax.get_figure(root=True)
    assert figure is not None
    inches = ax.get_position().height * figure.get_figheight() * 0.9  # near the height the layout settles on later
    gap = size * 1.3 / 72 / inches
    ordered = sorted(labels, key=lambda label: (label[1], label[2]))
    wanted = [(y - low) / (high - low) for _, y, _, _ in ordered]
    for height, (x, y, text, colour) in zip(spread_apart(wanted, gap), ordered, strict=True):
        xy, coords = ((1.0, y), ax.get_yaxis_transform()) if x is None else ((x, y), ax.transData)
        tie = {"arrowstyle": "-", "color": colour, "lw": 0.9, "ls": (0, (1, 1.6)), "relpos": (0, 0.5)}
        ax.annotate(
            shorten(text, MAX_NAME_LENGTH),
            xy=xy,
            xycoords=coords,
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=readable_colour(colour),
            fontsize=size,
            va="center",
            ha="left",
            annotation_clip=False,
            arrowprops=tie | {"shrinkA": 1, "shrinkB": 4 if x else 0},
        )


def spread_apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Return positions at least `gap` apart and as near as that allows to ascending `wanted`.

    Pool adjacent violators (Barlow et al. 1972).
    """
    blocks: list[tuple[float, int]] = []  # (sum of wanted - i * gap, count)
    for i, y in enumerate(wanted):
        total, n = y - i * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / n:
            last = blocks.pop()
            total, n = total + last[0], n + last[1]
        blocks.append((total, n))
    flat = [total / n for total, n in blocks for _ in range(n)]
    return [y + i * gap for i, y in enumerate(flat)]
