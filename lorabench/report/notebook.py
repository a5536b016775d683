"""`lorabench.load(sweep)`: a sweep for a notebook, as tidy frames, figures and the answer in words."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.config.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lorabench.report.theme import Drawing
    from lorabench.results.findings import Findings
    from lorabench.store.records import Record


class Study:
    """A sweep's records, read once. Frames are made when they are asked for and are the caller's to change."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    @property
    def name(self) -> str:
        return self.findings.sweep.name

    @property
    def runs(self) -> pd.DataFrame:
        """A row a run: cell, role, status, rate, seed, metrics, resources, settings (`config.<key>`)."""
        from lorabench.results import frames

        return frames.runs(self.findings)

    @property
    def history(self) -> pd.DataFrame:
        """A row a logged value: run, step, metric (`train/loss`, `val/accuracy`, ...), value."""
        from lorabench.results import frames

        return frames.history(self.findings)

    @property
    def examples(self) -> pd.DataFrame:
        """A row a confirmation run and test example: loss, weight, for classification label, prediction and correct."""
        from lorabench.results import frames

        return frames.examples(self.findings)

    @property
    def cells(self) -> pd.DataFrame:
        """A row a cell: its chosen rate, test with a 95 % interval, validation, seconds, memory, parameters."""
        from lorabench.results import frames

        return frames.cells(self.findings)

    @property
    def comparisons(self) -> pd.DataFrame:
        """A row a comparison on test: difference, interval, adjusted p, direction, size against the margin."""
        from lorabench.results import frames

        return frames.comparisons(self.findings)

    @property
    def claims(self) -> pd.DataFrame:
        """A row a claim of the literature: status, number, interval, reason, what would settle it."""
        import pandas as pd

        from lorabench.claims.judge import judge, rows

        return pd.DataFrame(rows(judge(self.findings.sweep)))

    def record(self, run_id: str) -> Record:
        """Return what a run left: settings, metrics, resources, provenance.

        Raises `ConfigError` for a run that has not ended.
        """
        records = self.findings.sweep.records
        if run_id not in records:
            raise ConfigError("run_id", run_id, f"one of the {len(records)} runs of {self.name}")
        return records[run_id]

    @cached_property
    def _drawings(self) -> dict[str, Drawing]:
        from lorabench.report import figures
        from lorabench.report.contents import collect

        return {d.key: d for d in (*figures.draw(self.findings), *collect(self.findings).drawings)}

    @property
    def figures(self) -> list[str]:
        """Names of the figures that this sweep has the data for."""
        return list(self._drawings)

    def figure(self, name: str) -> Figure:
        """Return the report's figure of this name. Raises `ConfigError` for a name that is not there."""
        if name not in self._drawings:
            raise ConfigError(
                "figure", name, f"allowed here: {', '.join(self._drawings) or 'none, the data are too few'}"
            )
        return self._drawings[name].figure

    @cached_property
    def answer(self) -> str:
        """What the report says at its top: the lead, its points, and the command that trains the recommended
        adapter."""
        from lorabench.report.answer import answer

        top = answer(self.findings)
        lines = [top.lead, *(f"{about}: {text}" for about, text in top.points)]
        return "\n".join([*lines, *([f"{top.does}: {top.command}"] if top.command else [])])

    def __repr__(self) -> str:
        runs = len(self.findings.sweep.records)
        return f"<Study {self.name}: {len(self.findings.results)} cells, {runs} runs>"


def load(sweep_dir: str | Path) -> Study:
    """Read a sweep's directory. Raises `ConfigError` where there is none or no run of it has finished."""
    from lorabench.results.findings import find
    from lorabench.results.sweep import load as read

    return Study(find(read(sweep_dir)))
