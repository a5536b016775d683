"""Ranks under each of a sweep's conditions: sizes of the data, of the batch, or whatever else is varied beside the method.

A rank is held against the largest one that trained under the same condition, in a fixed sequence as the recommendation's;
how that differs between conditions is a difference of two differences, seed by seed and example by example.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorabench.report import declared
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, plus_minus
from lorabench.results import formatting, scores
from lorabench.results.cells import Result
from lorabench.results.findings import Comparison, Findings
from lorabench.stats import estimates


@dataclass(frozen=True)
class Condition:
    """cells: tested ones by rank, ascending; made: of each but the last, minus the last."""

    name: str
    cells: tuple[Result, ...]
    made: tuple[Comparison, ...]
    enough: int  # index of the smallest that passed, from the largest down; the last where none did

    @property
    def top(self) -> Result:
        return self.cells[-1]


def section(f: Findings) -> Section | None:
    """Where two conditions or more have two ranks or more."""
    found = conditions(f)
    if not found:
        return None
    texts = (*(f"At {c.name}: {verdict_sentence(f, c)}." for c in found), *_between(f, found[0], found[-1]))
    return Section("conditions", "Rank by rank under each condition", texts, (), (_table(f, found),))


def conditions(f: Findings) -> list[Condition]:
    """Of the method, rule of alpha and targets that have most cells under several conditions; in the order of tables."""
    families: dict[object, dict[object, list[Result]]] = {}
    for r in f.results.values():
        if r.cell.adapter and r.test is not None:
            own = tuple(sorted(r.cell.conditions.items()))
            family = (*r.cell.series[:3], tuple(x for x in r.cell.extra if x not in own))
            families.setdefault(family, {}).setdefault(own, []).append(r)
    several = [[cells for cells in those.values() if len(cells) > 1] for those in families.values()]
    widest = max((those for those in several if len(those) > 1), key=lambda those: sum(map(len, those)), default=[])
    made = (_condition(f, sorted(cells, key=lambda r: r.cell.r or 0), widest) for cells in widest)
    found = [c for c in made if c is not None]
    return found if len(found) > 1 else []


def _condition(f: Findings, cells: list[Result], every: list[list[Result]]) -> Condition | None:
    made = [f.compare(r.id, cells[-1].id) for r in cells[:-1]]
    known = tuple(x for x in made if x is not None)
    if len(known) < len(made):
        return None
    enough = len(cells) - 1
    while enough and not known[enough - 1].blocked and _passes(f, known[enough - 1]):
        enough -= 1
    own = cells[-1].cell.conditions
    varied = [k for k in own if len({x[0].cell.conditions.get(k) for x in every}) > 1]
    return Condition(", ".join(f"{k.split('.')[-1]} {own[k]}" for k in varied), tuple(cells), known, enough)


def _passes(f: Findings, made: Comparison) -> bool:
    return estimates.non_inferior(made.estimate, f.sweep.margin, lower_is_better=f.sweep.lower_is_better)


# -- words ---------------------------------------------------------------------------------------------------------------


def verdict_sentence(f: Findings, c: Condition) -> str:
    """The smallest rank that is shown to do as well as the largest, and what stopped the sequence."""
    margin, top = declared.margin(f), c.top.cell.r
    text = ""
    if c.enough < len(c.made):
        made = c.made[c.enough]
        text = f"r = {c.cells[c.enough].cell.r} is shown to fall short of r = {top} by less than {margin} ({_shown(f, made)})"
    if c.enough:
        stopped = c.made[c.enough - 1]
        why = stopped.blocked or _shown(f, stopped)
        rank = c.cells[c.enough - 1].cell.r
        text += (
            f"; r = {rank} is not ({why})"
            if text
            else f"r = {rank} is not shown to fall short of r = {top} by less than {margin} ({why})"
        )
    return text


def _shown(f: Findings, made: Comparison) -> str:
    bounds = f.metric.bounds(*made.estimate.interval(0.90))
    return f"{f.metric.difference(made.estimate.mean, unit=True)}, 90 % interval {bounds}"


def _between(f: Findings, first: Condition, last: Condition) -> Iterator[str]:
    """Whether the smallest rank that both have loses ground to the largest that both have."""
    ranks = sorted({r.cell.r or 0 for r in first.cells} & {r.cell.r or 0 for r in last.cells})
    if len(ranks) < 2:
        return
    small, large = ranks[0], ranks[-1]
    four = [next(r for r in c.cells if r.cell.r == n) for c in (last, first) for n in (small, large)]
    about = f"From {first.name} to {last.name} the difference of r = {small} to r = {large}"
    made = None if any(r.lost for r in four) else _growth(f, four)
    if made is None or not made.allows_verdict:
        yield f"{about}: no verdict, as not all four cells have three confirmation seeds in common."
        return
    low, high = made.interval()
    loses = (made.mean > 0) == f.sweep.lower_is_better
    way = "not resolved from no change" if low <= 0 <= high else f"r = {small} {'loses' if loses else 'gains'} ground"
    now, then = (
        f.metric.difference(a.sample.scores.mean() - b.sample.scores.mean())
        for a, b in (four[:2], four[2:])
        if a.sample and b.sample
    )
    yield (f"{about} goes from {then} to {now}, by {f.metric.difference(made.mean, unit=True)} (95 % interval {f.metric.bounds(low, high)}, exploratory): "
           f"{way}.")  # fmt: skip


def _growth(f: Findings, four: list[Result]) -> estimates.Estimate | None:
    """(a − b) − (c − d). Its seed variance is that of four cells, twice that of a difference of two."""
    samples = [r.sample for r in four if r.sample is not None]
    if len(samples) < 4:
        return None
    one, two = scores.difference(samples[0], samples[1]), scores.difference(samples[2], samples[3])
    made = scores.difference(one, two) if one and two else None
    if made is None:
        return None
    shared = f.pooled if made.seeds == f.seeds else None
    return made.estimate((2 * shared.difference, shared.df) if shared else None)


# -- the table -----------------------------------------------------------------------------------------------------------


def _table(f: Findings, found: list[Condition]) -> Table:
    unit = f" ({f.metric.measured_in})" if f.metric.measured_in else ""
    columns = (
        Column("condition", "condition"), Column("r", "r", "right"), Column("lr", "best lr", "right"),
        Column("test", f"test {f.metric.title}{unit}", "right"), Column("difference", "Δ to the largest r there (95 %)", "right"),
        Column("size", f"margin ± {declared.margin(f)}"), Column("enough", "not worse by the margin"),
    )  # fmt: skip
    rows = []
    for c in found:
        for n, r in enumerate(c.cells):
            texts = ["held against", "", ""]
            if n < len(c.made):
                x = c.made[n]
                difference = f.metric.difference(x.estimate.mean)
                difference += f" ({f.metric.bounds(*x.estimate.interval())})" if x.bounded else ""
                texts = [difference, "no verdict" if x.blocked else x.size, "shown" if n >= c.enough else "not shown"]
            runs = tuple(x.run_id for x in (*r.runs, *c.top.runs))
            rows.append(
                Row(
                    (c.name, str(r.cell.r), formatting.rate(r.lr), plus_minus(f, r), *texts), tuple(dict.fromkeys(runs))
                )
            )
    note = (
        "Δ: to the largest rank under the same condition; 95 % each, exploratory: not adjusted for their number. Not worse by the margin: from the largest rank "
        "down, one one-sided test at 5 % each, until the first that does not show it."
    )
    return Table("conditions", "Ranks under each condition", columns, tuple(rows), (note,))
