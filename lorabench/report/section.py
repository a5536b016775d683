"""A section of the page that stands there where the sweep has the data for it."""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.report.tables import Table
from lorabench.report.theme import Drawing


@dataclass(frozen=True)
class Section:
    """A heading and what is under it: figures, what they say in words, tables."""

    key: str
    title: str
    texts: tuple[str, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()
