"""Claims about what training does to weights and to what the base knew: spectra of ΔW, intruder dimensions, forgetting.

Spectra come from `python -m lorabench.analyze`; forgetting from record metrics `probe/...`, measured on other data with
the trained model. One number a run; seeds are the only source of spread that is known here.
"""

from __future__ import annotations

import math

import numpy as np

from lorabench.claims.verdict import Claim, Verdict, decide, judge_range, seeds_to_settle
from lorabench.config.method_names import PLAIN_LORA
from lorabench.results.best_rate import Missing
from lorabench.results.cells import Result
from lorabench.results.evidence import Evidence
from lorabench.results.forgetting import changes, less_is_better, probe_key, probe_metric
from lorabench.results.formatting import number, plural
from lorabench.results.weights import Analysis, width
from lorabench.stats import estimates
from lorabench.stats.estimates import welch

LEARNS_LESS = "LoRA Learns Less and Forgets Less (arXiv 2405.09673)"


ILLUSION = "LoRA vs Full Fine-tuning: An Illusion of Equivalence (arXiv 2410.21228)"


RANK_RATIO_RANGE = (10.0, 100.0)  # of the rank LoRA was given


LOW_RANK = 16  # "low r"


HARDLY_ANY_SHARE = 0.5  # of LoRA's count: what full fine-tuning stays below where it has hardly any


MIN_CORRELATED_RUNS = 8  # for a correlation with one variable held fixed


WEAK_CORRELATION = 0.3  # a correlation below it is not what "go with" means (Cohen's medium)


PROBE_COMMAND = "the same sweep with task@task.probe=<another task>"


# -- the rank of ΔW --------------------------------------------------------------------------------------------------

RANK = Claim(
    "Full fine-tuning's ΔW needs 10 to 100 times the rank LoRA is given to hold 90 % of its variance", LEARNS_LESS
)


def full_needs_more_rank(e: Evidence) -> Verdict:
    """Median rank over matrices, a number a run, over the largest configured r that leaves room for ten times
    itself."""
    adapters = [r for r in e.cells if r.cell.method in PLAIN_LORA]
    pair = next(((r, f) for r in adapters if (f := e.full(r.cell))), None)
    if pair is None:
        return RANK.absent(
            "it takes LoRA and full fine-tuning", "LoRA and full fine-tuning, then python -m lorabench.analyze"
        )
    weights = e.weights
    if weights is None:
        return RANK.lacks(_missing_analysis())
    side, full = width(e.sweep, weights), pair[1]
    ranks = sorted(r.cell.r or 0 for r in adapters if e.full(r.cell) is full)
    room = [n for n in ranks if side is None or n * RANK_RATIO_RANGE[0] < side]
    if not room:
        return RANK.outside(
            f"cannot hold where r is a tenth of the width or more; here r is {ranks[0]} or more and the width {side}"
        )
    values = [math.log2(v / room[-1]) for x in full.runs if (v := weights.variance_rank(x.run_id))]
    if not values:
        return RANK.lacks(_missing_analysis())
    said = f"{number(2 ** float(np.mean(values)), 1)} times r = {room[-1]}"
    if len(values) < 3:
        return RANK.needs(
            f"{plural(len(values), 'analysed run')} of full fine-tuning", "three or more confirmation seeds", said
        )
    made = estimates.mean_over_seeds(values)
    low, high = math.log2(RANK_RATIO_RANGE[0]), math.log2(RANK_RATIO_RANGE[1])
    bounds = made.interval()
    reason = "median over matrices" + (
        f", width {side}" if side else "; the width is not known, so ranks near it were not left out"
    )
    return RANK.verdict(
        judge_range(made, low, high),
        said,
        (2 ** bounds[0], 2 ** bounds[1]),
        reason,
        seeds_to_settle(made, low, high, "confirmation"),
    )


# -- forgetting ------------------------------------------------------------------------------------------------------

FORGETS = Claim("LoRA forgets less than full fine-tuning, at matched target metric", LEARNS_LESS)


def forgets_less(e: Evidence) -> Verdict:
    """The adapter that is shown to be within the margin of full fine-tuning on the target, nearest first."""
    probe = probe_key(e)
    if probe is None:
        return FORGETS.absent("forgetting was not measured", PROBE_COMMAND)
    matched: list[tuple[float, Result, Result]] = []
    lacking: Missing | None = None
    for r in e.cells:
        full = e.full(r.cell) if r.cell.method in PLAIN_LORA else None
        made = e.difference(r, full) if full else None
        if isinstance(made, Missing):
            lacking = lacking or made
        elif made is not None and full is not None and estimates.size(made, e.sweep.margin) == "within":
            matched.append((abs(made.mean), r, full))
    if not matched:
        return FORGETS.lacks(
            lacking
            or Missing(
                "no adapter is shown to match full fine-tuning on the target",
                "more confirmation seeds, or ranks that come closer",
            )
        )
    _, r, full = min(matched, key=lambda found: found[0])
    found, known = changes((r, full), probe)
    estimate = welch(*([found[x.run_id] for x in cell.runs if x.run_id in found] for cell in (r, full)))
    if estimate is None:
        return FORGETS.needs(
            f"fewer than three probed runs of {r.name} or {full.name}",
            "probes on three or more confirmation seeds of both",
        )
    less = less_is_better(probe)
    way = estimates.direction(estimate, p=estimate.p_value(), lower_is_better=less)
    what = f"{probe}, after minus before" if known else probe
    reason = (
        f"{what}: {r.name} minus {full.name}, which match on {e.metric.title} within {e.metric.size(e.sweep.margin)}"
    )
    low, high = (-math.inf, 0.0) if less else (0.0, math.inf)
    shown, bounds = probe_metric((r, full), probe), estimate.interval()
    return FORGETS.verdict(
        decide(way == "better", way == "worse"),
        shown.difference(estimate.mean, unit=True),
        (shown.scale * bounds[0], shown.scale * bounds[1]),
        reason,
        seeds_to_settle(estimate, low, high, "confirmation"),
    )


# -- intruder dimensions ---------------------------------------------------------------------------------------------

INTRUDERS = Claim(
    "Intruder dimensions come with LoRA at low rank and fixed alpha, hardly with full fine-tuning", ILLUSION
)


COMPANY = Claim("Intruder dimensions go with forgetting", ILLUSION)


def intruders_come_with_lora(e: Evidence) -> Verdict:
    """Mean count a matrix, the lowest rank against half of full fine-tuning's: LoRA − full / 0.5 above zero."""
    lines = [line for line in e.lines(1.0) if e.full(line.cells[0].cell)]
    if not lines:
        return INTRUDERS.absent(
            "it takes LoRA and full fine-tuning",
            "LoRA at a low rank and full fine-tuning, then python -m lorabench.analyze",
        )
    low = lines[0].cells[0]
    if (low.cell.r or 0) > LOW_RANK:
        return INTRUDERS.outside(f"made for low ranks; the lowest here is {low.cell.r}")
    full, weights = e.full(low.cell), e.weights
    if full is None or weights is None:
        return INTRUDERS.lacks(_missing_analysis())
    ours, theirs = ([n for x in r.runs if (n := weights.intruders(x.run_id)) is not None] for r in (low, full))
    if not ours or not theirs:
        return INTRUDERS.lacks(_missing_analysis())
    said = f"{number(float(np.mean(ours)), 2)} and {number(float(np.mean(theirs)), 2)} a matrix"
    made = welch(ours, [n / HARDLY_ANY_SHARE for n in theirs])
    if made is None:
        return INTRUDERS.needs(
            "fewer than three analysed runs of either", "three or more confirmation seeds, analysed", said
        )
    level = made.interval()
    reason = f"{low.name} and {full.name}, cosine below {weights.threshold:g}; the interval is of the first minus {1 / HARDLY_ANY_SHARE:g} times the second"
    return INTRUDERS.verdict(
        decide(level[0] > 0, level[1] <= 0), said, level, reason, seeds_to_settle(made, 0.0, math.inf, "confirmation")
    )


def intruders_go_with_forgetting(e: Evidence) -> Verdict:
    """Correlation over runs with log ‖ΔW‖ / ‖W‖ held fixed (both rise with the rate); Fisher's z for its interval."""
    probe = probe_key(e)
    if probe is None:
        return COMPANY.absent("forgetting was not measured", PROBE_COMMAND)
    weights = e.weights
    if weights is None:
        return COMPANY.lacks(_missing_analysis())
    rows = _rows(e, weights, probe)
    settle = "probes and analysis of eight or more runs of different rates, ranks and seeds"
    if len(rows) < MIN_CORRELATED_RUNS:
        return COMPANY.needs(f"{plural(len(rows), 'run')} with probe, intruders and norm", settle)
    r = partial_correlation(*np.array(rows).T)
    if r is None:
        return COMPANY.needs("intruders or forgetting do not vary beyond what the norm explains", settle)
    low, high = fisher_interval(r, len(rows), held=1)
    reason = f"{plural(len(rows), 'run')}, {probe}, log of the norm held fixed; runs of one cell are not independent, so the interval is rather narrow"
    return COMPANY.verdict(decide(low > 0, high < WEAK_CORRELATION), f"r = {number(r, 2)}", (low, high), reason, settle)


def _rows(e: Evidence, weights: Analysis, probe: str) -> list[tuple[float, float, float]]:
    """Return for every run: intruders, forgetting (more is worse), log2 of the relative norm."""
    sign, rows = 1.0 if less_is_better(probe) else -1.0, []
    for run_id, change in changes(e.cells, probe)[0].items():
        count, norm = weights.intruders(run_id), weights.relative_norm(run_id)
        if count is not None and norm:
            rows.append((count, sign * change, math.log2(norm)))
    return rows


def partial_correlation(x: np.ndarray, y: np.ndarray, held: np.ndarray) -> float | None:
    """Return the correlation of x and y [n] with a straight line in `held` [n] taken out of both; None where nothing is
    left of one."""
    design = np.column_stack([np.ones_like(held), held])
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    if any(np.linalg.norm(a) <= 1e-9 * max(float(np.linalg.norm(v)), 1.0) for a, v in zip(left, (x, y), strict=True)):
        return None
    return float(np.clip(left[0] @ left[1] / (np.linalg.norm(left[0]) * np.linalg.norm(left[1])), -1, 1))


def fisher_interval(r: float, n: int, *, held: int) -> tuple[float, float]:
    """95 % interval of a partial correlation over n runs: atanh(r) has variance 1 / (n - 3 - held) (Fisher 1924)."""
    z, half = (
        math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))),
        estimates.quantile(0.975, math.inf) / math.sqrt(n - 3 - held),
    )
    return math.tanh(z - half), math.tanh(z + half)


def _missing_analysis() -> Missing:
    return Missing("the weights are not analysed", "python -m lorabench.analyze on this sweep, with its weights saved")
