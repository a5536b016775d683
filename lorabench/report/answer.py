"""The findings in words: the answer, what supports it, and what a reader must not overlook."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorabench.config.method_names import FULL, HEAD_ONLY
from lorabench.config.overrides import flatten, override_value
from lorabench.report import declared
from lorabench.report.sections import conditions
from lorabench.report.tables import plus_minus
from lorabench.results import findings, formatting, unfinished
from lorabench.results.before_training import before_training
from lorabench.results.cells import Result
from lorabench.results.comparisons import Comparison
from lorabench.results.findings import Findings
from lorabench.results.formatting import MAX_NAMES, capital, name_some, plural
from lorabench.results.recommendation import Recommendation
from lorabench.results.tuning import unsettled_rate
from lorabench.stats import power

MAX_SEEDS_COUNTED = 200  # up to which the seeds that a verdict would take are counted
POWER = 0.8  # with which those seeds would give it
MAX_CELLS_ONE_BY_ONE = 3  # compared with the reference in a sentence each
MIN_COST_RATIO = 1.05  # of time or memory, above which a recommendation costs more than its reference
MIN_GAP = 1e-9  # to the margin, in the metric; nothing settles on which side a smaller one lies
METHOD_SETTINGS = ("r", "alpha", "target_modules", "use_rslora", "lr_ratio", "d_initial", "projection_key", "layers")


@dataclass(frozen=True)
class Answer:
    """What a report says at its top."""

    lead: str
    points: tuple[tuple[str, str], ...]  # (what it is about, sentence)
    command: str | None  # trains the recommended adapter, or what is missing
    does: str = "Train it"


def answer(f: Findings) -> Answer:
    """Return the answer that the findings allow."""
    if not f.confirmed:
        command = unfinished.continue_command(f.sweep) if unfinished.missing_runs(f) else None
        return Answer(_unconfirmed_lead(f), tuple(_validation_points(f)), command, "Go on with it")
    if baseline := findings.majority_baseline(f):
        label, share = baseline
        text = (
            f"Nothing was learned: no cell does better on test than always answering {label} "
            f"({f.metric.value(share, unit=True)}), so cells that agree show nothing. "
            "Train longer, at other rates or on more data."
        )
        return Answer(text, tuple(_points(f)), None)
    command = training_command(f, f.recommendation.cell) if f.recommendation and f.recommendation.cell else None
    return Answer(_lead(f), tuple(_points(f)), command)


def headline(f: Findings) -> str:
    """Return the lead as a terminal has it, with the command that settles what holds so far."""
    text = answer(f).lead
    settle = settling(f)
    return f"{text} {settle}" if settle and text.count("“So far”") else text


# -- the lead of a confirmed sweep -----------------------------------------------------------------------------------


def _lead(f: Findings) -> str:
    recommendation = f.recommendation
    if recommendation is None or recommendation.cell is None:
        return _lead_without_recommendation(f, recommendation)
    sentences = [_beaten_sentence(f, recommendation), _kept_sentence(f, recommendation)]
    sentences += [_cost_sentence(f, recommendation), _skipped_sentence(f, recommendation), _unsettled_sentence(f)]
    return " ".join(filter(None, sentences))


def _beaten_sentence(f: Findings, recommendation: Recommendation) -> str:
    """Return that a cell is better than the study's reference; empty where none is shown to be."""
    if recommendation.beaten is None:
        return ""
    better, reference = f.results[recommendation.reference], f.results[recommendation.beaten]
    comparison = f.versus[better.id]
    return (
        f"{capital(better.name)} is better than the reference, {reference.name}, "
        f"by {f.metric.size(comparison.estimate.mean)} ({score_text(f, better)}; "
        f"{_adjusted(comparison)}95 % interval {f.metric.bounds(*comparison.interval)})."
    )


def _kept_sentence(f: Findings, recommendation: Recommendation) -> str:
    margin = declared.margin(f)
    kept, reference = f.results[str(recommendation.cell)], f.results[recommendation.reference]
    name, score = kept.name, score_text(f, kept)
    so_far = "so far " if unsettled_cells(f) else ""
    if kept.id != reference.id:
        return capital(
            f"{so_far}{name} is enough: {score}, shown to fall short of {reference.name} by less than {margin}, "
            f"with {_parameter_share(kept, reference)} trainable parameters."
        )
    stopped = recommendation.stopped
    if stopped is None:
        among = "there is no smaller one here to set against it"
        return capital(f"{so_far}{name} reaches {score}; {among}{_others_within(f, margin)}.")
    smaller = f.results[stopped.cell].name
    if stopped.size == "beyond":
        return capital(
            f"{so_far}{name} is the one to keep ({score}): {smaller}, the next smaller one, "
            f"falls short of it by more than {margin}."
        )
    return capital(
        f"{so_far}not resolved how small it can be: none below {name} was shown to be within {margin} of it, "
        f"so it is the one to keep ({score})."
    )


def _cost_sentence(f: Findings, recommendation: Recommendation) -> str:
    """Return what the recommended cell costs more than the reference; empty where it costs no more."""
    kept, reference = f.results[str(recommendation.cell)], f.results[recommendation.reference]
    if kept.solo != reference.solo:
        return ""
    worse = []
    for what, a, b in (("time", kept.seconds, reference.seconds), ("memory", kept.memory, reference.memory)):
        if a and b and a > MIN_COST_RATIO * b:
            worse.append(f"{a / b:.1f} times the {what}")
    return f"It takes {' and '.join(worse)} of {reference.name}." if worse else ""


def _skipped_sentence(f: Findings, recommendation: Recommendation) -> str:
    """Return which smaller cells could not be tested, and why; empty where all were."""
    if not recommendation.skipped:
        return ""
    by_reason: dict[str, list[Result]] = {}
    for cell, reason in recommendation.skipped:
        by_reason.setdefault(reason, []).append(f.results[cell])
    said = (f"{unfinished.name_list(cells)} ({reason})" for reason, cells in by_reason.items())
    return f"Not tested: {'; '.join(said)}."


def unsettled_cells(f: Findings) -> dict[str, str]:
    """Return, by cell that the answer rests on, why its learning rate is not settled (`results.tuning`)."""
    recommendation = f.recommendation
    if recommendation is None:
        return {}
    stopped = recommendation.stopped.cell if recommendation.stopped else None
    cells = dict.fromkeys([recommendation.cell, stopped, recommendation.reference, recommendation.beaten])
    reasons = {c: unsettled_rate(f.sweep, f.results[c]) for c in cells if c is not None}
    return {c: reason for c, reason in reasons.items() if reason}


def _unsettled_sentence(f: Findings) -> str:
    """Return which compared cells have a learning rate that is not settled; empty where all are."""
    names = [f.results[c].name for c in unsettled_cells(f)]
    if not names:
        return ""
    said = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return f"“So far”, as the learning rate of {said} is not settled."


def settling(f: Findings) -> str:
    """Return why learning rates that the answer rests on are not settled, and the command that settles them."""
    reasons = unsettled_cells(f)
    if not reasons:
        return ""
    said = "; ".join(f"{f.results[c].name}: {reason}" for c, reason in reasons.items())
    return f"{said}. {_settling_command(f, list(reasons))}"


def _settling_command(f: Findings, cells: Sequence[str]) -> str:
    """Return how to settle the rates: wider grids where the best lies at an end, more tuning seeds where it is close.

    Runs of another tool are trained by no command of ours.
    """
    if any(x.provenance.get("adopted") for c in cells for x in f.results[c].runs):
        return "To settle them: more tuning seeds, and rates beyond an end, where these runs were trained"
    changes = []
    if any(f.results[c].choice.side for c in cells):
        changes.append(
            "sweep.prune=false" if any(f.results[c].choice.beyond for c in cells) else "sweep.extend_lr=true"
        )
    if any(not f.results[c].choice.side for c in cells):
        seeds = sorted({x.config["seed"] for c in cells for x in f.sweep.records_of(f.results[c].cell.tune)})
        fresh = [*seeds, *(n for n in range(MAX_SEEDS_COUNTED) if n not in seeds)][: len(seeds) + 2]
        changes.append(f"sweep.tune_seeds=[{','.join(map(str, fresh))}]")
    command = unfinished.continue_command(f.sweep, changes)
    return f"To settle them: {command or 'the same command with ' + ' '.join(changes)}"


def _lead_without_recommendation(f: Findings, recommendation: Recommendation | None) -> str:
    if recommendation and recommendation.passed and recommendation.skipped:
        reference = f.results[recommendation.reference]
        return (
            f"{capital(reference.name)} reaches {score_text(f, reference)}; "
            f"whether a smaller one would do gets no verdict. {_skipped_sentence(f, recommendation)}"
        )
    best = _best_on_validation(f)
    name, score = capital(best.name), score_text(f, best)
    if f.alone:
        return f"{name} reaches {score} on test; there is no other test result to set it against."
    text = f"{name} has the best {declared.selection(f.sweep)} and reaches {score} on test."
    if recommendation is not None and any(x.cell.adapter for x in f.results.values()):
        reference = f.results[recommendation.reference]
        text += f" No smaller one was shown to be within {declared.margin(f)} of {reference.name}."
    return " ".join(filter(None, (text, _unsettled_sentence(f))))


def _others_within(f: Findings, margin: str) -> str:
    """Return that every other cell does as well as the reference, as far as the margin tells; else nothing."""
    within = [f.results[c].name for c, x in f.versus.items() if x.size == "within" and not x.blocked]
    if not within or len(within) < len(f.versus):
        return ""
    names = " and ".join(within) if len(within) <= MAX_CELLS_ONE_BY_ONE else f"all {len(within)} other cells"
    return f", and {names} {'is' if len(within) == 1 else 'are'} within {margin} of it"


def score_text(f: Findings, r: Result) -> str:
    """Return `81.2 ± 0.4 % accuracy`, or `a loss of 2.909 ± 0.100 nats a token`."""
    if r.test is None:
        return f"{f.metric.value(r.val, unit=True)} {f.metric.title} on validation"
    number, unit = plus_minus(f, r), f.metric.measured_in
    if unit == f.metric.unit:
        return f"{number}{f' {unit}' if unit else ''} {f.metric.title}"
    return f"a {f.metric.title} of {number} {unit}"


def _best_on_validation(f: Findings) -> Result:
    """Return the adapter, else the cell, that is best on validation."""
    if f.best:
        return f.results[f.best]
    tested = [r for r in f.results.values() if r.test is not None and r.tuned is not None]
    return min(
        tested or f.results.values(),
        key=lambda r: (r.tuned if r.tuned is not None else float("inf"), r.id),
    )


def _parameter_share(small: Result, large: Result) -> str:
    a, b = small.cell.trainable, large.cell.trainable
    return f"{formatting.share(a, b)} of its" if a and b else "fewer"


# -- its points ------------------------------------------------------------------------------------------------------


def _points(f: Findings) -> Iterator[tuple[str, str]]:
    if settle := settling(f):
        yield "Learning rates", settle
    for method, about in ((HEAD_ONLY, "Against head-only"), (FULL, "Against full fine-tuning")):
        if comparison := f.controls.get(method):
            yield about, _comparison_sentence(f, comparison, f"{_contender(f)}, ")
    if (before := before_training(f)) is not None:
        unit = f" {f.metric.measured_in}" if f.metric.measured_in else ""
        yield "Before training", f"The base alone has a test {f.metric.title} of {f.metric.value(before)}{unit}."
    if steps := how_small(f):
        yield "How small", steps
    if by_condition := conditions.conditions(f):
        sentences = (f"At {c.name}: {conditions.verdict_sentence(f, c)}." for c in by_condition)
        yield "Under each condition", " ".join(sentences)
    if not f.controls:
        yield from _against_reference(f)


def _contender(f: Findings) -> str:
    """Return how the adapter came to be the one set against what has none."""
    return f"the best adapter by {declared.selection(f.sweep)} of the tuning runs" if f.best else "the reference"


def _against_reference(f: Findings) -> Iterator[tuple[str, str]]:
    """Yield a sentence for every cell while they are few, else one for all in groups."""
    if len(f.versus) <= MAX_CELLS_ONE_BY_ONE:
        yield from ((capital(f.results[x.cell].name), _comparison_sentence(f, x)) for x in f.versus.values())
        return
    words = {"better": "better", "worse": "worse", "not resolved": "not told apart from it"}
    groups = {way: [f.results[c].name for c, x in f.versus.items() if x.direction == way] for way in words}
    text = "; ".join(f"{words[way]}: {name_some(names)}" for way, names in groups.items() if names)
    yield f"Against {f.results[f.reference].name if f.reference else ''}", f"{capital(text)}."


def _comparison_sentence(f: Findings, comparison: Comparison, prefix: str = "") -> str:
    """Return direction and size of one difference, apart from each other."""
    name, other = f.results[comparison.cell].name, f.results[comparison.other].name
    subject = capital(f"{prefix}{name}," if prefix else name)
    bounds = f"({_adjusted(comparison)}95 % interval {f.metric.bounds(*comparison.interval)})"
    bounds = bounds if comparison.bounded else "(no interval)"
    mean = comparison.estimate.mean
    signed = f"{f.metric.difference(mean, unit=True)} {bounds}"
    if comparison.blocked:
        return f"{subject} against {other}: {signed}; no verdict ({comparison.blocked})."
    if comparison.direction == "not resolved":
        return f"{subject} and {other} are not told apart: {signed}; {margin_clause(f, comparison)}."
    text = f"{subject} is {f.metric.size(mean)} {comparison.direction} than {other} {bounds}"
    return f"{text}; {margin_clause(f, comparison)}."


def _adjusted(comparison: Comparison) -> str:
    return "exploratory, " if comparison.exploratory else "adjusted " if comparison.level > 0.95 else ""


def how_small(f: Findings) -> str:
    """Return which adapters passed the fixed sequence and what stopped it; empty where the lead says it."""
    recommendation = f.recommendation
    if recommendation is None or (recommendation.passed == (recommendation.reference,) and recommendation.cell is None):
        return ""
    clauses = []
    if steps := [c for c in recommendation.passed if c != recommendation.reference]:
        said = [f.results[c].name for c in steps]
        names = " and ".join(said) if len(said) <= MAX_NAMES + 1 else name_some(said)
        clauses.append(
            f"Tested from {f.results[recommendation.reference].name} down, {names} passed "
            f"(last: {_difference_90(f, (recommendation.tests or f.versus)[steps[-1]])})"
        )
    if stopped := recommendation.stopped:
        margin = f.sweep.margin
        not_inferior = (-math.inf, margin) if f.metric.lower_is_better else (-margin, math.inf)
        unsettled = seeds_clause(f, stopped, *not_inferior) if stopped.size == "not resolved" else ""
        measured = _difference_90(f, stopped) + unsettled
        clauses.append(
            f"{f.results[stopped.cell].name} was the first not shown to be within the margin "
            f"({stopped.blocked or measured}), and the test stops there"
        )
    return "; ".join(clauses) + "." if clauses else ""


def _difference_90(f: Findings, comparison: Comparison) -> str:
    """Return a difference with the 90 % interval of a one-sided test at 5 %."""
    e = comparison.estimate
    return f"{f.metric.difference(e.mean, unit=True)}, 90 % interval {f.metric.bounds(*e.interval(0.90))}"


def margin_clause(f: Findings, comparison: Comparison) -> str:
    """Return whether a difference is within the margin, and what would settle it where that is open."""
    margin = declared.margin(f)
    if comparison.size == "not resolved":
        settle = seeds_clause(f, comparison, -f.sweep.margin, f.sweep.margin)
        return f"whether that is within the margin of {margin} is not resolved{settle}"
    return f"that is {'within' if comparison.size == 'within' else 'more than'} the margin of {margin}"


def seeds_clause(f: Findings, comparison: Comparison, low: float, high: float) -> str:
    """Return what it would take to place an unresolved difference against a range; empty where nothing is known."""
    e = comparison.estimate
    if comparison.blocked or min(abs(e.mean - low), abs(e.mean - high)) < MIN_GAP or not e.seed:
        return ""
    seeds = power.seeds_to_settle(e, low, high, power=POWER, limit=MAX_SEEDS_COUNTED)
    if seeds is None and not power.seeds_can_settle(e, low, high, power=POWER):
        return ", and no number of seeds alone would settle it: it takes more test examples"
    count = f"more than {MAX_SEEDS_COUNTED} confirmation seeds"
    count = count if seeds is None else plural(max(seeds, e.seeds + 1), "confirmation seed")
    return f"; were that the true difference, {count} would settle it with {100 * POWER:.0f} % power"


# -- sweeps without a test result ------------------------------------------------------------------------------------


def _unconfirmed_lead(f: Findings) -> str:
    with_runs = [r for r in f.results.values() if r.runs]
    completed = sum(len(f.sweep.completed_records(r.cell.tune)) for r in f.results.values())
    if completed == 1 and len(with_runs) == 1:
        r = with_runs[0]
        return (
            f"One run: {r.name} at {formatting.rate(r.lr)} reaches {f.metric.value(r.val, unit=True)} {f.metric.title} "
            "on validation. One run compares nothing."
        )
    numbers = "so every number here is from validation and none is a test result."
    ended, planned = unfinished.tuning_progress(f.sweep)
    if ended < planned:
        runs = plural(planned, "tuning run")
        return f"No verdict yet: {ended} of {runs} have ended and nothing is confirmed, {numbers}"
    return f"No verdict yet. Tuning only: no confirmation run has finished, {numbers}"


def _validation_points(f: Findings) -> Iterator[tuple[str, str]]:
    scores = list(_validation_scores(f))
    if len(scores) > 1:
        yield (
            "On validation",
            f"{capital('; '.join(scores))} {f.metric.title}. The seeds that chose these rates measured them, "
            "so they are too good, most where more rates were tried.",
        )
    if gaps := unfinished.missing_runs(f):
        yield "Missing", f"{capital(gaps)}. After them confirmation runs with fresh seeds, which alone see test."
        yield "To go on", f"{capital(unfinished.HOW_TO_CONTINUE)}."
        return
    yield (
        "To confirm",
        "Run the same command with fresh seeds, e.g. sweep.confirm_seeds=[100,101,102]: "
        "they train at the chosen rates, and they alone see test.",
    )


def _validation_scores(f: Findings) -> Iterator[str]:
    """Yield the best adapter's score and those of the controls."""
    if f.best:
        best = f.results[f.best]
        score = f.metric.value(best.val, unit=True)
        yield f"best adapter {best.name} at {formatting.rate(best.lr)}: {score}"
    for method in (HEAD_ONLY, FULL):
        control = next((r for r in f.results.values() if r.cell.method == method and r.runs), None)
        if control:
            yield f"{control.name}: {f.metric.value(control.val, unit=True)}"


# -- the command -----------------------------------------------------------------------------------------------------


def training_command(f: Findings, cell: str) -> str | None:
    """Return the command that trains a cell at its chosen rate.

    It is as its runs were asked for, where the manifest says how. None for a cell that was trained elsewhere, on what
    no command of ours names.
    """
    r = f.results[cell]
    first = r.runs[0]
    if first.provenance.get("adopted"):
        return None
    experiment = f.sweep.manifest.get("experiment")
    words = ["python", "-m", "lorabench"]
    place = ["hydra.mode=RUN", f"sweep.name={f.sweep.name}-chosen"] if experiment else []
    if asked := f.sweep.manifest.get("runs", {}).get(first.run_id, {}).get("asked"):
        return shlex.join([*words, *asked, *place, f"optimizer.lr={override_value(r.lr)}"])
    words += [f"+experiment={experiment}", *place] if experiment else []
    settings = {**_cell_settings(r, first.config), "optimizer.lr": r.lr}
    words += [f"{k}={override_value(v)}" for k, v in settings.items()]
    return " ".join(shlex.quote(w) for w in words)


def _cell_settings(r: Result, config: Mapping[str, Any]) -> dict[str, Any]:
    method = config["method"]
    settings = {"method": method["name"]}
    settings |= {f"method.{k}": method[k] for k in METHOD_SETTINGS if method.get(k) not in (None, False)}
    flat = dict(flatten(config))
    return settings | {k: flat[k] for k, _ in r.cell.extra if k in flat and k not in settings}
