"""Claims about the best learning rate: how it stands to full fine-tuning's, and how it moves with the rank.

All numbers are of interpolated best rates (`rates`), in octaves: an optimum that moves by one octave has doubled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from lorabench.claims.verdict import Claim, Verdict, decide, judge_range, seeds_to_settle
from lorabench.results import best_rate, rate_slopes
from lorabench.results.best_rate import Missing, Optimum
from lorabench.results.cells import Result
from lorabench.results.evidence import Evidence, Line
from lorabench.results.formatting import number, plural, rate
from lorabench.results.rate_slopes import Rule
from lorabench.results.weights import width
from lorabench.stats.estimates import Estimate

REGRET = "LoRA Without Regret (Schulman et al. 2025)"
MUA = "μA (arXiv 2602.06204)"
REGRET_ALPHA = 32.0  # of LoRA Without Regret: s = 32 / r
SHORT_RUN_STEPS = 100  # steps
HALF_WAY_RATIO = math.sqrt(
    15 / 10
)  # a ratio is "about 10" while it is nearer to 10 than to 15, and the other way round
CLAIMED_RANKS = (4, 512)  # over which the best rate was seen to move by less than a factor of 2
MIN_RANK_SPAN = 8  # of ranks: over less, a slope of -1/2 would hide in an octave or two

# -- against full fine-tuning ----------------------------------------------------------------------------------------

LONG = Claim("LoRA's best learning rate is about 10 times that of full fine-tuning", REGRET)
SHORT = Claim("In runs of at most 100 steps LoRA's best rate is about 15 times that of full fine-tuning", REGRET)


def ratio_in_long_runs(e: Evidence) -> Verdict:
    return _ratio(e, LONG, 10.0, short=False)


def ratio_in_short_runs(e: Evidence) -> Verdict:
    return _ratio(e, SHORT, 15.0, short=True)


def _ratio(e: Evidence, claim: Claim, times: float, *, short: bool) -> Verdict:
    """Geometric mean over the ranks of a line s = alpha / r, over full fine-tuning's best rate."""
    lines = [line for line in e.lines(1.0) if e.full(line.cells[0].cell)]
    if not lines:
        return claim.absent(
            "it takes LoRA cells and full fine-tuning", "full fine-tuning and LoRA with alpha = 32, five rates each"
        )
    line = next((x for x in lines if math.isclose(x.constant, REGRET_ALPHA, rel_tol=1e-3)), lines[0])
    full = e.full(line.cells[0].cell)
    assert full is not None
    found = e.located([*line.cells, full])
    made, said, weights = None, "", [1 / len(line.cells)] * len(line.cells) + [-1.0]
    if not isinstance(found, Missing):
        made, said = (
            best_rate.contrast(found, weights),
            f"{number(2 ** best_rate.contrast_mean(found, weights), 1)} times",
        )
    if reason := _ratio_conditions(line, full, short=short):
        return claim.outside(reason, said)
    if isinstance(found, Missing):
        return claim.lacks(found)
    if made is None:
        return claim.lacks(_missing_interval([*line.cells, full]), said)
    low, high = math.log2(times / HALF_WAY_RATIO), math.log2(times * HALF_WAY_RATIO)
    ours = best_rate.contrast_mean(found[:-1], weights[:-1])
    reason = (
        f"{rate(2.0**ours)} {line.where} over {rate(found[-1].lr)}; about {times:g} means {2**low:.1f} to {2**high:.1f}"
    )
    bounds = made.interval()
    return claim.verdict(
        judge_range(made, low, high),
        said,
        (best_rate.power_of_two(bounds[0]), best_rate.power_of_two(bounds[1])),
        reason,
        seeds_to_settle(made, low, high, "tuning"),
    )


def _ratio_conditions(line: Line, full: Result, *, short: bool) -> str | None:
    if reason := _other_optimizer([*line.cells, full]):
        return reason
    steps = [int(r.resource("steps") or 0) for r in (*line.cells, full)]
    if not max(steps):
        return "made for runs of a known number of steps; these records have none"
    if short != (max(steps) <= SHORT_RUN_STEPS):
        return (
            f"made for runs of {'at most' if short else 'more than'} {SHORT_RUN_STEPS} steps; these have {max(steps):,}"
        )
    if not math.isclose(line.constant, REGRET_ALPHA, rel_tol=1e-3):
        return f"made at s = {REGRET_ALPHA:g} / r; here s = {line.constant:g} / r"
    return None


# -- against the rank ------------------------------------------------------------------------------------------------

STILL = Claim("With s = alpha / r the best rate moves by less than a factor of 2 from rank 4 to 512", REGRET)


def rate_moves_little(e: Evidence) -> Verdict:
    """The pair of ranks whose best rates lie furthest apart; all pairs must lie within one octave."""
    lines = e.lines(1.0)
    if not lines:
        return STILL.absent(
            "it takes LoRA at several ranks and one alpha", "LoRA at ranks 4, 16 and 64 with one alpha, five rates each"
        )
    if reason := _other_optimizer(lines[0].cells):
        return STILL.outside(reason)
    cells = [r for r in lines[0].cells if CLAIMED_RANKS[0] <= (r.cell.r or 0) <= CLAIMED_RANKS[1]]
    if not cells:
        return STILL.outside(
            f"made for ranks {CLAIMED_RANKS[0]} to {CLAIMED_RANKS[1]}; here they are {', '.join(map(str, lines[0].ranks))}"
        )
    line = replace(lines[0], cells=tuple(cells))
    if line.span() < MIN_RANK_SPAN:
        return STILL.needs(
            f"rank{'s' * (len(cells) > 1)} {', '.join(str(r.cell.r) for r in cells)} alone",
            f"one alpha at ranks a factor of {MIN_RANK_SPAN} apart, in {CLAIMED_RANKS[0]} to {CLAIMED_RANKS[1]}",
        )
    found = e.located(cells)
    if isinstance(found, Missing):
        return STILL.lacks(found)
    made = [_pair(found, i, j) for i, j in combinations(range(len(found)), 2)]
    widest = max(range(len(made)), key=lambda k: abs(made[k][0]))
    said = f"{number(abs(made[widest][0]), 2)} octaves at most"
    known = [x for _, x in made if x is not None]
    if len(known) < len(made):
        return STILL.lacks(_missing_interval(cells), said)
    # All pairs inside is one claim and needs no correction; any pair outside is one of several and does.
    level = 1 - 0.05 / len(known)
    holds = all(x.interval(0.90)[0] > -1 and x.interval(0.90)[1] < 1 for x in known)
    beyond = any(x.interval(level)[0] > 1 or x.interval(level)[1] < -1 for x in known)
    status = decide(holds, beyond)
    reason = f"{line.where}, s = {line.constant:g} / r; the widest of {plural(len(known), 'pair')}"
    return STILL.verdict(
        status, said, _positive_interval(known[widest]), reason, seeds_to_settle(known[widest], -1, 1, "tuning")
    )


def _pair(found: Sequence[Optimum], i: int, j: int) -> tuple[float, Estimate | None]:
    two, weights = [found[j], found[i]], [1.0, -1.0]
    return best_rate.contrast_mean(two, weights), best_rate.contrast(two, weights)


def _positive_interval(e: Estimate) -> tuple[float, float]:
    """The 95 % interval of a difference, turned so that its middle is positive."""
    low, high = e.interval()
    return (low, high) if e.mean >= 0 else (-high, -low)


FIXED = Claim("With s = alpha / r the best rate does not move with the rank (slope 0 of log rate on log r)", MUA)
CONSTANT = Claim("With s constant the best rate falls as 1/√r (slope −1/2 of log rate on log r)", MUA)
ROOT = Claim("With s = alpha / √r the best rate falls as the fourth root of r (slope −1/4 of log rate on log r)", MUA)


def slope_with_alpha_fixed(e: Evidence) -> Verdict:
    """Within 1/4 of 0: nearer to it than to −1/2."""
    return _slope(e, FIXED, rate_slopes.FIXED, 0.25, "one alpha")


def slope_with_scale_fixed(e: Evidence) -> Verdict:
    """Within 1/4 of −1/2: nearer to it than to 0."""
    return _slope(e, CONSTANT, rate_slopes.PROPORTIONAL, 0.25, "alpha in proportion to r")


def slope_with_rslora(e: Evidence) -> Verdict:
    """Within 1/8 of −1/4: nearer to it than to 0 and −1/2."""
    return _slope(e, ROOT, rate_slopes.ROOT, 0.125, "rsLoRA and one alpha")


def _slope(e: Evidence, claim: Claim, rule: Rule, half: float, said_of: str) -> Verdict:
    settle = f"{said_of} at ranks 4, 8, 16 and 32 or more, five rates each"
    lines = e.lines(rule.power)
    if not lines or len(lines[0].cells) < 2:
        return claim.absent(f"it takes several ranks with {said_of}", settle)
    if reason := _other_optimizer(lines[0].cells) or _other_initialisation(lines[0].cells):
        return claim.outside(reason)
    side = width(e.sweep, e.weights)
    line = rate_slopes.narrow_line(lines[0], side)
    cells = line.cells
    if len(cells) < 2:
        return claim.outside(
            f"made for a width much larger than r; here the width is {side} and r is {', '.join(map(str, lines[0].ranks))}"
        )
    if len(cells) < rate_slopes.MIN_RANKS or line.span() < MIN_RANK_SPAN:
        return claim.needs(f"a slope takes three ranks over a factor of {MIN_RANK_SPAN}", settle)
    found = e.located(cells)
    if isinstance(found, Missing):
        return claim.lacks(found)
    at, made = rate_slopes.fit(found, line.ranks)
    said = f"slope {number(at, 2)}"
    if made is None:
        return claim.lacks(_missing_interval(cells), said)
    low, high = rule.theory - half, rule.theory + half
    reason = f"{line.where}; {number(rule.theory, 2)} means {number(low, 3)} to {number(high, 3)}"
    reason += f"; width {side}" if side else "; the width is not in the records, so ranks near it were not left out"
    return claim.verdict(
        judge_range(made, low, high), said, made.interval(), reason, seeds_to_settle(made, low, high, "tuning")
    )


# -- conditions ------------------------------------------------------------------------------------------------------


def _other_optimizer(cells: Sequence[Result]) -> str | None:
    names = sorted({str(x.config["optimizer"].get("name")) for r in cells for x in r.runs})
    return None if names == ["adamw"] else f"made for AdamW; here the optimizer is {', '.join(names)}"


def _other_initialisation(cells: Sequence[Result]) -> str | None:
    """B starts at zero, A does not: all but the orthogonal start."""
    starts = {str(x.config["method"].get("init", "kaiming")) for r in cells for x in r.runs}
    other = sorted(starts - {"kaiming", "gaussian"})
    return f"made for a drawn A and B = 0; here method.init is {', '.join(other)}" if other else None


def _missing_interval(cells: Sequence[Result]) -> Missing:
    said = ", ".join(r.name for r in cells)
    return Missing(
        f"one tuning seed does not say how far a seed moves the best rate ({said})",
        "two or more tuning seeds, the same at every rate",
    )
