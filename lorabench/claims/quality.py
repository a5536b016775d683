"""Claims about how good tuned cells are: targets, batch size, methods, scale. All numbers are of the primary metric on
test."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from lorabench.claims.rates import REGRET
from lorabench.claims.verdict import Claim, Status, Verdict, decide, negate, seeds_to_settle
from lorabench.config.method_names import DORA, LORA, PISSA
from lorabench.results import scores
from lorabench.results.best_rate import Missing
from lorabench.results.cells import Result
from lorabench.results.evidence import (
    MAX_PARAMETER_GAP,
    Evidence,
    has_same_conditions,
    missing_tuning,
    parameter_gap,
    scale,
    too_few_seeds,
)
from lorabench.results.formatting import plural
from lorabench.results.scores import Sample
from lorabench.stats import estimates
from lorabench.stats.estimates import Direction, Estimate

RATE_MATTERS = "Learning Rate Matters (arXiv 2602.04998)"


HIDDEN_POWER = "Hidden Power of the Scaling Factor (arXiv 2606.12883)"


VARIANTS = (LORA, DORA, PISSA, "MiLoRA")


MIN_SCALE_RATIO = 2.0  # of s: over less there is nothing to exchange


ATTENTION_TARGETS = ({"attention"}, {"q", "k", "v", "o"}, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"fused", "o"})


MLP_TARGETS = ({"mlp"}, {"gate_proj", "up_proj", "down_proj"}, {"fc1", "fc2"})


# -- targets ---------------------------------------------------------------------------------------------------------

TARGETS = Claim("Adapters on attention alone do worse than on the MLP alone, at equal parameters", REGRET)


def attention_is_worse(e: Evidence) -> Verdict:
    """The pair of cells nearest in trainable parameters."""
    pairs = [
        (a, b)
        for a in _cells_on(e, ATTENTION_TARGETS)
        for b in _cells_on(e, MLP_TARGETS)
        if a.cell.method == b.cell.method and has_same_conditions(a.cell, b.cell)
    ]
    if not pairs:
        return TARGETS.absent(
            "it takes a cell on attention and one on the MLP", "python -m lorabench +experiment=target_sweep"
        )
    a, b = min(pairs, key=lambda pair: parameter_gap(*pair))
    if parameter_gap(a, b) > MAX_PARAMETER_GAP:
        rank = round((a.cell.trainable or 0) / ((b.cell.trainable or 1) / (b.cell.r or 1)))
        said = f"{a.name} trains {a.cell.trainable or 0:,} parameters, {b.name} {b.cell.trainable or 0:,}"
        return TARGETS.needs(said, f"the MLP at r about {max(1, rank)}, for {a.name}")
    made = missing_tuning((a, b)) or e.difference(a, b)
    if isinstance(made, Missing):
        return TARGETS.lacks(made)
    way = estimates.direction(made, p=made.p_value(), lower_is_better=e.sweep.lower_is_better)
    status = decide(way == "worse", way == "better" or estimates.size(made, e.sweep.margin) == "within")
    reason = f"{a.name} minus {b.name}, {a.cell.trainable or 0:,} and {b.cell.trainable or 0:,} parameters"
    reason += _margin_note(e, status, way)
    return _metric_verdict(e, TARGETS, status, made, reason, 0.0)


def _cells_on(e: Evidence, named: Sequence[set[str]]) -> list[Result]:
    return [r for r in e.cells if r.cell.adapter and set(r.cell.targets.split("+")) in named]


# -- batch size ------------------------------------------------------------------------------------------------------

BATCH = Claim(
    "The gap of LoRA to full fine-tuning grows with the batch size at fixed examples, whatever the rank", REGRET
)


def gap_grows_with_batch(e: Evidence) -> Verdict:
    """(LoRA − full at the largest batch) − (the same at the smallest), at the largest rank that has all four cells."""
    four = max(_gap_pairs(e), key=lambda found: found[0].cell.r or 0, default=None)
    if four is None:
        settle = "LoRA and full fine-tuning at two batch sizes, task.train_examples unchanged, five rates each"
        return BATCH.absent("it takes LoRA and full fine-tuning at two batch sizes", settle)
    lora, _, small, _ = four
    seen = [n for r in four if (n := r.resource("examples")) is not None]
    if seen and max(seen) > 1.05 * min(seen):
        return BATCH.outside(
            "made at a fixed number of examples; here the larger batch also sees another number of them"
        )
    if lacking := missing_tuning(four):
        return BATCH.lacks(lacking)
    made = _gap_growth(four)
    if made is None or any(r.lost for r in four):
        return BATCH.needs(
            "not all four cells are confirmed with the same seeds",
            "three or more confirmation seeds, the same for all four",
        )
    estimate = made.estimate()
    if not estimate.allows_verdict:
        return BATCH.lacks(too_few_seeds(estimate.seeds))
    way = estimates.direction(estimate, p=estimate.p_value(), lower_is_better=e.sweep.lower_is_better)
    status = decide(way == "worse", way == "better" or estimates.size(estimate, e.sweep.margin) == "within")
    reason = (
        f"LoRA minus full fine-tuning at r = {lora.cell.r}, batch {_batch_size(lora)} minus batch {_batch_size(small)}"
    )
    reason += _margin_note(e, status, way)
    return _metric_verdict(e, BATCH, status, estimate, reason, 0.0)


def _gap_growth(four: Sequence[Result]) -> Sample | None:
    """A difference of two differences, seed by seed and example by example."""
    lora, full, small, small_full = (r.sample for r in four)
    if lora is None or full is None or small is None or small_full is None:
        return None
    large_gap, small_gap = scores.difference(lora, full), scores.difference(small, small_full)
    return scores.difference(large_gap, small_gap) if large_gap and small_gap else None


def _gap_pairs(e: Evidence) -> Iterator[tuple[Result, Result, Result, Result]]:
    """Return for each rank, set of targets and alpha: LoRA and full at the largest batch, the same two at the
    smallest."""
    found: dict[Any, list[tuple[Result, Result]]] = {}
    for r in e.cells:
        full = e.full(r.cell) if r.cell.method == LORA else None
        if full is not None and _batch_size(full) == _batch_size(r):
            found.setdefault((r.cell.r, r.cell.targets, r.cell.alpha_rule), []).append((r, full))
    for pairs in found.values():
        small, large = (f(pairs, key=lambda pair: _batch_size(pair[0])) for f in (min, max))
        if _batch_size(small[0]) < _batch_size(large[0]):
            yield (*large, *small)


def _batch_size(r: Result) -> int:
    """Examples an optimizer step sees."""
    trainer: dict[str, Any] = r.runs[0].config.get("trainer", {})
    return int(trainer.get("batch_size") or 0) * int(trainer.get("accumulate_grad_batches") or 1)


# -- methods and scale -----------------------------------------------------------------------------------------------

METHODS = Claim("Once rates are tuned, LoRA, DoRA, PiSSA and MiLoRA agree within 1 to 2 %", RATE_MATTERS)


FREE = Claim("The scale s and the learning rate are interchangeable: tuned results are equal across s", RATE_MATTERS)


BOUND = Claim("The scale s and the learning rate are not interchangeable: tuned results differ across s", HIDDEN_POWER)


def methods_agree(e: Evidence) -> Verdict:
    """All pairs of methods at one rank and on one set of targets, within the margin."""
    groups: dict[Any, dict[str, Result]] = {}
    for r in e.cells:
        if r.cell.method in VARIANTS:
            groups.setdefault((r.cell.r, r.cell.targets, r.cell.extra), {}).setdefault(r.cell.method, r)
    best = max(groups.values(), key=len, default={})
    if LORA not in best or len(best) < 2:
        return METHODS.absent(
            "it takes LoRA and another of these methods at one rank",
            f"{' and '.join(VARIANTS[:2])} at one rank and on the same targets, five rates each",
        )
    cells = list(best.values())
    return _within_margin(e, METHODS, cells, f"{', '.join(best)} at r = {cells[0].cell.r}", opposite=False)


def scale_is_free(e: Evidence) -> Verdict:
    return _across_scales(e, FREE, opposite=False)


def scale_is_bound(e: Evidence) -> Verdict:
    return _across_scales(e, BOUND, opposite=True)


def _across_scales(e: Evidence, claim: Claim, *, opposite: bool) -> Verdict:
    """All pairs of scales at the rank that has most of them, within the margin."""
    groups: dict[Any, dict[float, Result]] = {}
    for r in e.cells:
        s = scale(r.cell)
        if s is not None:
            groups.setdefault((r.cell.r, r.cell.targets, r.cell.extra), {}).setdefault(round(s, 6), r)
    best = max(groups.values(), key=len, default={})
    if len(best) < 2:
        return claim.absent(
            "it takes one rank at several scales", "one rank with alpha a factor of 4 apart, five rates each"
        )
    if max(best) < MIN_SCALE_RATIO * min(best):
        return claim.needs(f"s from {min(best):g} to {max(best):g} alone", "alpha a factor of 4 apart, five rates each")
    cells = [best[s] for s in sorted(best)]
    where = f"s = {', '.join(f'{s:.3g}' for s in sorted(best))} at r = {cells[0].cell.r} on {cells[0].cell.targets}"
    return _within_margin(e, claim, cells, where, opposite=opposite)


def _within_margin(e: Evidence, claim: Claim, cells: Sequence[Result], where: str, *, opposite: bool) -> Verdict:
    """Whether all pairs lie within the margin: shown for each pair, which needs no correction; one pair beyond it,
    which does."""
    if lacking := missing_tuning(cells):
        return claim.lacks(lacking)
    made: list[Estimate] = []
    for a, b in combinations(cells, 2):
        found = e.difference(a, b)
        if isinstance(found, Missing):
            return claim.lacks(found)
        made.append(found)
    margin, level = e.sweep.margin, 1 - 0.05 / len(made)
    beyond = any(x.interval(level)[0] > margin or x.interval(level)[1] < -margin for x in made)
    status = decide(all(estimates.size(x, margin) == "within" for x in made), beyond)
    widest = max(made, key=lambda x: max(map(abs, x.interval(0.90))))
    reason = f"{where}; the widest of {plural(len(made), 'pair')} against the margin of {_margin(e)}"
    return _metric_verdict(e, claim, negate(status) if opposite else status, widest, reason, margin)


def _margin_note(e: Evidence, status: Status, way: Direction) -> str:
    """Said where a difference of the claimed sign is not excluded, but one that matters is."""
    if status != "contradicted" or way == "better":
        return ""
    return f"; whichever its sign, shown to lie within the margin of {_margin(e)}"


def _margin(e: Evidence) -> str:
    declared = ", post hoc" if e.sweep.post_hoc else "" if e.sweep.study.get("margin") else ", not declared"
    return f"{e.metric.size(e.sweep.margin)}{declared}"


def _metric_verdict(e: Evidence, claim: Claim, status: Status, made: Estimate, reason: str, margin: float) -> Verdict:
    """margin: half the range the number was held against; 0 where only its sign was asked for."""
    low, high = made.interval()
    k = e.metric.scale
    said = e.metric.difference(made.mean, unit=True)
    settle = seeds_to_settle(made, -margin if margin else 0.0, margin or math.inf, "confirmation")
    return claim.verdict(status, said, (k * low, k * high), reason, settle)
