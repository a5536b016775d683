"""Two sweeps side by side: matched cells, their difference on test, and what differs in settings and provenance.

Seeds and test examples are crossed, as in `lorabench.stats.estimates`. Where both sweeps confirmed a cell with the
same seeds the difference is paired; with other seeds it is of two independent sets of seeds that met the same
examples. Cells over other data and sweeps in another metric are shown, and no difference is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.config.overrides import flatten
from lorabench.report import table_formats
from lorabench.report.tables import Column, Row, Table, unit_suffix
from lorabench.results import formatting, scores
from lorabench.results.cells import Result
from lorabench.results.evidence import gather
from lorabench.results.sweep import Cell, Sweep, shorten
from lorabench.stats import estimates
from lorabench.store.records import Record

if TYPE_CHECKING:
    from rich.text import Text

    from lorabench.results.terminal_tables import WholeWords

NESTED_PROVENANCE = ("packages", "machine", "git")  # provenance that is a mapping
IGNORED_PROVENANCE = {  # of a single run, or of no meaning
    "pack",
    "pack_runs",
    "data_notes",
    "model_notes",
    "head",
    "stopped",
    "machine.host",
}
UNKNOWN = "not recorded"
MAX_VALUE_LENGTH = 60  # characters of a setting in a table
MAX_FINGERPRINT_LENGTH = 12  # characters


@dataclass(frozen=True)
class Side:
    """One of the two sweeps, with its cells' results."""

    sweep: Sweep
    results: Mapping[str, Result]
    metric: formatting.Metric


@dataclass(frozen=True)
class Pair:
    """Cells of one label; one of them may be missing."""

    name: str
    a: Result | None
    b: Result | None
    difference: estimates.Estimate | None  # B − A
    how: str  # what the difference is over, or why there is none


@dataclass(frozen=True)
class SweepComparison:
    """Two sweeps side by side."""

    a: Side
    b: Side
    obstacles: tuple[str, ...]  # why the two cannot be compared; empty where they can
    pairs: tuple[Pair, ...]
    differing: tuple[tuple[str, str, str], ...]  # what, in A, in B


def compare(a: Sweep, b: Sweep) -> SweepComparison:
    """Compare two sweeps: cells in A's order, then those of B alone."""
    left, right = _side(a), _side(b)
    obstacles = tuple(_obstacles(left, right))
    theirs = {matching_key(r.cell): r for r in right.results.values()}
    ours = {matching_key(r.cell): r for r in left.results.values()}
    pairs = [_pair(r, theirs.get(key), not obstacles) for key, r in ours.items()]
    pairs += [_pair(None, r, not obstacles) for key, r in theirs.items() if key not in ours]
    return SweepComparison(left, right, obstacles, tuple(pairs), tuple(_differing(a, b)))


def matching_key(cell: Cell) -> tuple[Any, ...]:
    """Return what a cell is matched by."""
    return cell.method, cell.r, cell.alpha_rule, cell.targets, cell.extra


def _side(sweep: Sweep) -> Side:
    evidence = gather(sweep)
    return Side(sweep, evidence.measured.by_cell, evidence.metric)


# -- whether they can be compared ------------------------------------------------------------------------------------


def _obstacles(a: Side, b: Side) -> Iterator[str]:
    if a.sweep.metric != b.sweep.metric:
        yield f"the primary metric differs: {a.metric.title} in A, {b.metric.title} in B"
    elif a.sweep.lower_is_better != b.sweep.lower_is_better:
        yield f"{a.metric.title} is better when lower in one sweep and when higher in the other"
    for name, side in (("A", a), ("B", b)):
        if any("provenance.data_fingerprint" in dict(r.cell.extra) for r in side.results.values()):
            yield f"runs of {name} were trained on several versions of the data"
    theirs = {matching_key(r.cell): r for r in b.results.values()}
    both = [(r, theirs[key]) for r in a.results.values() if (key := matching_key(r.cell)) in theirs]
    if both and all(_data_obstacle(*pair) for pair in both):
        in_a, in_b = ({v for r in side for v in _fingerprints(r)} for side in zip(*both, strict=True))
        for name, fingerprints in (("A", in_a), ("B", in_b)):
            if fingerprints <= {UNKNOWN}:
                yield f"the data of {name} are not known"
        left, right = (", ".join(sorted(shorten(v, MAX_FINGERPRINT_LENGTH) for v in side)) for side in (in_a, in_b))
        yield f"no cell met the same data in both (fingerprint {left} in A, {right} in B)"


def _fingerprints(r: Result) -> set[str]:
    """Return fingerprints of the data behind a cell's numbers: one, where no one changed the data under it."""
    return {str(x.provenance.get("data_fingerprint") or UNKNOWN) for x in r.runs}


def _data_obstacle(a: Result, b: Result) -> str:
    """Return why a cell's two results may not be of the same data; empty where they are.

    A sweep over sizes of the data has several fingerprints.
    """
    left, right = _fingerprints(a), _fingerprints(b)
    if not left or not right:
        return ""  # nothing was run yet
    if UNKNOWN in left | right:
        return "data not known"
    return "" if len(left) == 1 and left == right else "other data"


# -- one pair --------------------------------------------------------------------------------------------------------


def _pair(a: Result | None, b: Result | None, comparable: bool) -> Pair:
    named = a or b
    assert named is not None
    if a is None or b is None:
        return Pair(named.name, a, b, None, f"only in {'A' if b is None else 'B'}")
    if not comparable:
        return Pair(named.name, a, b, None, "not comparable")
    if why := _data_obstacle(a, b):
        return Pair(named.name, a, b, None, why)
    if a.sample is None or b.sample is None:
        return Pair(named.name, a, b, None, f"no test result in {'A' if a.sample is None else 'B'}")
    lost = [name for name, r in (("A", a), ("B", b)) if r.lost]
    if lost:
        return Pair(named.name, a, b, None, f"confirmation runs in {' and '.join(lost)} did not survive")
    return Pair(named.name, a, b, *difference(a.sample, b.sample))


def difference(a: scores.Sample, b: scores.Sample) -> tuple[estimates.Estimate | None, str]:
    """Return B − A, and what it is over."""
    examples = ""
    if a.examples is not None and b.examples is not None:
        if not np.array_equal(a.examples, b.examples):
            return None, "other test examples"
        examples = "examples"
    paired = scores.difference(b, a) if a.seeds == b.seeds else None
    if paired is not None:
        return paired.estimate(), f"same seeds{' and ' + examples if examples else ''}, paired"
    return independent(a, b), f"independent seeds{', same ' + examples if examples else ''}"


def independent(a: scores.Sample, b: scores.Sample) -> estimates.Estimate:
    """Return B − A of two independent sets of seeds [S] and [T], which met the same examples where those are known.

    V = V_seed(a) + V_seed(b) + V_example(b − a), the parts of the seeds each with their own degrees of freedom.
    """
    left, right = a.estimate(), b.estimate()
    example, df = _example_variance(a, b) or (left.example + right.example, min(left.example_df, right.example_df))
    return replace(
        left,
        mean=right.mean - left.mean,
        seed_parts=(*left.seed_parts, *right.seed_parts),
        example=example,
        interaction=0.0,
        example_df=df,
        seeds=min(left.seeds, right.seeds),
    )


def _example_variance(a: scores.Sample, b: scores.Sample) -> tuple[float, float] | None:
    """Return V_example of the difference and its degrees of freedom, of examples that both met.

    Over examples, or over resamples drawn once for both.
    """
    if a.examples is None or b.examples is None:
        return None
    groups = b.groups if a.groups is None else a.groups
    mean = replace(b, seeds=(0,), groups=groups)
    if a.table is not None and b.table is not None:
        e = replace(
            mean, scores=mean.scores[:1], table=(b.table.mean(0) - a.table.mean(0))[None], draws=None
        ).estimate()
    elif a.draws is not None and b.draws is not None:
        e = replace(mean, scores=mean.scores[:1], draws=(b.draws.mean(1) - a.draws.mean(1))[:, None]).estimate()
    else:
        return None
    return (e.example, e.example_df) if e.example_df else None


# -- what differs ----------------------------------------------------------------------------------------------------


def _differing(a: Sweep, b: Sweep) -> Iterator[tuple[str, str, str]]:
    """Yield what differs, in A and in B: declared study, settings of runs (all their values), provenance."""
    for values in (_study, _settings, _provenance):
        left, right = values(a), values(b)
        for key in sorted(left.keys() | right.keys()):
            in_a, in_b = (_value_list(side.get(key, ())) for side in (left, right))
            if in_a != in_b:
                yield key, in_a, in_b


def _value_list(values: Iterable[str]) -> str:
    return ", ".join(sorted(values, key=formatting.natural_key)) or formatting.DASH


def _study(sweep: Sweep) -> dict[str, set[str]]:
    return {f"study.{k}": {str(v)} for k, v in sweep.study.items() if v is not None}


def _settings(sweep: Sweep) -> dict[str, set[str]]:
    """Return settings and their values.

    Seeds are apart by role: the tuning seeds of A are never set beside the confirmation seeds of B.
    """
    out: dict[str, set[str]] = {}
    for r in sweep.records.values():
        for key, value in flatten(r.config):
            if key != "role" and value is not None:
                name = f"seed ({r.role})" if key == "seed" else key
                out.setdefault(name, set()).add(f"{value:g}" if isinstance(value, float) else str(value))
    return out


def _provenance(sweep: Sweep) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for r in sweep.records.values():
        for key, value in _facts(r):
            out.setdefault(key, set()).add(value)
    return out


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    for key, value in record.provenance.items():
        if key in NESTED_PROVENANCE and isinstance(value, Mapping):
            yield from ((f"{key}.{k}", str(v)) for k, v in value.items() if f"{key}.{k}" not in IGNORED_PROVENANCE)
        elif key not in IGNORED_PROVENANCE and not isinstance(value, Mapping) and value is not None:
            yield {"code": "source hash"}.get(key, key), str(value)


# -- the page and the terminal ---------------------------------------------------------------------------------------

CELLS_NOTE = (
    "±: half the 95 % interval. Each difference stands alone: "
    "no correction for their number, and no reference declared, so they are exploratory."
)


def headline(c: SweepComparison) -> str:
    """Return what a reader must know first."""
    if c.obstacles:
        why = "; ".join(c.obstacles)
        return f"Not comparable: {why}. The numbers stand side by side; no difference is taken."
    with_difference = sum(p.difference is not None for p in c.pairs)
    in_both = formatting.plural(sum(p.a is not None and p.b is not None for p in c.pairs), "cell")
    return f"{in_both} in both sweeps, {with_difference} with a difference on test: of one metric, on the same data."


def cells_table(c: SweepComparison) -> Table:
    """Return a row a cell of either sweep."""
    columns = (
        Column("cell", "cell"),
        Column("a", f"A: {_title(c.a)}", "right"),
        Column("b", f"B: {_title(c.b)}", "right"),
        Column("difference", "B − A (95 %)", "right"),
        Column("over", "over"),
        Column("lr", "best lr, A and B", "right"),
        Column("seconds", "train s, A and B", "right"),
    )
    return Table("cells", "Cells", columns, tuple(Row(_texts(c, p)) for p in c.pairs), (CELLS_NOTE,))


def differences_table(c: SweepComparison) -> Table:
    """Return what differs between the two sweeps."""
    rows = tuple(Row((key, *(shorten(x, MAX_VALUE_LENGTH) for x in values))) for key, *values in c.differing)
    return Table("differing", "What differs", (Column("what", "what"), Column("a", "A"), Column("b", "B")), rows)


def _title(side: Side) -> str:
    split = "test" if side.sweep.confirmed else "validation"
    return f"{split} {side.metric.title}{unit_suffix(side.metric)}"


def _texts(c: SweepComparison, p: Pair) -> tuple[str, ...]:
    difference = formatting.DASH
    if p.difference is not None:
        bounds = f" ({c.a.metric.bounds(*p.difference.interval())})" if p.difference.seeds > 1 else ""
        difference = c.a.metric.difference(p.difference.mean) + bounds
    rates = [formatting.rate(r.lr if r else None) for r in (p.a, p.b)]
    seconds = [formatting.seconds(r.seconds if r else None) for r in (p.a, p.b)]
    rate = rates[0] if rates[0] == rates[1] else " | ".join(rates)
    return p.name, _score(c.a, p.a), _score(c.b, p.b), difference, p.how, rate, " | ".join(seconds)


def _sweep_name(side: Side) -> str:
    """Return the sweep's name, and its directory where that is called otherwise."""
    name, folder = side.sweep.name, side.sweep.store.root.resolve().name
    return name if name == folder else f"{name} ({folder})"


def _score(side: Side, r: Result | None) -> str:
    if r is None:
        return formatting.DASH
    if r.test is None:
        return formatting.DASH if side.sweep.confirmed else side.metric.value(r.val)
    return scores.with_interval(side.metric, r.test)


def markdown(c: SweepComparison) -> str:
    """Return the comparison as a file."""
    escape = table_formats.escape_markdown
    a, b = (escape(_sweep_name(s)) for s in (c.a, c.b))
    paragraphs = [f"# {a} and {b}", f"**{escape(headline(c))}**", f"A is {a}, B is {b}."]
    for table in (cells_table(c), differences_table(c)):
        body = table_formats.markdown(table) if table.rows else "Nothing."
        paragraphs += [f"## {table.title}", body, *(escape(n) for n in table.notes)]
    return "\n\n".join(paragraphs) + "\n"


def terminal_parts(c: SweepComparison) -> Iterator[WholeWords | Text]:
    """Yield what a terminal prints, one below the other."""
    from rich.text import Text

    yield Text(headline(c), style="bold red" if c.obstacles else "bold")
    yield Text(f"A is {_sweep_name(c.a)}, B is {_sweep_name(c.b)}.")
    for table in (cells_table(c), differences_table(c)):
        yield table_formats.rich_table(table) if table.rows else Text(f"{table.title}: nothing.")
