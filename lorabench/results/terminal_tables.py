"""Tables of a terminal that stay readable where it is narrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Column, Table


@dataclass(frozen=True)
class WholeWords:
    """A table for `Console.print` whose columns are no narrower than their longest words, as far as the width allows.

    Where there is room for it, numbers (columns set to the right) are not parted from their intervals: text wraps.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        columns = self.table.columns
        room = options.max_width - _width_between(self.table)
        natural = [_longest(column, lines=True) for column in columns]
        words = [_longest(column) for column in columns]
        numbers = [n if c.justify == "right" else w for c, n, w in zip(columns, natural, words, strict=True)]
        least = next((widths for widths in (numbers, words) if sum(widths) <= room < sum(natural)), None)
        for column, width in zip(columns, _spread(least, natural, room) if least else (), strict=False):
            column.no_wrap, column.width = False, width
        yield self.table


def _spread(least: Sequence[int], natural: Sequence[int], room: int) -> list[int]:
    """Return widths from `least` on, the room that is left over given to the columns that lack most."""
    widths = list(least)
    for _ in range(room - sum(widths)):
        lacking = [n - w for n, w in zip(natural, widths, strict=True)]
        widths[lacking.index(max(lacking))] += 1
    return widths


def _width_between(table: Table) -> int:
    """Return the characters of a line that rules and blanks take."""
    n, (_, right, _, left) = len(table.columns), table.padding
    blanks = n * (left + right) - (0 if table.pad_edge else left + right)
    return blanks + (n - 1 + 2 * table.show_edge if table.box else 0)


def _longest(column: Column, *, lines: bool = False) -> int:
    """Return the characters of a column's longest word or line, its head included: of that always the words."""
    from rich.text import Text

    cells = [cell if isinstance(cell, Text) else Text.from_markup(str(cell)) for cell in column.cells]
    header = column.header if isinstance(column.header, Text) else Text.from_markup(str(column.header))
    parts = [part for cell in cells for part in (cell.plain.splitlines() if lines else cell.plain.split())]
    return max(map(len, [*parts, *header.plain.split()]), default=0)
