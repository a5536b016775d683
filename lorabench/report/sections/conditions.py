"""Ranks under each of a sweep's conditions: sizes of the data, of the batch, or whatever else is varied beside the
method.

A rank is held against the largest one that trained under the same condition, in a fixed sequence as the
recommendation's; how that differs between conditions is a difference of two differences, seed by seed and example by
example.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.report import declared
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, metric_title, plus_minus, run_ids
from lorabench.results import formatting, scores
from lorabench.results.cells import Result
from lorabench.results.comparisons import Comparison
from lorabench.results.findings import Findings
from lorabench.stats import estimates


@dataclass(frozen=True)
class Condition:
    """Tested cells of one condition, by rank, ascending."""

    name: str
    cells: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]  # of each cell but the last with the last
    enough: int  # index of the smallest that passed, from the largest down; the last where none did

    @property
    def largest(self) -> Result:
        """The cell of the largest rank, which the others are held against."""
        return self.cells[-1]


def section(f: Findings) -> Section | None:
    """Return the section where two conditions or more have two ranks or more."""
    by_condition = conditions(f)
    if not by_condition:
        return None
    verdicts = (f"At {c.name}: {verdict_sentence(f, c)}." for c in by_condition)
    texts = (*verdicts, _change_sentence(f, by_condition[0], by_condition[-1]))
    title = "Rank by rank under each condition"
    return Section("conditions", title, tuple(filter(None, texts)), (), (_table(f, by_condition),))


def conditions(f: Findings) -> list[Condition]:
    """Return the conditions, in the order of tables.

    They are of the method, alpha rule and targets that have most cells under several conditions.
    """
    families: dict[object, dict[object, list[Result]]] = {}
    for r in f.results.values():
        if r.cell.adapter and r.test is not None:
            condition = tuple(sorted(r.cell.conditions.items()))
            family = (*r.cell.series[:3], tuple(x for x in r.cell.extra if x not in condition))
            families.setdefault(family, {}).setdefault(condition, []).append(r)
    several = [[cells for cells in family.values() if len(cells) > 1] for family in families.values()]
    widest = max((x for x in several if len(x) > 1), key=lambda x: sum(map(len, x)), default=[])
    candidates = (_condition(f, sorted(cells, key=lambda r: r.cell.r or 0), widest) for cells in widest)
    complete = [c for c in candidates if c is not None]
    return complete if len(complete) > 1 else []


def _condition(f: Findings, cells: list[Result], all_conditions: list[list[Result]]) -> Condition | None:
    """Return None where some rank cannot be compared with the largest."""
    comparisons = tuple(x for r in cells[:-1] if (x := f.compare(r.id, cells[-1].id)) is not None)
    if len(comparisons) < len(cells) - 1:
        return None
    enough = len(cells) - 1
    while enough and not comparisons[enough - 1].blocked and _passes(f, comparisons[enough - 1]):
        enough -= 1
    values = cells[-1].cell.conditions
    varied = [k for k in values if len({x[0].cell.conditions.get(k) for x in all_conditions}) > 1]
    name = ", ".join(f"{k.split('.')[-1]} {values[k]}" for k in varied)
    return Condition(name, tuple(cells), comparisons, enough)


def _passes(f: Findings, comparison: Comparison) -> bool:
    return estimates.non_inferior(comparison.estimate, f.sweep.margin, lower_is_better=f.sweep.lower_is_better)


# -- words -----------------------------------------------------------------------------------------------------------


def verdict_sentence(f: Findings, c: Condition) -> str:
    """Return the smallest rank that is shown to do as well as the largest, and what stopped the sequence."""
    shortfall = f"to fall short of r = {c.largest.cell.r} by less than {declared.margin(f)}"
    passed = ""
    if c.enough < len(c.comparisons):
        passed = f"r = {c.cells[c.enough].cell.r} is shown {shortfall} ({_difference_90(f, c.comparisons[c.enough])})"
    if not c.enough:
        return passed
    stopped = c.comparisons[c.enough - 1]
    rank, why = c.cells[c.enough - 1].cell.r, stopped.blocked or _difference_90(f, stopped)
    return f"{passed}; r = {rank} is not ({why})" if passed else f"r = {rank} is not shown {shortfall} ({why})"


def _difference_90(f: Findings, comparison: Comparison) -> str:
    bounds = f.metric.bounds(*comparison.estimate.interval(0.90))
    return f"{f.metric.difference(comparison.estimate.mean, unit=True)}, 90 % interval {bounds}"


def _change_sentence(f: Findings, first: Condition, last: Condition) -> str:
    """Return whether the smallest rank that both have loses ground to the largest that both have."""
    ranks = sorted({r.cell.r or 0 for r in first.cells} & {r.cell.r or 0 for r in last.cells})
    if len(ranks) < 2:
        return ""
    small, large = ranks[0], ranks[-1]
    four = [next(r for r in c.cells if r.cell.r == n) for c in (last, first) for n in (small, large)]
    about = f"From {first.name} to {last.name} the difference of r = {small} to r = {large}"
    change = None if any(r.lost for r in four) else _change(f, four)
    if change is None or not change.allows_verdict:
        return f"{about}: no verdict, as not all four cells have three confirmation seeds in common."
    low, high = change.interval()
    loses = (change.mean > 0) == f.sweep.lower_is_better
    way = "not resolved from no change" if low <= 0 <= high else f"r = {small} {'loses' if loses else 'gains'} ground"
    now, then = (
        f.metric.difference(a.sample.scores.mean() - b.sample.scores.mean())
        for a, b in (four[:2], four[2:])
        if a.sample and b.sample
    )
    return (
        f"{about} goes from {then} to {now}, by {f.metric.difference(change.mean, unit=True)} "
        f"(95 % interval {f.metric.bounds(low, high)}, exploratory): {way}."
    )


def _change(f: Findings, four: list[Result]) -> estimates.Estimate | None:
    """Return (a − b) − (c − d), with the scatter of its own seeds."""
    samples = [r.sample for r in four if r.sample is not None]
    if len(samples) < 4:
        return None
    now, then = scores.difference(samples[0], samples[1]), scores.difference(samples[2], samples[3])
    change = scores.difference(now, then) if now and then else None
    return change.estimate() if change else None


# -- the table -------------------------------------------------------------------------------------------------------

NOTE = (
    "Δ: to the largest rank under the same condition; 95 % each, exploratory: not adjusted for their number. "
    "Not worse by the margin: from the largest rank down, one one-sided test at 5 % each, "
    "until the first that does not show it."
)


def _table(f: Findings, by_condition: list[Condition]) -> Table:
    columns = (
        Column("condition", "condition"),
        Column("r", "r", "right"),
        Column("lr", "best lr", "right"),
        Column("test", metric_title(f, "test"), "right"),
        Column("difference", "Δ to the largest r there (95 %)", "right"),
        Column("size", f"margin ± {declared.margin(f)}"),
        Column("enough", "not worse by the margin"),
    )
    rows = tuple(_row(f, c, n) for c in by_condition for n in range(len(c.cells)))
    return Table("conditions", "Ranks under each condition", columns, rows, (NOTE,))


def _row(f: Findings, c: Condition, n: int) -> Row:
    r = c.cells[n]
    verdict = ("held against", "", "")
    if n < len(c.comparisons):
        x = c.comparisons[n]
        bounds = f" ({f.metric.bounds(*x.estimate.interval())})" if x.bounded else ""
        difference = f.metric.difference(x.estimate.mean) + bounds
        verdict = (difference, "no verdict" if x.blocked else x.size, "shown" if n >= c.enough else "not shown")
    texts = (c.name, str(r.cell.r), formatting.rate(r.lr), plus_minus(f, r), *verdict)
    return Row(texts, tuple(dict.fromkeys((*run_ids(r), *run_ids(c.largest)))))
