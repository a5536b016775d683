"""Tables as rows of text: the comparison, the learning rates, runs that were lost, records that no cell lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lorabench.config import alpha_rules
from lorabench.report import declared
from lorabench.results import formatting, scores
from lorabench.results.cells import Result, has_same_runs
from lorabench.results.comparisons import Comparison
from lorabench.results.findings import Findings
from lorabench.results.selection import Rate
from lorabench.store.records import Record

Align = Literal["left", "right"]
MAX_ERROR_LENGTH = 160  # characters


@dataclass(frozen=True)
class Column:
    """One column. key: its CSS class on the page and what a row's texts are found by."""

    key: str
    title: str
    align: Align = "left"


@dataclass(frozen=True)
class Row:
    """One row: its texts, the run_ids its numbers come from, a mark for the eye, an interval to draw."""

    texts: tuple[str, ...]
    runs: tuple[str, ...] = ()
    mark: str = ""  # recommended, reference, lost, chosen
    interval: tuple[float, float, float] | None = None  # low, mean, high


@dataclass(frozen=True)
class Table:
    """A table as text. Its key names its files; notes stand below it."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())


def main_tables(f: Findings) -> dict[str, Table]:
    """Return the tables of this module that have rows, by key."""
    tables = (comparison(f), rates(f), lost_runs(f), unlisted_runs(f))
    return {t.key: t for t in tables if t.rows}


# -- texts that several tables have ----------------------------------------------------------------------------------


def plus_minus(f: Findings, r: Result) -> str:
    """Return the test metric with half its 95 % interval, or both ends (`scores.with_interval`)."""
    return formatting.DASH if r.test is None else scores.with_interval(f.metric, r.test)


def metric_title(f: Findings, split: str) -> str:
    """Return a column's title, such as `test accuracy (%)`."""
    return f"{split} {f.metric.title}{unit_suffix(f.metric)}"


def unit_suffix(metric: formatting.Metric) -> str:
    """Return ` (%)` for the head of a column; empty where a metric has no unit."""
    return f" ({metric.measured_in})" if metric.measured_in else ""


def run_ids(r: Result) -> tuple[str, ...]:
    """Return the runs behind a cell's numbers."""
    return tuple(x.run_id for x in r.runs)


def step_list(steps: Iterable[int]) -> str:
    """Return `50`, or `20 and 25` where seeds or rates left at different steps."""
    return " and ".join(str(s) if s else formatting.DASH for s in sorted(set(steps)))


def error_summary(error: str | None) -> str:
    """Return the first line of an error, without the folders of the machine it came from."""
    first = (error or "").strip().splitlines()[:1]
    text = re.sub(r"(?:[A-Za-z]:)?(?:[\\/][^\s'\"\\/:,]+)+[\\/]([^\s'\"\\/:,]+)", r"…/\1", first[0] if first else "")
    return text if len(text) <= MAX_ERROR_LENGTH else text[: MAX_ERROR_LENGTH - 1] + "…"


# -- the comparison --------------------------------------------------------------------------------------------------


def comparison(f: Findings) -> Table:
    """Return one row a cell: what it is, how well it does, how it stands to the reference, and what it costs."""
    solo_flags = [r.solo for r in f.results.values() if r.runs]
    solo = 2 * sum(solo_flags) > len(solo_flags)  # the head says what most cells are; the others say it themselves
    columns = (
        Column("method", "method"),
        Column("r", "r", "right"),
        Column("alpha", "α", "right"),
        Column("targets", "targets"),
        *(Column(k, k.split(".")[-1]) for k in sorted({k for r in f.results.values() for k, _ in r.cell.extra})),
        Column("lr", "best lr", "right"),
        *_outcome_columns(f),
        Column("trainable", "trainable (of base)", "right"),
        Column("seconds", "train s (solo)" if solo else "train s (pack share)", "right"),
        Column("memory", "memory (solo peak)" if solo else "memory (pack peak)", "right"),
    )
    rows = tuple(_comparison_row(f, r, [c.key for c in columns], solo) for r in f.results.values())
    return Table("comparison", "Comparison", columns, rows, tuple(_comparison_notes(f)))


def _outcome_columns(f: Findings) -> Iterator[Column]:
    if f.confirmed:
        seeds = {r.test.seeds for r in f.results.values() if r.test}
        count = f", {formatting.plural(next(iter(seeds)), 'seed')}" if len(seeds) == 1 else ""
        yield Column("test", metric_title(f, "test") + count, "right")
        if len(seeds) > 1:
            yield Column("seeds", "seeds", "right")
    if f.versus and f.reference:
        yield Column("difference", "Δ to reference (95 %)", "right")
        yield Column("direction", "direction")
        yield Column("size", f"margin ± {declared.margin(f)}")
        if f.recommendation is not None:
            yield Column("enough", "not worse by the margin")
    yield Column("val", metric_title(f, "val"), "right")


def _comparison_row(f: Findings, r: Result, keys: Sequence[str], solo: bool) -> Row:
    cell, test = r.cell, r.test
    mixed = "" if r.solo == solo or not r.runs else " solo" if r.solo else " (pack)"
    share = formatting.share(cell.trainable, r.resource("total_parameters"))
    of_base = "" if share == formatting.DASH else f" ({share})"
    texts = {
        "method": cell.method,
        "r": str(cell.r) if cell.adapter else formatting.DASH,
        "alpha": _alpha(r),
        "targets": cell.targets or formatting.DASH,
        "lr": formatting.rate(r.lr) + (" ⚠" if r.choice.edge else ""),
        "seeds": str(test.seeds) if test else formatting.DASH,
        "test": plus_minus(f, r),
        "val": f.metric.value(r.val),
        "trainable": formatting.count(cell.trainable) + of_base,
        "seconds": formatting.seconds(r.seconds) + mixed,
        "memory": formatting.memory(r.memory) + mixed,
        **dict(cell.extra),
        **_verdict_texts(f, r),
        "enough": _sequence_text(f, r),
    }
    recommended = f.recommendation is not None and f.recommendation.cell == r.id
    mark = "recommended" if recommended else "reference" if r.id == f.reference and f.versus else ""
    low, high = scores.interval(f.metric, test) if test else (0.0, 0.0)
    interval = (low, test.mean, high) if test and test.seeds > 1 else None
    return Row(tuple(texts.get(k, formatting.DASH) for k in keys), run_ids(r), mark, interval)


def _alpha(r: Result) -> str:
    """Return alpha, and the rule it came from where that is not the number itself."""
    cell = r.cell
    if not cell.adapter or cell.alpha is None:
        return formatting.DASH
    value, rule = f"{cell.alpha:.4g}", alpha_rules.without_scaling(cell.alpha_rule)  # rsLoRA's name says that part
    return f"{value} ({rule})" if alpha_rules.is_multiple_of_rank(rule) else value


def _verdict_texts(f: Findings, r: Result) -> dict[str, str]:
    if r.id == f.reference:
        return {"difference": "reference", "direction": "", "size": ""}
    comparison = f.versus.get(r.id)
    if comparison is None:
        twin = f.reference is not None and has_same_runs(r, f.results[f.reference])
        return {"difference": "the reference's runs"} if twin else {}
    bounds = f" ({f.metric.bounds(*comparison.interval)})" if comparison.bounded else ""
    direction = _verdict(comparison, comparison.direction)
    exploratory = " (exploratory)" if comparison.exploratory and not comparison.blocked else ""
    return {
        "difference": f.metric.difference(comparison.estimate.mean) + bounds,
        "direction": direction + exploratory,
        "size": _verdict(comparison, comparison.size),
    }


def _sequence_text(f: Findings, r: Result) -> str:
    """Return the test of the fixed sequence that the recommendation rests on, with its 90 % interval."""
    recommendation = f.recommendation
    if recommendation is None or r.id == recommendation.reference:
        return ""
    test = (recommendation.tests or {}).get(r.id)
    if test is None:
        return "no verdict" if r.id in dict(recommendation.skipped) else formatting.DASH
    bounds = f.metric.bounds(*test.estimate.interval(0.90))
    return f"{'shown' if r.id in recommendation.passed else 'not shown'} ({bounds})"


def _verdict(comparison: Comparison, verdict: str) -> str:
    return "no verdict" if comparison.blocked else verdict


def _comparison_notes(f: Findings) -> Iterator[str]:
    yield from _interval_notes(f)
    yield from _margin_notes(f)
    yield from _cost_notes(f)
    if any(r.choice.edge for r in f.results.values()):
        pruned = any(r.choice.beyond for r in f.results.values())
        yield f"⚠ the best rate is at an end of its grid{', not counting pruned rates' if pruned else ''}."


def _interval_notes(f: Findings) -> Iterator[str]:
    tests = [r.test for r in f.results.values() if r.test is not None]
    if tests:
        counts = sorted({e.examples for e in tests if e.examples})
        examples = " or ".join(f"{n:,}" for n in counts)
        groups = sorted({n for r in f.results.values() if r.sample and (n := r.sample.clusters)})
        grouped = f" in {' or '.join(f'{n:,}' for n in groups)} groups (dialogues, near-duplicates)" if groups else ""
        over = f"seeds and {examples} test examples{grouped}, crossed" if counts else "seeds alone"
        yield (
            f"±: half the 95 % interval over {over}. Rates were chosen on {declared.selection(f.sweep)}; "
            "only confirmation runs saw test."
        )
    if scatter := {id(s): s for s in f.measured.scatter.values()}.values():
        sds = " or ".join(f.metric.size(s.typical.within**0.5) for s in scatter)
        yield (
            f"A seed's standard deviation that is typical of these adapters under one condition: {sds}. "
            "It counts as one seed more, but not where a cell or difference scatters more than that."
        )


def _margin_notes(f: Findings) -> Iterator[str]:
    if f.versus and f.reference:
        family = sum(not x.exploratory for x in f.versus.values())
        others = len(f.versus) - family
        subject = "The other one is" if others == 1 else f"The {others} others are"
        rest = f" {subject} exploratory: 95 % each, not adjusted." if others else ""
        yield (
            f"Direction and its interval are adjusted by Holm's steps within the {formatting.plural(family, 'comparison')} with "
            f"{declared.reference(f)}.{rest} "
            "Margin: two one-sided tests at 5 %, apart from the direction. “Not resolved” is not “equal”."
        )
    if recommendation := f.recommendation:
        yield (
            f"Not worse by the margin: the tests that the recommendation rests on, against "
            f"{f.results[recommendation.reference].name}, from the largest cell down, "
            "one of each size (chosen by the tuning runs), each one-sided at 5 % (90 % interval), "
            "until the first that is not shown; a dash was not reached."
        )
    if anchor := declared.anchor(f.sweep):
        yield f"The alpha rules meet at {anchor}: there they are one point, and one cell stands for all of them."


def _cost_notes(f: Findings) -> Iterator[str]:
    if any(r.timed.get("seconds") for r in f.results.values()):
        once = any(r.timed.get("trunk_seconds") for r in f.results.values())
        trunk = ", with the one pass that the frozen blocks below the adapters take" if once else ""
        yield (
            "Solo: a few steps of the cell alone on the base, "
            f"their time scaled to the tokens of a run{trunk}; pack totals stand in the budget."
        )
    if stale := [r.name for r in f.results.values() if r.cell.solo and not r.timed]:
        yield (
            f"No seconds and memory of a run alone for {', '.join(stale)}: "
            "an older version measured them with the frozen blocks computed anew in every step, "
            "which runs of today do not do. The command that made the sweep measures them again."
        )
    if any(not r.solo for r in f.results.values() if r.runs):
        yield (
            "Pack: these runs trained side by side on one base. "
            "Time is the pack's divided by its runs, memory the pack's peak; neither is a cell's own."
        )


# -- learning rates --------------------------------------------------------------------------------------------------

PRUNED_NOTE = (
    "Pruned rates were behind inside their cell at that step "
    "(not before half of the steps; the best rate so far and its neighbours go on) "
    "and were not trained further: they have no loss to compare, are not eligible, and do not bound a grid."
)


def rates(f: Findings) -> Table:
    """Return every learning rate of every cell: its mean loss, its seeds, and whether it was chosen."""
    by_loss = f.sweep.selection == "loss"
    score_title = f"mean {declared.selection(f.sweep).replace('validation', 'val')}"
    columns = (
        Column("cell", "cell"),
        Column("lr", "lr", "right"),
        Column("loss", "mean val loss", "right"),
        *([] if by_loss else [Column("score", score_title, "right")]),
        Column("seeds", "seeds done", "right"),
        Column("lost", "diverged or failed", "right"),
        Column("mark", ""),
    )
    rows = tuple(_rate_row(r, x, by_loss=by_loss) for r in f.results.values() for x in r.choice.rates)
    notes = ["A rate at which any seed diverged or failed is not eligible. Ties go to the smaller rate."]
    if any(x.pruned for r in f.results.values() for x in r.choice.rates):
        notes.append(PRUNED_NOTE)
    return Table("rates", "Learning rates", columns, rows, tuple(notes))


def _rate_row(r: Result, rate: Rate, *, by_loss: bool) -> Row:
    chosen = rate.lr == r.choice.lr
    texts = (
        r.name,
        formatting.rate(rate.lr),
        formatting.number(None if rate.pruned else rate.mean, 4),
        *([] if by_loss else [formatting.number(None if rate.pruned else rate.score, 4)]),
        f"{len(rate.losses)} of {rate.seeds}",
        str(rate.failures or ""),
        _rate_mark(r, rate),
    )
    return Row(texts, mark="chosen" if chosen else "lost" if rate.failures else "")


def _rate_mark(r: Result, rate: Rate) -> str:
    if rate.lr == r.choice.lr:
        return "chosen, at the edge" if r.choice.edge else "chosen"
    if rate.failures:
        return "ineligible"
    if rate.unmeasured:
        return "not measured"
    if rate.pruned:
        return f"pruned at step {step_list(rate.pruned)}"
    return "incomplete" if rate.missing else ""


# -- lost and unlisted runs ------------------------------------------------------------------------------------------


def lost_runs(f: Findings) -> Table:
    """Return the runs that failed, diverged or were pruned."""
    rows = [
        Row((r.name, *_run_texts(x), _loss_reason(x), x.run_id), (x.run_id,), "lost")
        for r in f.results.values()
        for x in sorted(f.sweep.records_of((*r.cell.tune, *r.cell.confirm)), key=lambda x: x.run_id)
        if x.status != "completed"
    ]
    columns = _run_columns("cell", "role", "lr", "seed", "status", "why", "run")
    return Table("lost", "Runs that failed, diverged or were pruned", columns, tuple(rows))


def unlisted_runs(f: Findings) -> Table:
    """Return the records of the sweep's directory that its manifest does not list."""
    rows = [Row((x.run_id, str(x.config["method"]["name"]), *_run_texts(x)), (x.run_id,)) for x in f.sweep.outside]
    columns = _run_columns("run", "method", "role", "lr", "seed", "status")
    note = "They are in the sweep's directory, but no cell lists them: no number above uses them."
    return Table("outside", "Records outside the manifest", columns, tuple(rows), (note,))


def _run_columns(*keys: str) -> tuple[Column, ...]:
    return tuple(Column(k, k, "right" if k in ("lr", "seed") else "left") for k in keys)


def _run_texts(record: Record) -> tuple[str, str, str, str]:
    """Return role, rate, seed and status."""
    config = record.config
    return record.role, formatting.rate(config["optimizer"]["lr"]), str(config["seed"]), record.status


def _loss_reason(record: Record) -> str:
    """Return a record's error, or for a pruned run without one the step at which it left."""
    step = record.metrics.get("pruned_step")
    return error_summary(record.error) or (f"pruned at step {step}" if record.status == "pruned" and step else "")
