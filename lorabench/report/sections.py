"""What a report holds beside the comparison, where the sweep has the data for it: claims of the literature, weights, costs."""

from __future__ import annotations

from lorabench.report import analysis, claims, costs, style, weights, weights_figures
from lorabench.report.evidence import Verdict
from lorabench.report.findings import Findings
from lorabench.report.style import Drawing
from lorabench.report.tables import Column, Row, Table


def sections(f: Findings) -> tuple[dict[str, Table], list[Drawing]]:
    """Tables by key, those that have rows, and drawings."""
    read = analysis.read(f.sweep.store.root)
    found = weights.tidy(read) if read else None
    paid = costs.read(f.sweep.store.root)
    made = [
        claimed(claims.judge(f.sweep)),
        *([weights.table(found)] if found else []),
        *(costs.tables(paid) if paid else []),
    ]
    drawn = weights_figures.draw(found, style.looks(f.sweep.cells)) if found else []
    return {t.key: t for t in made if t.rows}, drawn


def claimed(verdicts: list[Verdict]) -> Table:
    """The claims this sweep speaks to; how many it does not is a note."""
    columns = (
        Column("claim", "claim"), Column("source", "source"), Column("status", "here"), Column("number", "number (95 %)"),
        Column("why", "why"),
    )  # fmt: skip
    asked = [v for v in verdicts if v.status != "not applicable"]
    rows = tuple(Row((v.claim, v.source, v.status, claims.shown(v) or "–", _why(v))) for v in asked)
    notes = [
        "Holds: the 90 % interval lies inside what is claimed; contradicted: the 95 % interval lies outside. Claims are judged one by one, without a "
        "correction for their number."
    ]  # fmt: skip
    if len(asked) < len(verdicts):
        notes.append(
            f"{len(verdicts) - len(asked)} more claims were made under conditions this sweep does not meet: "
            "python -m lorabench.claims lists them, and what would ask them."
        )
    return Table("claims", "Claims of the literature, judged on this sweep", columns, rows, tuple(notes))


def _why(v: Verdict) -> str:
    return f"{v.reason}. To settle it: {v.settle}" if v.settle else v.reason
