"""What a report holds beside the comparison, where the sweep has the data for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorabench.claims import judge
from lorabench.claims.verdict import Verdict
from lorabench.report import theme
from lorabench.report.section import Section
from lorabench.report.sections import (
    alpha_rates,
    best_rates,
    conditions,
    costs,
    forgetting,
    pareto,
    samples,
    style,
    targets,
    weights,
)
from lorabench.report.tables import Column, Row, Table
from lorabench.report.theme import Drawing, Look
from lorabench.results.evidence import Evidence, gather
from lorabench.results.findings import Findings
from lorabench.results.weights import read_analysis


@dataclass(frozen=True)
class Contents:
    """Parts of the page in their order; every table and drawing of theirs and of claims and weights, by key."""

    parts: tuple[Section, ...]
    tables: dict[str, Table]
    drawings: tuple[Drawing, ...]


def collect(f: Findings) -> Contents:
    """Tables are those that have rows. Raises `ConfigError` for an analysis file that is none."""
    evidence, looks = gather(f.sweep), theme.looks(f.sweep.cells)
    read, paid = read_analysis(f.sweep.store.root), costs.read(f.sweep.store.root)
    found = weights.tidy_rows(read) if read else None
    parts = _parts(f, evidence, looks)
    made = [t for p in parts for t in p.tables]
    made += [claims_table(judge.judge_evidence(evidence)), *([weights.table(found)] if found else [])]
    made += costs.tables(paid) if paid else []
    drawn = [d for p in parts for d in p.drawings] + (weights.draw(found, looks) if found else [])
    return Contents(parts, {t.key: t for t in made if t.rows}, tuple(drawn))


def _parts(f: Findings, e: Evidence, looks: Mapping[str, Look]) -> tuple[Section, ...]:
    made = (
        conditions.section(f), alpha_rates.section(e), best_rates.section(e, looks), targets.section(f, e, looks), pareto.section(f, e, looks),
        forgetting.section(f, e, looks), style.section(f), samples.section(f),
    )  # fmt: skip
    return tuple(p for p in made if p is not None)


def claims_table(verdicts: list[Verdict]) -> Table:
    """The claims this sweep speaks to; how many it does not is a note."""
    columns = (
        Column("claim", "claim"), Column("status", "here"), Column("number", "number (95 %)"), Column("why", "why"),
        Column("source", "source"),
    )  # fmt: skip
    asked = [v for v in verdicts if v.status != "not applicable"]
    rows = tuple(Row((v.claim, v.status, judge.number_text(v) or "–", _why(v), v.source)) for v in asked)
    notes = [
        "Holds: the 90 % interval lies inside what is claimed; contradicted: the 95 % interval lies outside. Claims are judged one by one, without a "
        "correction for their number."
    ]  # fmt: skip
    if len(asked) < len(verdicts):
        notes.append(
            f"{len(verdicts) - len(asked)} more claims were made under conditions this sweep does not meet: "
            "python -m lorabench.claims lists them and says what a sweep would need."
        )
    return Table("claims", "Claims of the literature, judged on this sweep", columns, rows, tuple(notes))


def _why(v: Verdict) -> str:
    return f"{v.reason}. To settle it: {v.settle}" if v.settle else v.reason
