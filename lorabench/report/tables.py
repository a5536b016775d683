"""Tables as rows of text, and their faces: Markdown, LaTeX, terminal, CSV. The page's own template makes the HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lorabench.config import alpha_rules
from lorabench.report import declared
from lorabench.results import formatting
from lorabench.results.cells import Result, has_same_runs
from lorabench.results.findings import Comparison, Findings
from lorabench.store.records import Record

if TYPE_CHECKING:
    pass

Align = Literal["left", "right"]


@dataclass(frozen=True)
class Column:
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
    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())


def main_tables(f: Findings) -> dict[str, Table]:
    """All tables that have rows, by key."""
    made = (comparison(f), rates(f), lost_runs(f), unlisted_runs(f))
    return {t.key: t for t in made if t.rows}


# -- the comparison ------------------------------------------------------------------------------------------------------


def comparison(f: Findings) -> Table:
    """One row a cell: what it is, how well it does, how it stands to the reference, and what it costs."""
    alone = [r.solo for r in f.results.values() if r.runs]
    solo = 2 * sum(alone) > len(alone)  # what most cells are stands in the head, the others say it themselves
    columns = (
        Column("method", "method"), Column("r", "r", "right"), Column("alpha", "α", "right"), Column("targets", "targets"),
        *(Column(k, k.split(".")[-1]) for k in sorted({k for r in f.results.values() for k, _ in r.cell.extra})),
        Column("lr", "best lr", "right"), *_outcomes(f), Column("trainable", "trainable (of base)", "right"),
        Column("seconds", "train s (solo)" if solo else "train s (pack share)", "right"),
        Column("memory", "memory (solo peak)" if solo else "memory (pack peak)", "right"),
    )  # fmt: skip
    rows = tuple(_comparison_row(f, r, [c.key for c in columns], solo) for r in f.results.values())
    return Table("comparison", "Comparison", columns, rows, tuple(_comparison_notes(f)))


def _outcomes(f: Findings) -> Iterator[Column]:
    unit = f" ({f.metric.measured_in})" if f.metric.measured_in else ""
    if f.confirmed:
        seeds = {r.test.seeds for r in f.results.values() if r.test}
        said = f", {formatting.plural(next(iter(seeds)), 'seed')}" if len(seeds) == 1 else ""
        yield Column("test", f"test {f.metric.title}{unit}{said}", "right")
        if len(seeds) > 1:
            yield Column("seeds", "seeds", "right")
    if f.versus and f.reference:
        yield Column("difference", "Δ to reference (95 %)", "right")
        yield Column("direction", "direction")
        yield Column("size", f"margin ± {declared.margin(f)}")
    yield Column("val", f"val {f.metric.title}{unit}", "right")


def _comparison_row(f: Findings, r: Result, keys: Sequence[str], solo: bool) -> Row:
    c, m, e = r.cell, f.metric, r.test
    mixed = "" if r.solo == solo or not r.runs else " solo" if r.solo else " (pack)"
    share = formatting.share(c.trainable, r.resource("total_parameters"))
    of_base = "" if share == formatting.DASH else f" ({share})"
    texts = {
        "method": c.method, "r": str(c.r) if c.adapter else formatting.DASH, "alpha": _alpha(r), "targets": c.targets or formatting.DASH,
        "lr": formatting.rate(r.lr) + (" ⚠" if r.choice.edge else ""), "seeds": str(e.seeds) if e else formatting.DASH,
        "test": plus_minus(f, r), "val": m.value(r.val), "trainable": formatting.count(c.trainable) + of_base,
        "seconds": formatting.seconds(r.seconds) + mixed, "memory": formatting.memory(r.memory) + mixed, **dict(c.extra), **_versus(f, r),
    }  # fmt: skip
    recommended = f.recommendation is not None and f.recommendation.cell == r.id
    mark = "recommended" if recommended else "reference" if r.id == f.reference and f.versus else ""
    interval = (e.interval()[0], e.mean, e.interval()[1]) if e and e.seeds > 1 else None
    return Row(tuple(texts.get(k, formatting.DASH) for k in keys), tuple(x.run_id for x in r.runs), mark, interval)


def plus_minus(f: Findings, r: Result) -> str:
    """The test metric with half its 95 % interval."""
    if r.test is None:
        return formatting.DASH
    half = f" ± {f.metric.size(r.test.half_width(), unit=False)}" if r.test.seeds > 1 else ""
    return f.metric.value(r.test.mean) + half


def _alpha(r: Result) -> str:
    """The number, and the rule it came from where that is not the number itself."""
    c = r.cell
    if not c.adapter or c.alpha is None:
        return formatting.DASH
    value, rule = f"{c.alpha:.4g}", alpha_rules.without_scaling(c.alpha_rule)  # rsLoRA's name says that part
    return f"{value} ({rule})" if alpha_rules.is_multiple_of_rank(rule) else value


def _versus(f: Findings, r: Result) -> dict[str, str]:
    if r.id == f.reference:
        return {"difference": "reference", "direction": "", "size": ""}
    made = f.versus.get(r.id)
    if made is None:
        twin = f.reference is not None and has_same_runs(r, f.results[f.reference])
        return {"difference": "the reference's runs"} if twin else {}
    bounds = f" ({f.metric.bounds(*made.interval)})" if made.bounded else ""
    text = f.metric.difference(made.estimate.mean) + bounds
    way = _verdict(made, made.direction)
    said = f"{way} (exploratory)" if made.exploratory and not made.blocked else way
    return {"difference": text, "direction": said, "size": _verdict(made, made.size)}


def _verdict(made: Comparison, verdict: str) -> str:
    return "no verdict" if made.blocked else verdict


def _comparison_notes(f: Findings) -> Iterable[str]:
    tests = [r.test for r in f.results.values() if r.test is not None]
    if tests:
        counts = sorted({e.examples for e in tests if e.examples})
        examples = " or ".join(f"{n:,}" for n in counts)
        groups = sorted({n for r in f.results.values() if r.sample and (n := r.sample.clusters)})
        drawn = f" in {' or '.join(f'{n:,}' for n in groups)} groups (dialogues, near-duplicates)" if groups else ""
        over = f"seeds and {examples} test examples{drawn}, crossed" if counts else "seeds alone"
        yield f"±: half the 95 % interval over {over}. Rates were chosen on {declared.selection(f.sweep)}; only confirmation runs saw test."
    if f.pooled:
        sd = f.metric.size(f.pooled.within**0.5)
        yield f"Seed variance is pooled over the {f.pooled.cells} adapter cells (a seed's standard deviation: {sd}; Bartlett p = {f.pooled.p:.2f})."
    if f.versus and f.reference:
        own = sum(not made.exploratory for made in f.versus.values())
        rest = (
            f" The {len(f.versus) - own} others are exploratory: 95 % each, not adjusted."
            if own < len(f.versus)
            else ""
        )
        yield (f"Direction and its interval are adjusted by Holm's steps within the {own} comparisons with {declared.reference(f)}.{rest} "
               f"Margin: two one-sided tests at 5 %, apart from the direction. “Not resolved” is not “equal”.")  # fmt: skip
    if meets := declared.anchor(f.sweep):
        yield f"The alpha rules meet at {meets}: there they are one point, and one cell stands for all of them."
    if any(r.timed.get("seconds") for r in f.results.values()):
        once = any(r.timed.get("trunk_seconds") for r in f.results.values())
        trunk = ", with the one pass that the frozen blocks below the adapters take" if once else ""
        yield f"Solo: a few steps of the cell alone on the base, their time scaled to the tokens of a run{trunk}; pack totals stand in the budget."
    if stale := [r.name for r in f.results.values() if r.cell.solo and not r.timed]:
        yield (f"No seconds and memory of a run alone for {', '.join(stale)}: an older version measured them with the frozen blocks computed anew in every step, "
               "which runs of today do not do. The command that made the sweep measures them again.")  # fmt: skip
    if any(not r.solo for r in f.results.values() if r.runs):
        yield "Pack: these runs trained side by side on one base. Time is the pack's divided by its runs, memory the pack's peak; neither is a cell's own."
    if any(r.choice.edge for r in f.results.values()):
        pruned = any(r.choice.beyond for r in f.results.values())
        yield f"⚠ the best rate is at an end of its grid{', not counting pruned rates' if pruned else ''}."


# -- rates, lost runs, strangers -----------------------------------------------------------------------------------------


def rates(f: Findings) -> Table:
    scored = f.sweep.selection != "loss"
    columns = (
        Column("cell", "cell"), Column("lr", "lr", "right"), Column("loss", "mean val loss", "right"),
        *([Column("score", f"mean {declared.selection(f.sweep).replace('validation', 'val')}", "right")] if scored else []), Column("seeds", "seeds done", "right"), Column("lost", "diverged or failed", "right"), Column("mark", ""),
    )  # fmt: skip
    rows = []
    for r in f.results.values():
        for x in r.choice.rates:
            chosen = x.lr == r.choice.lr
            mark = "chosen, at the edge" if chosen and r.choice.edge else "chosen" if chosen else "ineligible" if x.failures else (
                f"pruned at step {at_steps(x.pruned)}" if x.pruned else "incomplete" if x.missing else "")  # fmt: skip
            loss = formatting.number(None if x.pruned else x.mean, 4)
            score = [formatting.number(None if x.pruned else x.score, 4)] if scored else []
            texts = (
                r.name,
                formatting.rate(x.lr),
                loss,
                *score,
                f"{len(x.losses)} of {x.seeds}",
                str(x.failures or ""),
                mark,
            )
            rows.append(Row(texts, mark="chosen" if chosen else "lost" if x.failures else ""))
    notes = ["A rate at which any seed diverged or failed is not eligible. Ties go to the smaller rate."]
    if any(x.pruned for r in f.results.values() for x in r.choice.rates):
        notes.append(PRUNED_NOTE)
    return Table("rates", "Learning rates", columns, tuple(rows), tuple(notes))


PRUNED_NOTE = ("Pruned rates were behind inside their cell at that step (not before half of the steps; the best rate so far and its neighbours go on) "
          "and were not trained further: they have no loss to compare, are not eligible, and do not bound a grid.")  # fmt: skip


def at_steps(steps: Iterable[int]) -> str:
    """`50`, or `20 and 25` where seeds or rates left at different steps."""
    return " and ".join(str(s) if s else formatting.DASH for s in sorted(set(steps)))


def lost_runs(f: Findings) -> Table:
    """Runs that failed, diverged or were pruned."""
    columns = tuple(
        Column(k, k, "right" if k in ("lr", "seed") else "left")
        for k in ("cell", "role", "lr", "seed", "status", "why", "run")
    )
    rows = [
        Row((r.name, x.role, formatting.rate(x.config["optimizer"]["lr"]), str(x.config["seed"]), x.status, _why(x), x.run_id), (x.run_id,), "lost")
        for r in f.results.values()
        for x in sorted(f.sweep.records_of((*r.cell.tune, *r.cell.confirm)), key=lambda x: x.run_id)
        if x.status != "completed"
    ]  # fmt: skip
    return Table("lost", "Runs that failed, diverged or were pruned", columns, tuple(rows))


def _why(record: Record) -> str:
    """A record's own words; of a pruned run without any the step it left at."""
    step = record.metrics.get("pruned_step")
    return error_summary(record.error) or (f"pruned at step {step}" if record.status == "pruned" and step else "")


def unlisted_runs(f: Findings) -> Table:
    columns = tuple(
        Column(k, k, "right" if k in ("lr", "seed") else "left")
        for k in ("run", "method", "role", "lr", "seed", "status")
    )
    rows = [
        Row((x.run_id, str(x.config["method"]["name"]), x.role, formatting.rate(x.config["optimizer"]["lr"]), str(x.config["seed"]), x.status), (x.run_id,))
        for x in f.sweep.outside
    ]  # fmt: skip
    return Table(
        "outside",
        "Records outside the manifest",
        columns,
        tuple(rows),
        ("They are in the sweep's directory, but no cell lists them: no number above uses them.",),
    )


def error_summary(error: str | None) -> str:
    """The first line of an error, without the folders of the machine it came from."""
    first = (error or "").strip().splitlines()[:1]
    text = re.sub(r"(?:[A-Za-z]:)?(?:[\\/][^\s'\"\\/:,]+)+[\\/]([^\s'\"\\/:,]+)", r"…/\1", first[0] if first else "")
    return text if len(text) <= 160 else text[:159] + "…"
