"""Tables as rows of text, and their faces: Markdown, LaTeX, terminal, CSV. The page's own template makes the HTML."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lorabench.records import Record
from lorabench.report import formats
from lorabench.report.findings import Comparison, Findings, Result
from lorabench.report.load import flatten

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Align = Literal["left", "right"]


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    align: Align = "left"


@dataclass(frozen=True)
class Row:
    """One row: its texts, the run_ids its numbers come from, a mark for the eye, an interval to draw."""

    texts: tuple[str, ...]
    runs: tuple[str, ...] = ()
    mark: str = ""  # recommended, reference, lost, chosen
    interval: tuple[float, float, float] | None = None  # low, mean, high


@dataclass(frozen=True)
class Table:
    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())


def every(f: Findings) -> dict[str, Table]:
    """All tables that have rows, by key."""
    made = (comparison(f), rates(f), lost(f), outside(f))
    return {t.key: t for t in made if t.rows}


# -- the comparison ------------------------------------------------------------------------------------------------------


def comparison(f: Findings) -> Table:
    """One row a cell: what it is, how well it does, what it costs, and how it stands to the reference."""
    m, solo = f.metric, all(r.solo for r in f.results.values() if r.runs)
    extra = sorted({k for r in f.results.values() for k, _ in r.cell.extra})
    unit = f" ({m.unit})" if m.unit else ""
    test = [Column("test", f"test {m.title}{unit}", "right"), Column("seeds", "seeds", "right")] if f.confirmed else []
    against = f.results[f.reference].name if f.reference else ""
    margin = m.size(f.sweep.margin)
    versus = (
        [
            Column("difference", f"− {against}, 95 %", "right"),
            Column("direction", "direction"),
            Column("size", f"margin ± {margin}"),
        ]
        if f.versus
        else []
    )
    columns = (
        Column("method", "method"), Column("r", "r", "right"), Column("alpha", "α", "right"), Column("targets", "targets"),
        *(Column(k, k.split(".")[-1]) for k in extra), Column("lr", "best lr", "right"), *test, Column("val", f"val {m.title}{unit}", "right"),
        Column("trainable", "trainable", "right"), Column("share", "of base", "right"),
        Column("seconds", "train s, solo" if solo else "train s, share of pack", "right"),
        Column("memory", "peak memory, solo" if solo else "peak memory, pack", "right"), *versus,
    )  # fmt: skip
    rows = tuple(_comparison_row(f, r, [c.key for c in columns], solo) for r in f.results.values())
    return Table("comparison", "Comparison", columns, rows, tuple(_comparison_notes(f)))


def _comparison_row(f: Findings, r: Result, keys: Sequence[str], solo: bool) -> Row:
    c, m, e = r.cell, f.metric, r.test
    mixed = "" if solo or not r.solo else " solo"
    texts = {
        "method": c.method, "r": str(c.r) if c.adapter else formats.DASH, "alpha": _alpha(r), "targets": c.targets or formats.DASH,
        "lr": formats.rate(r.lr) + (" ⚠" if r.choice.edge else ""), "seeds": str(e.seeds) if e else formats.DASH,
        "test": _plus_minus(f, r), "val": m.value(r.val), "trainable": formats.count(c.trainable),
        "share": formats.share(c.trainable, r.resource("total_parameters")), "seconds": formats.seconds(r.seconds) + mixed,
        "memory": formats.memory(r.memory) + mixed, **dict(c.extra), **_versus(f, r),
    }  # fmt: skip
    recommended = f.recommendation is not None and f.recommendation.cell == r.id
    mark = "recommended" if recommended else "reference" if r.id == f.reference and f.versus else ""
    interval = (e.interval()[0], e.mean, e.interval()[1]) if e and e.seeds > 1 else None
    return Row(tuple(texts.get(k, formats.DASH) for k in keys), tuple(x.run_id for x in r.runs), mark, interval)


def _plus_minus(f: Findings, r: Result) -> str:
    if r.test is None:
        return formats.DASH
    half = f" ± {f.metric.size(r.test.half_width(), unit=False)}" if r.test.seeds > 1 else ""
    return f.metric.value(r.test.mean) + half


def _alpha(r: Result) -> str:
    c = r.cell
    if not c.adapter or c.alpha is None:
        return formats.DASH
    value = f"{c.alpha:.4g}"
    return f"{value} ({c.alpha_rule})" if c.alpha_rule and not c.alpha_rule.startswith(value[:4]) else value


def _versus(f: Findings, r: Result) -> dict[str, str]:
    if r.id == f.reference:
        return {"difference": "reference", "direction": "", "size": ""}
    made = f.versus.get(r.id)
    if made is None:
        return {}
    bounds = f.metric.bounds(*made.estimate.interval())
    text = f"{f.metric.difference(made.estimate.mean)} ({bounds})"
    return {"difference": text, "direction": _verdict(made, made.direction), "size": _verdict(made, made.size)}


def _verdict(made: Comparison, verdict: str) -> str:
    return "no verdict" if made.blocked else verdict


def _comparison_notes(f: Findings) -> Iterable[str]:
    tests = [r.test for r in f.results.values() if r.test is not None]
    if tests:
        counts = sorted({e.examples for e in tests if e.examples})
        examples = " or ".join(f"{n:,}" for n in counts)
        over = f"seeds and {examples} test examples, crossed" if counts else "seeds alone"
        yield f"±: half the 95 % interval over {over}. Rates were chosen on validation; only confirmation runs saw test."
    if f.pooled:
        sd = f.metric.size(f.pooled.within**0.5)
        yield f"Seed variance is pooled over the {f.pooled.cells} adapter cells (a seed's standard deviation: {sd}; Bartlett p = {f.pooled.p:.2f})."
    if f.versus and f.reference:
        declared = (
            "declared" if f.sweep.study.get("reference") == f.reference else "the largest rank, as none was declared"
        )
        yield (f"Direction: Holm-adjusted within the {len(f.versus)} comparisons with {f.results[f.reference].name} ({declared}). "
               f"Margin: two one-sided tests at 5 %, apart from the direction. “Not resolved” is not “equal”.")  # fmt: skip
    if any(not r.solo for r in f.results.values() if r.runs):
        yield "Time is the pack's divided by its runs, memory the pack's peak: runs trained side by side on one base, so neither is a cell's own."
    if any(r.choice.edge for r in f.results.values()):
        yield "⚠ the best rate is at an end of its grid."


# -- rates, lost runs, strangers -----------------------------------------------------------------------------------------


def rates(f: Findings) -> Table:
    columns = (
        Column("cell", "cell"), Column("lr", "lr", "right"), Column("loss", "mean val loss", "right"),
        Column("seeds", "seeds done", "right"), Column("lost", "diverged or failed", "right"), Column("mark", ""),
    )  # fmt: skip
    rows = []
    for r in f.results.values():
        for x in r.choice.rates:
            chosen = x.lr == r.choice.lr
            mark = "chosen, at the edge" if chosen and r.choice.edge else "chosen" if chosen else "ineligible" if x.failures else (
                "incomplete" if x.missing else "")  # fmt: skip
            loss = formats.number(x.mean, 4)
            texts = (r.name, formats.rate(x.lr), loss, f"{len(x.losses)} of {x.seeds}", str(x.failures or ""), mark)
            rows.append(Row(texts, mark="chosen" if chosen else "lost" if x.failures else ""))
    return Table(
        "rates",
        "Learning rates",
        columns,
        tuple(rows),
        ("A rate at which any seed diverged or failed is not eligible. Ties go to the smaller rate.",),
    )


def lost(f: Findings) -> Table:
    """Runs that failed, diverged or were pruned."""
    columns = tuple(
        Column(k, k, "right" if k in ("lr", "seed") else "left")
        for k in ("cell", "role", "lr", "seed", "status", "why", "run")
    )
    rows = [
        Row((r.name, x.role, formats.rate(x.config["optimizer"]["lr"]), str(x.config["seed"]), x.status, reason(x.error), x.run_id), (x.run_id,), "lost")
        for r in f.results.values()
        for x in sorted(f.sweep.ended((*r.cell.tune, *r.cell.confirm)), key=lambda x: x.run_id)
        if x.status != "completed"
    ]  # fmt: skip
    return Table("lost", "Runs that failed, diverged or were pruned", columns, tuple(rows))


def outside(f: Findings) -> Table:
    columns = tuple(
        Column(k, k, "right" if k in ("lr", "seed") else "left")
        for k in ("run", "method", "role", "lr", "seed", "status")
    )
    rows = [
        Row((x.run_id, str(x.config["method"]["name"]), x.role, formats.rate(x.config["optimizer"]["lr"]), str(x.config["seed"]), x.status), (x.run_id,))
        for x in f.sweep.outside
    ]  # fmt: skip
    return Table(
        "outside",
        "Records outside the manifest",
        columns,
        tuple(rows),
        ("They are in the sweep's directory, but no cell lists them: no number above uses them.",),
    )


def reason(error: str | None) -> str:
    """The first line of an error, without the folders of the machine it came from."""
    first = (error or "").strip().splitlines()[:1]
    text = re.sub(r"(?:[A-Za-z]:)?(?:[\\/][^\s'\"\\/:,]+)+[\\/]([^\s'\"\\/:,]+)", r"…/\1", first[0] if first else "")
    return text if len(text) <= 160 else text[:159] + "…"


# -- faces ---------------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(escape_markdown(t) for t in texts) + " |"

    rule = "|" + "|".join("---:" if c.align == "right" else "---" for c in table.columns) + "|"
    bold = [
        tuple(f"**{escape_markdown(t)}**" if r.mark == "recommended" and t else escape_markdown(t) for t in r.texts)
        for r in table.rows
    ]
    return "\n".join([line(c.title for c in table.columns), rule, *("| " + " | ".join(b) + " |" for b in bold)])


def escape_markdown(text: str) -> str:
    """Text that stays text: nothing in it starts a cell, a tag, a link or emphasis."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "α": r"$\alpha$",
    "–": "--", "…": r"\ldots{}", "⚠": r"$\dagger$", "×": r"$\times$", "“": "``", "”": "''", "→": r"$\rightarrow$",
}  # fmt: skip


def escape_tex(text: str) -> str:
    """LaTeX text. Characters outside Latin-1 that have no name here become `?`: pdfTeX would stop at them."""
    return "".join(TEX.get(ch, ch if ord(ch) < 256 and ch.isprintable() else "?") for ch in " ".join(text.split()))


def latex(table: Table) -> str:
    """A `tabular` with booktabs' rules, to be \\input."""
    spec = "".join("r" if c.align == "right" else "l" for c in table.columns)
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    lines += [" & ".join(escape_tex(c.title) for c in table.columns) + r" \\", r"\midrule"]
    for row in table.rows:
        cells = [escape_tex(t) for t in row.texts]
        lines.append(" & ".join(f"\\textbf{{{t}}}" if row.mark == "recommended" and t else t for t in cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {' '.join(note.split())}" for note in table.notes)]
    return "\n".join(lines) + "\n"


TERMINAL = ("name", "lr", "test", "val", "trainable", "seconds", "difference", "direction", "size")


def terminal(f: Findings, caption: str) -> RichTable:
    """The comparison at the width of a terminal: one name a cell, and what decides."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = comparison(f)
    where = {c.key: i for i, c in enumerate(table.columns)}
    shown = [k for k in TERMINAL if k == "name" or k in where]
    out = RichTable(title=escape(f.sweep.name), caption=escape(caption), caption_justify="left")
    for key in shown:
        column = Column("name", "cell") if key == "name" else table.columns[where[key]]
        out.add_column(escape(column.title), justify=column.align)
    for row, result in zip(table.rows, f.results.values(), strict=True):
        texts = [result.name if k == "name" else row.texts[where[k]] for k in shown]
        out.add_row(*(escape(t) for t in texts), style="bold" if row.mark == "recommended" else None)
    return out


# -- every run -----------------------------------------------------------------------------------------------------------

CSV_RESOURCES = ("train_seconds", "eval_seconds", "pack_seconds", "pack_size", "solo_seconds", "peak_memory_bytes", "solo_peak_memory_bytes",
                 "trainable_parameters", "total_parameters", "steps", "examples", "tokens")  # fmt: skip


def runs_csv(f: Findings) -> str:
    """A row a run of a cell, by cell, then run_id; then the runs outside. A run in two cells has two rows."""
    listed: list[tuple[str, Record]] = []
    for r in f.results.values():
        found = sorted(f.sweep.ended((*r.cell.tune, *r.cell.confirm)), key=lambda x: x.run_id)
        listed += [(r.id, x) for x in found]
    listed += [("", x) for x in f.sweep.outside]
    metrics = sorted({k for _, x in listed for k, v in x.metrics.items() if "/" in k and not isinstance(v, str)})
    resources = [k for k in CSV_RESOURCES if any(k in x.resources for _, x in listed)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = (
        "cell",
        "run_id",
        "role",
        "status",
        "method",
        "r",
        "alpha",
        "targets",
        "lr",
        "seed",
        "precision",
        "best_step",
    )
    writer.writerow([*head, *metrics, *resources, "error"])
    for cell, x in listed:
        config = dict(flatten(x.config))
        targets = config.get("method.target_modules")
        row: list[Any] = [
            cell, x.run_id, x.role, x.status, config.get("method.name"), config.get("method.r"), config.get("method.alpha"),
            "+".join(targets) if isinstance(targets, list) else targets, config.get("optimizer.lr"), config.get("seed"),
            x.provenance.get("precision"), x.metrics.get("best_step"), *(x.metrics.get(k) for k in metrics),
            *(x.resources.get(k) for k in resources), reason(x.error),
        ]  # fmt: skip
        writer.writerow([_csv(v) for v in row])
    return out.getvalue()


def _csv(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front; floats get nine digits."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@", "\t", "\r", "|", "%"):
        return "'" + value
    return "" if value is None else value
