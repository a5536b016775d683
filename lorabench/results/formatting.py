"""Numbers as a reader sees them, rounded before they are rendered. Missing numbers are a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorabench.config.errors import ConfigError

DASH = "–"
MAX_NAMES = 10  # that a sentence names one by one
SHARES = {"accuracy", "macro_f1", "token_accuracy"}  # shown as per cent, their differences as points
TITLES = {
    "macro_f1": "macro-F1",
    "mcc": "MCC",
    "token_accuracy": "token accuracy",
    "loss": "loss",
    "perplexity": "perplexity",
}


@dataclass(frozen=True)
class Metric:
    """How one metric is shown. decimals: of the shown, scaled number."""

    name: str
    lower_is_better: bool
    decimals: int
    scale: float = 1.0
    unit: str = ""  # after a value
    points: str = ""  # after a difference: points, or what the metric is measured in

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name.replace("_", " "))

    @property
    def axis(self) -> str:
        return in_unit(self.title, self.measured_in)

    @property
    def measured_in(self) -> str:
        """On an axis and in the head of a table."""
        return self.unit or self.points

    def value(self, x: float | None, *, unit: bool = False) -> str:
        return number(None if x is None else x * self.scale, self.decimals) + (
            f" {self.unit}" if unit and self.unit else ""
        )

    def difference(self, x: float | None, *, unit: bool = False) -> str:
        text = number(None if x is None else x * self.scale, self.decimals, sign=True)
        return text + (f" {self.points}" if unit and self.points else "")

    def size(self, x: float, *, unit: bool = True) -> str:
        """A width or a gap, without its sign; one that rounds to nothing and is something: `<0.001`."""
        shown = number(abs(x) * self.scale, self.decimals)
        if x and not shown.strip("0."):
            shown = f"<{10.0**-self.decimals:.{self.decimals}f}"
        return shown + (f" {self.points}" if unit and self.points else "")

    def bounds(self, low: float, high: float) -> str:
        return f"{self.difference(low)} to {self.difference(high)}"


def metric(name: str, *, lower_is_better: bool, largest: float | None = None, unit: str = "") -> Metric:
    """The way to show a metric. largest: of its values, which sets the decimals of one without a fixed scale; unit: of
    such a one, as its task says (`units`)."""
    if name in SHARES:
        return Metric(name, lower_is_better, 1, 100.0, "%", "points")
    if name == "perplexity" or (largest is not None and abs(largest) >= 100):
        return Metric(name, lower_is_better, 2, points=unit)
    return Metric(name, lower_is_better, 3, points=unit)


def in_unit(what: str, unit: str) -> str:
    """`validation loss (nats)`; without a unit as it is."""
    return f"{what} ({unit})" if unit else what


def number(x: float | None, decimals: int, *, sign: bool = False) -> str:
    """Fixed decimals, a true minus sign, no negative zero."""
    if x is None or not math.isfinite(x):
        return DASH
    text = f"{abs(x):,.{decimals}f}"
    zero = not text.strip("0.,")
    return ("" if zero else "−" if x < 0 else "+" if sign else "") + text


def rate(lr: float | None) -> str:
    """A learning rate: 5e-4, 2.5e-5; 0.1 and above as they are."""
    if lr is None or not math.isfinite(lr):
        return DASH
    if lr >= 0.1:
        return f"{lr:g}"
    mantissa, exponent = f"{lr:.3e}".split("e")
    return f"{float(mantissa):g}e-{abs(int(exponent))}"


def count(n: float | None) -> str:
    return DASH if n is None else f"{int(n):,}"


def compact(n: float | None) -> str:
    """Three digits: 1,155, 43.4 k, 22.7 M."""
    if n is None or n < 10_000:
        return count(n)
    scaled, letter = (n / 1e6, "M") if n >= 999_500 else (n / 1e3, "k")
    return f"{scaled:.{0 if scaled >= 99.95 else 1}f} {letter}"


def share(part: float | None, whole: float | None) -> str:
    """Per cent with two significant digits: .024 %, 1.3 %, 100 %."""
    if not part or not whole:
        return DASH
    percent = 100 * part / whole
    digits = 0 if percent >= 10 else 1 if percent >= 1 else 2 if percent >= 0.1 else 3
    return f"{percent:.{digits}f} %"


def seconds(s: float | None) -> str:
    """Return seconds as a table has them: with one decimal below a hundred."""
    return DASH if s is None else f"{s:,.1f}" if s < 100 else f"{s:,.0f}"


def duration(s: float) -> str:
    """In words."""
    if s < 90:
        return f"{s:.0f} s"
    return f"{s / 60:.0f} min" if s < 5400 else f"{s / 3600:.1f} h"


def memory(n: float | None) -> str:
    if n is None:
        return DASH
    return f"{n / 2**20:,.0f} MiB" if n < 2**30 else f"{n / 2**30:,.1f} GiB"


def natural_key(text: str) -> tuple[float, str]:
    """A key to sort by: numbers by size, then words."""
    try:
        return float(text.replace(",", "")), text
    except ValueError:
        return math.inf, text


def check_margin(key: str, metric: str, margin: float) -> None:
    """Raise `ConfigError` for a margin of 1 or more of a share (0 to 1), which was meant in points."""
    if metric in SHARES and margin >= 1:
        points = f"{margin:g} {'point is' if margin == 1 else 'points are'} {margin / 100:g}"
        allowed = f"below 1: {TITLES.get(metric, metric)} is a share from 0 to 1, and {points} of it"
        raise ConfigError(key, margin, allowed)


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("" if n == 1 else "s")


def capital(text: str) -> str:
    """A text with a capital letter at its start; a first word that has capitals of its own stays (rsLoRA)."""
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first == first.lower() else text


def name_some(names: Sequence[str], most: int = MAX_NAMES) -> str:
    """Return `A, B, C`, or `A, B and 5 more` of more than `most` + 1."""
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
