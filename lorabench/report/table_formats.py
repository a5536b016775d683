"""Formats of a table: Markdown, LaTeX, terminal. The page's own template makes the HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lorabench.report import declared
from lorabench.report.tables import Table, comparison, plus_minus
from lorabench.results import formatting
from lorabench.results.findings import Findings
from lorabench.results.terminal_tables import WholeWords
from lorabench.runtime.terminal import plain

# -- Markdown --------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Return a table as Markdown. The recommended row is bold; notes are not part of it."""
    head = (escape_markdown(c.title) for c in table.columns)
    rule = "|" + "|".join("---:" if c.align == "right" else "---" for c in table.columns) + "|"
    lines = [_markdown_line(head), rule]
    for row in table.rows:
        texts = [escape_markdown(t) for t in row.texts]
        lines.append(_markdown_line(f"**{t}**" if row.mark == "recommended" and t else t for t in texts))
    return "\n".join(lines)


def _markdown_line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def escape_markdown(text: str) -> str:
    """Return text that stays text: nothing in it starts a cell, a tag, a link or emphasis."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


# -- LaTeX -----------------------------------------------------------------------------------------------------------

MIN_WRAPPED_LENGTH = 24  # characters; a column with a longer text breaks its lines
TEX_SYMBOLS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "α": r"$\alpha$", "Δ": r"$\Delta$", "–": "--", "…": r"\ldots{}",
    "⚠": r"$\dagger$", "×": r"$\times$", "“": "``", "”": "''", "→": r"$\rightarrow$", "«": r"$\ll$", "»": r"$\gg$",
    "φ": r"$\varphi$", "≤": r"$\le$", "≥": r"$\ge$", "≈": r"$\approx$", "‖": r"$\|$", "√": r"$\surd$",
    "σ": r"$\sigma$", "μ": r"$\mu$", "∞": r"$\infty$",
    "\0": "{}", "[": "{[}", "]": "{]}", "*": "{*}",  # after a row's end these would be read as its options
} | dict.fromkeys("ÐÞðþ", "?")  # fmt: skip


def escape_tex(text: str) -> str:
    """Return text for LaTeX. Characters that pdfTeX's fonts lack and that have no name here become `?`."""
    apart = re.sub(r"-(?=-)", "-\0", " ".join(text.split()))  # two hyphens would print as a dash
    return "".join(TEX_SYMBOLS.get(ch, ch if ord(ch) < 256 and ch.isprintable() else "?") for ch in apart)


def latex(table: Table) -> str:
    """Return a `tabular` with booktabs' rules, to be \\input; columns of long texts break their lines."""
    wrapped = [any(len(row.texts[i]) > MIN_WRAPPED_LENGTH for row in table.rows) for i in range(len(table.columns))]
    width = f"p{{{min(0.3, 0.75 / max(sum(wrapped), 1)):.2f}\\linewidth}}"
    kinds = ("r" if c.align == "right" else "l" for c in table.columns)
    spec = "".join(width if wide else kind for kind, wide in zip(kinds, wrapped, strict=True))
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    lines += [" & ".join(escape_tex(c.title) for c in table.columns) + r" \\", r"\midrule"]
    for row in table.rows:
        texts = [
            f"\\raggedright {escape_tex(t)}" if wide else escape_tex(t)
            for t, wide in zip(row.texts, wrapped, strict=True)
        ]
        if wrapped[-1]:
            texts[-1] = f"{{{texts[-1]}\\par}}"  # or the row's end would be a line's
        lines.append(" & ".join(f"\\textbf{{{t}}}" if row.mark == "recommended" and t else t for t in texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {' '.join(note.split())}" for note in table.notes)]
    return "\n".join(lines) + "\n"


# -- terminal --------------------------------------------------------------------------------------------------------


def rich_table(table: Table) -> WholeWords:
    """Return a table for a terminal, its notes below it; no markup of a user's is read."""
    from rich import box
    from rich.table import Table as RichTable

    out = RichTable(title=plain(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        out.add_column(plain(column.title), justify=column.align, vertical="bottom", overflow="fold")
    for row in table.rows:
        out.add_row(*map(plain, row.texts))
    out.caption, out.caption_justify = plain("\n".join(table.notes)), "left"
    return WholeWords(out)


def terminal_comparison(f: Findings, caption: str) -> WholeWords:
    """Return the comparison at the width of a terminal: one name a cell, what decides, what it costs."""
    from rich import box
    from rich.table import Table as RichTable

    out = RichTable(
        title=plain(f.sweep.name),
        caption=plain(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for title in _terminal_head(f):
        out.add_column(
            plain(title),
            justify="left" if title == "cell" or title.startswith("within") else "right",
            vertical="bottom",
        )
    for row, r in zip(comparison(f).rows, f.results.values(), strict=True):
        score = plus_minus(f, r) if f.confirmed else f.metric.value(r.val)
        verdict = _terminal_verdict(f, r.id) if f.versus else ()
        costs = formatting.compact(r.cell.trainable), formatting.seconds(r.seconds)
        texts = (r.name, formatting.rate(r.lr), score, *verdict, *costs)
        out.add_row(*map(plain, texts), style="bold" if row.mark == "recommended" else None)
    return WholeWords(out)


def _terminal_head(f: Findings) -> Iterator[str]:
    unit = f" {f.metric.unit}" if f.metric.unit else ""
    yield from ("cell", "best\nlr", f"{'test' if f.confirmed else 'val'}\n{f.metric.title}{unit}")
    if f.versus and f.reference:
        yield from ("Δ to the\nreference", f"within\n± {declared.margin(f, unit=False)}")
    yield from ("trainable", "train\ns")


def _terminal_verdict(f: Findings, cell: str) -> tuple[str, str]:
    """Return `-1.6 worse` and `beyond`; a question mark where the direction or the size is open."""
    against_reference = f.versus.get(cell)
    if against_reference is None:
        return "reference" if cell == f.reference else "", ""
    difference = f.metric.difference(against_reference.estimate.mean)
    if against_reference.blocked:
        return f"{difference} no verdict", "?"
    direction, size = against_reference.direction, against_reference.size
    return (
        f"{difference} {'?' if direction == 'not resolved' else direction}",
        "?" if size == "not resolved" else size,
    )
