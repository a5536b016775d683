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
from lorabench.results import formatting
from lorabench.results.evidence import Evidence, gather
from lorabench.results.findings import Findings
from lorabench.results.weights import read_analysis


@dataclass(frozen=True)
class Contents:
    """Sections of the page in their order; all tables and drawings of theirs, of claims, weights and costs."""

    sections: tuple[Section, ...]
    tables: dict[str, Table]
    drawings: tuple[Drawing, ...]


def collect(f: Findings) -> Contents:
    """Return what the sweep has the data for; tables are those that have rows.

    Raises `ConfigError` for an analysis file that is none.
    """
    root, evidence, looks = f.sweep.store.root, gather(f.sweep), theme.looks(f.sweep.cells)
    analysis, measured_costs = read_analysis(root), costs.read(root)
    sections = _sections(f, evidence, looks)
    tables = [t for s in sections for t in s.tables]
    drawings = [d for s in sections for d in s.drawings]
    tables.append(claims_table(judge.judge_evidence(evidence)))
    if analysis:
        rows = weights.tidy_rows(analysis)
        tables.append(weights.table(rows))
        drawings += weights.draw(rows, looks)
    if measured_costs:
        tables += costs.tables(measured_costs)
    return Contents(sections, {t.key: t for t in tables if t.rows}, tuple(drawings))


def _sections(f: Findings, e: Evidence, looks: Mapping[str, Look]) -> tuple[Section, ...]:
    sections = (
        conditions.section(f),
        alpha_rates.section(e),
        best_rates.section(e, looks),
        targets.section(f, e, looks),
        pareto.section(f, e, looks),
        forgetting.section(f, e, looks),
        style.section(f),
        samples.section(f),
    )
    return tuple(s for s in sections if s is not None)


CLAIMS_NOTE = (
    "Holds: the 90 % interval lies inside what is claimed; contradicted: the 95 % interval lies outside. "
    "Claims are judged one by one, without a correction for their number."
)


def claims_table(verdicts: list[Verdict]) -> Table:
    """Return the claims this sweep speaks to; how many it does not is a note."""
    columns = (
        Column("claim", "claim"),
        Column("status", "here"),
        Column("number", "number (95 %)"),
        Column("why", "why"),
        Column("source", "source"),
    )
    applicable = [v for v in verdicts if v.status != "not applicable"]
    rows = tuple(
        Row((v.claim, v.status, judge.number_text(v) or formatting.DASH, _why(v), v.source)) for v in applicable
    )
    notes = [CLAIMS_NOTE]
    if others := len(verdicts) - len(applicable):
        notes.append(
            f"{others} more {'claim was' if others == 1 else 'claims were'} made under conditions this sweep does not meet: "
            "python -m lorabench.claims lists them and says what a sweep would need."
        )
    return Table("claims", "Claims of the literature, judged on this sweep", columns, rows, tuple(notes))


def _why(v: Verdict) -> str:
    return f"{v.reason}. To settle it: {v.settle}" if v.settle else v.reason
