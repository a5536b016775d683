"""Whether a cell's learning rate is settled, or chosen by a hair or at the end of its grid.

A rate that lies at an end of its grid is a warning, not a result. So is one that the tuning seeds do not tell apart from
a neighbour: other seeds would have chosen otherwise, and what the cell scores may be the score of a rate that it would
not have had. A verdict that rests on such a cell holds so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lorabench.results import formatting
from lorabench.results.cells import Result
from lorabench.results.selection import Rate
from lorabench.results.sweep import Sweep
from lorabench.stats import estimates

ALPHA = 0.05  # of the one-sided test that a neighbouring rate is worse


def unsettled_rate(sweep: Sweep, r: Result) -> str:
    """Return why a cell's rate is not settled; empty where it is, and where there were no rates to choose from."""
    choice = r.choice
    if choice.lr is None or len(choice.rates) < 2:
        return ""
    if choice.side:
        end = "largest" if choice.side == "high" else "smallest"
        return f"its best rate, {formatting.rate(choice.lr)}, is the {end} of its grid"
    best = next(x for x in choice.rates if x.lr == choice.lr)
    for neighbour in _neighbours(r):
        if not _is_told_apart(sweep, r, best, neighbour):
            scores = f"{_number(best.score)} against {_number(neighbour.score)}"
            seeds = formatting.plural(len(best.losses), "tuning seed")
            verb = "does" if len(best.losses) == 1 else "do"
            return (
                f"its rate, {formatting.rate(best.lr)}, was chosen over {formatting.rate(neighbour.lr)} by {scores}, "
                f"which {seeds} {verb} not tell apart"
            )
    return ""


def _neighbours(r: Result) -> Iterator[Rate]:
    """The rates beside the best one that every seed trained at."""
    eligible = [x for x in r.choice.rates if x.eligible]
    at = next(i for i, x in enumerate(eligible) if x.lr == r.choice.lr)
    yield from (eligible[i] for i in (at - 1, at + 1) if 0 <= i < len(eligible))


def _is_told_apart(sweep: Sweep, r: Result, best: Rate, neighbour: Rate) -> bool:
    """One-sided test of the two rates' difference, seed by seed.

    What is known of the seeds' scatter: the tuning seeds' own, and that of the confirmation runs at the best rate.
    """
    ours, theirs = (np.asarray(x.scores or x.losses, dtype=np.float64) for x in (best, neighbour))
    if len(ours) != len(theirs):
        return False
    gap = abs(float(theirs.mean() - ours.mean()))
    confirmed = [float(v) for x in r.runs if (v := x.metrics.get(f"val/{sweep.selection}")) is not None]
    typical = 2 * float(np.var(confirmed, ddof=1)) if r.role == "confirm" and len(confirmed) > 1 else None
    if len(ours) > 1:
        variance, df = estimates.seed_variance(theirs - ours, typical)
    elif typical is not None:
        variance, df = typical, float(len(confirmed) - 1)
    else:
        return False
    return gap > -estimates.quantile(ALPHA, df) * math.sqrt(variance / len(ours))


def _number(x: float) -> str:
    return f"{x:.4g}"
