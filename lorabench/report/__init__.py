"""The report of a sweep: statistics, tables, figures and page, a pure function of its records. No torch.

`render` writes the report's directory, `terminal_table` is the comparison for a terminal. Both import what they need
when they are called: the rest of lorabench imports this package for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorabench.results.sweep import OtherMetric
    from lorabench.results.terminal_tables import WholeWords

__all__ = ["Summary", "render", "terminal_table"]


@dataclass(frozen=True)
class Summary:
    """What a report says at its top, and where it is."""

    out: Path
    lead: str
    warnings: tuple[str, ...]
    confirmed: bool


def render(
    sweep_dir: str | Path,
    out_dir: str | Path,
    *,
    title: str | None = None,
    margin: float | None = None,
    metric: OtherMetric | None = None,
) -> Summary:
    """Write the report of a sweep. margin, metric: others than the study declares, shown as post hoc.

    Raises `ConfigError` for a directory that is no sweep, has no finished run, or for an `out_dir` that holds files of
    someone else, `Unwritable` where it cannot be written. What was there before stays until the new report is complete.
    """
    from lorabench.report import answer, cautions, directory, page
    from lorabench.results.findings import find
    from lorabench.results.sweep import load

    out = Path(out_dir)
    directory.check_replaceable(out)
    load(sweep_dir, margin=margin, metric=metric)  # raises before anything is written
    with directory.lock(out):
        findings = find(load(sweep_dir, margin=margin, metric=metric))
        directory.replace(out, page.files(findings, title))
    return Summary(out, answer.headline(findings), tuple(cautions.warnings(findings)), findings.confirmed)


def terminal_table(sweep_dir: str | Path) -> WholeWords:
    """Return the comparison as a rich table, the answer below it. Raises `ConfigError` as `render` does."""
    from lorabench.report import answer, table_formats
    from lorabench.results.findings import find
    from lorabench.results.sweep import load

    findings = find(load(sweep_dir))
    return table_formats.terminal_comparison(findings, answer.headline(findings))
