"""Two sweeps side by side, as a terminal and as Markdown show them. What stands in the way of comparing them comes first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorabench.report import faces, formats
from lorabench.report.compare import Comparison, Pair, Side
from lorabench.report.load import short
from lorabench.report.results import Result
from lorabench.report.tables import Column, Row, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text


def top(c: Comparison) -> list[str]:
    """What a reader must know first."""
    if c.obstacles:
        return [
            "Not comparable: " + "; ".join(c.obstacles) + ". The numbers stand side by side; no difference is taken."
        ]
    said = sum(p.difference is not None for p in c.pairs)
    both = sum(p.a is not None and p.b is not None for p in c.pairs)
    return [
        f"{formats.plural(both, 'cell')} in both sweeps, {said} with a difference on test: of one metric, on the same data."
    ]


def cells(c: Comparison) -> Table:
    columns = (
        Column("cell", "cell"), Column("a", f"A: {_title(c.a)}", "right"), Column("b", f"B: {_title(c.b)}", "right"),
        Column("difference", "B − A (95 %)", "right"), Column("over", "over"), Column("lr", "best lr, A and B", "right"),
        Column("seconds", "train s, A and B", "right"),
    )  # fmt: skip
    rows = tuple(Row(_texts(c, p)) for p in c.pairs)
    notes = (
        "±: half the 95 % interval. Each difference stands alone: no correction for their number, and no reference declared, so they are exploratory.",
    )
    return Table("cells", "Cells", columns, rows, notes)


def differing(c: Comparison) -> Table:
    rows = tuple(Row((key, short(a, 60), short(b, 60))) for key, a, b in c.differing)
    return Table("differing", "What differs", (Column("what", "what"), Column("a", "A"), Column("b", "B")), rows)


def _title(side: Side) -> str:
    unit = f" ({side.metric.measured_in})" if side.metric.measured_in else ""
    return f"{'test' if side.sweep.confirmed else 'validation'} {side.metric.title}{unit}"


def _texts(c: Comparison, p: Pair) -> tuple[str, ...]:
    difference = formats.DASH
    if p.difference is not None:
        bounds = f" ({c.a.metric.bounds(*p.difference.interval())})" if p.difference.seeds > 1 else ""
        difference = c.a.metric.difference(p.difference.mean) + bounds
    rates = [formats.rate(r.lr if r else None) for r in (p.a, p.b)]
    seconds = [formats.seconds(r.seconds if r else None) for r in (p.a, p.b)]
    return (
        p.name, _score(c.a, p.a), _score(c.b, p.b), difference, p.how, rates[0] if rates[0] == rates[1] else " | ".join(rates),
        " | ".join(seconds),
    )  # fmt: skip


def _named(side: Side) -> str:
    """The sweep, and its directory where that is called otherwise."""
    name, folder = side.sweep.name, side.sweep.store.root.resolve().name
    return name if name == folder else f"{name} ({folder})"


def _score(side: Side, r: Result | None) -> str:
    if r is None:
        return formats.DASH
    if r.test is None:
        return formats.DASH if side.sweep.confirmed else side.metric.value(r.val)
    half = f" ± {side.metric.size(r.test.half_width(), unit=False)}" if r.test.seeds > 1 else ""
    return side.metric.value(r.test.mean) + half


def markdown(c: Comparison) -> str:
    """The comparison as a file."""
    names = [faces.escape_markdown(_named(s)) for s in (c.a, c.b)]
    parts = [f"# {names[0]} and {names[1]}", *(f"**{faces.escape_markdown(x)}**" for x in top(c))]
    parts += [f"A is {names[0]}, B is {names[1]}."]
    for table in (cells(c), differing(c)):
        body = faces.markdown(table) if table.rows else "Nothing."
        parts += [f"## {table.title}", body, *(faces.escape_markdown(n) for n in table.notes)]
    return "\n\n".join(parts) + "\n"


def terminal(c: Comparison) -> Iterator[RichTable | Text]:
    from rich.text import Text

    for line in top(c):
        yield Text(line, style="bold red" if c.obstacles else "bold")
    yield Text(f"A is {_named(c.a)}, B is {_named(c.b)}.")
    for table in (cells(c), differing(c)):
        if not table.rows:
            yield Text(f"{table.title}: nothing.")
            continue
        yield faces.rich_table(table)
