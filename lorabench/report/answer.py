"""The findings in words: the answer, what supports it, and what a reader must not overlook."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorabench.config.method_names import FULL, HEAD_ONLY
from lorabench.config.overrides import flatten, override_value
from lorabench.report import declared
from lorabench.report.sections import conditions
from lorabench.results import findings, formatting, unfinished
from lorabench.results.cells import Result
from lorabench.results.findings import Comparison, Findings
from lorabench.results.formatting import plural
from lorabench.stats import estimates

MAX_SEEDS_COUNTED = 200  # up to which they are counted


@dataclass(frozen=True)
class Answer:
    lead: str
    points: tuple[tuple[str, str], ...]  # (what it is about, sentence)
    command: str | None  # trains the recommended adapter, or what is missing
    does: str = "Train it"


def answer(f: Findings) -> Answer:
    if not f.confirmed:
        command = unfinished.continue_command(f.sweep) if unfinished.missing_runs(f) else None
        return Answer(_unconfirmed(f), tuple(_validation(f)), command, "Go on with it")
    if chance := findings.majority_baseline(f):
        text = f"Nothing was learned: no cell does better on test than always answering {chance[0]} ({f.metric.value(chance[1], unit=True)}), so cells that agree show nothing. Train longer, at other rates or on more data."
        return Answer(text, tuple(_points(f)), None)
    command = _command(f, f.recommendation.cell) if f.recommendation and f.recommendation.cell else None
    return Answer(_lead(f), tuple(_points(f)), command)


# -- confirmed sweeps ----------------------------------------------------------------------------------------------------


def _lead(f: Findings) -> str:
    rec = f.recommendation
    margin = declared.margin(f)
    if rec and rec.cell is None and rec.passed and rec.stopped:
        best = f.results[rec.reference]
        return f"{formatting.capital(best.name)} reaches {_score(f, best)}; whether a smaller adapter would do gets no verdict ({rec.stopped.blocked})."
    if rec is None or rec.cell is None:
        best = _leader(f)
        if f.alone:
            return f"{formatting.capital(best.name)} reaches {_score(f, best)} on test; there is no other test result to set it against."
        text = f"{formatting.capital(best.name)} has the best {declared.selection(f.sweep)} and reaches {_score(f, best)} on test."
        if rec is not None:
            none = not any(x.cell.adapter for x in f.results.values())
            text += "" if none else f" No adapter was shown to be within {margin} of {f.results[rec.reference].name}."
        return text
    r, ref = f.results[rec.cell], f.results[rec.reference]
    if rec.cell != rec.reference:
        text = f"{formatting.capital(r.name)} is enough: {_score(f, r)}, shown to fall short of {ref.name} by less than {margin}"
        return text + f", with {_fraction(r, ref)} trainable parameters."
    if rec.stopped is None:
        why = "no smaller one has confirmation seeds and test examples in common with it, so none was set against it"
        why = why if rec.skipped else f"there is no smaller adapter here to set against it{_level(f, margin)}"
        return f"{formatting.capital(r.name)} reaches {_score(f, r)}; {why}."
    if rec.stopped.size == "beyond":
        small = f.results[rec.stopped.cell]
        return f"{formatting.capital(r.name)} is the one to keep ({_score(f, r)}): {small.name}, the next smaller one, falls short of it by more than {margin}."
    text = f"Not resolved how small an adapter can be: none below {r.name} was shown to be within {margin} of it, so it is the one to keep"
    return f"{text} ({_score(f, r)})."


def _level(f: Findings, margin: str) -> str:
    """That every other cell does as well as the reference, as far as the margin tells: the answer to where adapters go."""
    near = [f.results[c].name for c, made in f.versus.items() if made.size == "within" and not made.blocked]
    if not near or len(near) < len(f.versus):
        return ""
    who = " and ".join(near) if len(near) <= 3 else f"all {len(near)} other cells"
    return f", and {who} {'is' if len(near) == 1 else 'are'} within {margin} of it"


def _points(f: Findings) -> Iterator[tuple[str, str]]:
    for method, about in ((HEAD_ONLY, "Against head-only"), (FULL, "Against full fine-tuning")):
        if made := f.controls.get(method):
            yield about, _sentence(f, made, f"the best adapter on {declared.selection(f.sweep)}, ")
    yield from _how_small(f)
    if found := conditions.conditions(f):
        yield "Under each condition", " ".join(f"At {c.name}: {conditions.verdict_sentence(f, c)}." for c in found)
    if not f.controls:
        yield from _against_reference(f)


def _against_reference(f: Findings) -> Iterator[tuple[str, str]]:
    """Every cell in a sentence while they are few, else in groups."""
    if len(f.versus) <= 3:
        yield from ((formatting.capital(f.results[made.cell].name), _sentence(f, made)) for made in f.versus.values())
        return
    ways = {"better": "better", "worse": "worse", "not resolved": "not told apart from it"}
    groups = {way: [f.results[c].name for c, made in f.versus.items() if made.direction == way] for way in ways}
    text = "; ".join(f"{ways[way]}: {', '.join(names)}" for way, names in groups.items() if names)
    yield f"Against {f.results[f.reference].name if f.reference else ''}", f"{formatting.capital(text)}."


def _sentence(f: Findings, made: Comparison, prefix: str = "") -> str:
    """Direction and size of one difference, apart from each other."""
    name, other = f.results[made.cell].name, f.results[made.other].name
    subject = f"{prefix}{name}," if prefix else name
    adjusted = "exploratory, " if made.exploratory else "adjusted " if made.level > 0.95 else ""
    bounds = f"({adjusted}95 % interval {f.metric.bounds(*made.interval)})" if made.bounded else "(no interval)"
    signed = f"{f.metric.difference(made.estimate.mean, unit=True)} {bounds}"
    if made.blocked:
        return f"{formatting.capital(subject)} against {other}: {signed}; no verdict ({made.blocked})."
    if made.direction == "not resolved":
        return f"{formatting.capital(subject)} and {other} are not told apart: {signed}; {_margin_words(f, made)}."
    text = f"{subject} is {f.metric.size(made.estimate.mean)} {made.direction} than {other} {bounds}"
    return f"{formatting.capital(text)}; {_margin_words(f, made)}."


def _how_small(f: Findings) -> Iterator[tuple[str, str]]:
    rec = f.recommendation
    if rec is None or rec.passed == (rec.reference,) and rec.cell is None:  # the lead says it
        return
    steps = [c for c in rec.passed if c != rec.reference]
    said = []
    if steps:
        made = f.versus[steps[-1]]
        low, high = made.estimate.interval(0.90)
        names = " and ".join(f.results[c].name for c in steps)
        said.append(f"Tested from {f.results[rec.reference].name} down, {names} passed (last: {f.metric.difference(made.estimate.mean, unit=True)}, "
                    f"90 % interval {f.metric.bounds(low, high)})")  # fmt: skip
    if rec.stopped:
        e = rec.stopped.estimate
        low, high = e.interval(0.90)
        short = e.mean if f.metric.lower_is_better else -e.mean  # by so much it falls short
        why = rec.stopped.blocked or (
            f"{f.metric.difference(e.mean, unit=True)}, 90 % interval {f.metric.bounds(low, high)}{_settle(f, rec.stopped, abs(f.sweep.margin - short))}"
        )
        said.append(
            f"{f.results[rec.stopped.cell].name} was the first not shown to be within the margin ({why}), and the test stops there"
        )
    if said:
        yield "How small", "; ".join(said) + "."


def _margin_words(f: Findings, made: Comparison) -> str:
    margin = declared.margin(f)
    if made.size == "not resolved":
        return f"whether that is within the margin of {margin} is not resolved{_settle(f, made, abs(f.sweep.margin - abs(made.estimate.mean)))}"
    return f"that is {'within' if made.size == 'within' else 'more than'} the margin of {margin}"


def _settle(f: Findings, made: Comparison, gap: float) -> str:
    """What it would take to place an unresolved difference against the margin, which lies a gap away from it."""
    if made.blocked or made.size != "not resolved" or gap < 1e-9:
        return ""
    seeds = estimates.seeds_needed(made.estimate, gap, limit=MAX_SEEDS_COUNTED)
    if seeds is None and estimates.least_half_width(made.estimate) >= gap:
        return ", and no number of seeds alone would settle it: it takes more test examples"
    if seeds is None:
        return f"; if the difference stays as it is, more than {MAX_SEEDS_COUNTED} confirmation seeds would settle it"
    return (
        f"; if the difference stays as it is, about {plural(seeds, 'confirmation seed')} would settle it"
        if seeds > made.estimate.seeds
        else ""
    )


def _score(f: Findings, r: Result) -> str:
    if r.test is None:
        return f"{f.metric.value(r.val, unit=True)} {f.metric.title} on validation"
    half = f" ± {f.metric.size(r.test.half_width(), unit=False)}" if r.test.seeds > 1 else ""
    number, unit = f"{f.metric.value(r.test.mean)}{half}", f.metric.measured_in
    if unit == f.metric.unit:
        return f"{number}{f' {unit}' if unit else ''} {f.metric.title}"
    return f"a {f.metric.title} of {number} {unit}"  # of 2.909 ± 0.100 nats a token


def _leader(f: Findings) -> Result:
    """The adapter, else the cell, that is best on validation."""
    if f.best:
        return f.results[f.best]
    found = [r for r in f.results.values() if r.test is not None and r.val_selection is not None]
    return min(
        found or f.results.values(),
        key=lambda r: (r.val_selection if r.val_selection is not None else float("inf"), r.id),
    )


def _fraction(small: Result, large: Result) -> str:
    a, b = small.cell.trainable, large.cell.trainable
    return f"{formatting.share(a, b)} of its" if a and b else "fewer"


# -- sweeps without a test result ----------------------------------------------------------------------------------------


def _unconfirmed(f: Findings) -> str:
    done = [r for r in f.results.values() if r.runs]
    if sum(len(f.sweep.completed_records(r.cell.tune)) for r in f.results.values()) == 1 and len(done) == 1:
        r = done[0]
        return f"One run: {r.name} at {formatting.rate(r.lr)} reaches {f.metric.value(r.val, unit=True)} {f.metric.title} on validation. One run compares nothing."
    ended, planned = unfinished.tuning_progress(f.sweep)
    if ended < planned:
        return f"No verdict yet: {ended} of {plural(planned, 'tuning run')} have ended and nothing is confirmed, so every number here is from validation and none is a test result."
    return "No verdict yet. Tuning only: no confirmation run has finished, so every number here is from validation and none is a test result."


def _validation(f: Findings) -> Iterator[tuple[str, str]]:
    named = [(f.best, "Best adapter")]
    named += [(next((r.id for r in f.results.values() if r.cell.method == m and r.runs), None), a)
              for m, a in ((HEAD_ONLY, "Head-only"), (FULL, "Full fine-tuning"))]  # fmt: skip
    said = [f"{about.lower()} {f.results[i].name} at {formatting.rate(f.results[i].lr)}: {f.metric.value(f.results[i].val, unit=True)}"
            if about == "Best adapter" else f"{f.results[i].name}: {f.metric.value(f.results[i].val, unit=True)}"
            for i, about in named if i]  # fmt: skip
    if len(said) > 1:
        text = f"{formatting.capital('; '.join(said))} {f.metric.title}. The seeds that chose these rates measured them, so they are too good, most where more rates were tried."
        yield "On validation", text
    if gaps := unfinished.missing_runs(f):
        yield (
            "Missing",
            f"{formatting.capital(gaps)}. After them confirmation runs with fresh seeds, which alone see test.",
        )
        yield "To go on", f"{formatting.capital(unfinished.HOW_TO_CONTINUE)}."
        return
    yield (
        "To confirm",
        "Run the same command with fresh seeds, e.g. sweep.confirm_seeds=[100,101,102]: they train at the chosen rates, and they alone see test.",
    )


# -- the command ---------------------------------------------------------------------------------------------------------


def _command(f: Findings, cell: str) -> str | None:
    """Hydra overrides that train this cell at its chosen rate: as its runs were asked for, where the manifest says how."""
    r = f.results[cell]
    if r.runs[0].provenance.get("adopted"):
        return None  # trained elsewhere, on what no command of ours names
    config: Mapping[str, Any] = r.runs[0].config
    experiment = f.sweep.manifest.get("experiment")
    words = ["python", "-m", "lorabench"]
    place = ["hydra.mode=RUN", f"sweep.name={f.sweep.name}-chosen"] if experiment else []
    if asked := f.sweep.manifest.get("runs", {}).get(r.runs[0].run_id, {}).get("asked"):
        return shlex.join([*words, *asked, *place, f"optimizer.lr={override_value(r.lr)}"])
    words += [f"+experiment={experiment}", *place] if experiment else []
    method = config["method"]
    settings = {"method": method["name"]}
    settings |= {
        f"method.{k}": method[k]
        for k in ("r", "alpha", "target_modules", "use_rslora", "lr_ratio", "d_initial", "projection_key", "layers")
        if method.get(k) not in (None, False)
    }
    flat = dict(flatten(config))
    settings |= {k: flat[k] for k, _ in r.cell.extra if k in flat and k not in settings}
    words += [f"{k}={override_value(v)}" for k, v in {**settings, "optimizer.lr": r.lr}.items()]
    return " ".join(shlex.quote(w) for w in words)
