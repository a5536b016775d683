"""The faces of a table: Markdown, LaTeX, terminal. The page's own template makes the HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorabench.report import declared
from lorabench.report.tables import Table, comparison, plus_minus
from lorabench.results import formatting
from lorabench.results.findings import Findings

if TYPE_CHECKING:
    from rich.table import Table as RichTable


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


TEX_SYMBOLS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "α": r"$\alpha$", "Δ": r"$\Delta$",
    "–": "--", "…": r"\ldots{}", "⚠": r"$\dagger$", "×": r"$\times$", "“": "``", "”": "''", "→": r"$\rightarrow$",
    "«": r"$\ll$", "»": r"$\gg$", "φ": r"$\varphi$", "≤": r"$\le$", "≥": r"$\ge$", "≈": r"$\approx$", "‖": r"$\|$", "√": r"$\surd$", "σ": r"$\sigma$", "μ": r"$\mu$", "∞": r"$\infty$",
    "\0": "{}", "[": "{[}", "]": "{]}", "*": "{*}",  # after a row's end these would be read as its options
} | dict.fromkeys("ÐÞðþ", "?")  # fmt: skip


def escape_tex(text: str) -> str:
    """LaTeX text. Characters that pdfTeX's own fonts lack and that have no name here become `?`: it would stop at them."""
    apart = re.sub(r"-(?=-)", "-\0", " ".join(text.split()))  # two hyphens would print as a dash
    return "".join(TEX_SYMBOLS.get(ch, ch if ord(ch) < 256 and ch.isprintable() else "?") for ch in apart)


MIN_WRAPPED_LENGTH = 24  # characters of a text from which its column breaks lines


def latex(table: Table) -> str:
    """A `tabular` with booktabs' rules, to be \\input; columns of long texts break their lines."""
    long = [any(len(row.texts[i]) > MIN_WRAPPED_LENGTH for row in table.rows) for i in range(len(table.columns))]
    width = f"p{{{min(0.3, 0.75 / max(sum(long), 1)):.2f}\\linewidth}}"
    kinds = [width if wide else "r" if c.align == "right" else "l" for c, wide in zip(table.columns, long, strict=True)]
    spec = "".join(kinds)
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    lines += [" & ".join(escape_tex(c.title) for c in table.columns) + r" \\", r"\midrule"]
    for row in table.rows:
        cells = [
            f"\\raggedright {escape_tex(t)}" if wide else escape_tex(t) for t, wide in zip(row.texts, long, strict=True)
        ]
        if long[-1]:
            cells[-1] = f"{{{cells[-1]}\\par}}"  # or the row's end would be a line's
        lines.append(" & ".join(f"\\textbf{{{t}}}" if row.mark == "recommended" and t else t for t in cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {' '.join(note.split())}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def rich_table(table: Table) -> RichTable:
    """A table for a terminal, its notes below it; no markup of a user's is read."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    out = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        out.add_column(Text(column.title), justify=column.align, vertical="bottom", overflow="fold")
    for row in table.rows:
        out.add_row(*map(Text, row.texts))
    out.caption, out.caption_justify = Text("\n".join(table.notes)), "left"
    return out


def terminal_comparison(f: Findings, caption: str) -> RichTable:
    """The comparison at the width of a terminal: one name a cell, what decides, what it costs."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    out = RichTable(
        title=escape(f.sweep.name),
        caption=escape(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    unit = f" {f.metric.unit}" if f.metric.unit else ""
    head = ["cell", "best\nlr", f"{'test' if f.confirmed else 'val'}\n{f.metric.title}{unit}"]
    if f.versus and f.reference:
        head += ["Δ to the\nreference", f"within\n± {declared.margin(f, unit=False)}"]
    for title in [*head, "trainable", "train\ns"]:
        left = title == "cell" or title.startswith("within")
        out.add_column(
            escape(title),
            justify="left" if left else "right",
            vertical="bottom",
            no_wrap=title == "cell",
            min_width=16 if title == "cell" else None,
        )
    for row, r in zip(comparison(f).rows, f.results.values(), strict=True):
        score = plus_minus(f, r) if f.confirmed else f.metric.value(r.val)
        texts = [r.name, formatting.rate(r.lr), score, *(_terminal_verdict(f, r.id) if f.versus else ())]
        texts += [formatting.compact(r.cell.trainable), formatting.seconds(r.seconds)]
        out.add_row(*map(escape, texts), style="bold" if row.mark == "recommended" else None)
    return out


def _terminal_verdict(f: Findings, cell: str) -> tuple[str, str]:
    """`-1.6 worse`, `beyond`; a question mark where the direction is open."""
    made = f.versus.get(cell)
    if made is None:
        return "reference" if cell == f.reference else "", ""
    said = "no verdict" if made.blocked else "?" if made.direction == "not resolved" else made.direction
    return (
        f"{f.metric.difference(made.estimate.mean)} {said}",
        "?" if made.blocked or made.size == "not resolved" else made.size,
    )
