"""The faces of a table: Markdown, LaTeX, terminal. The page's own template makes the HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorabench.report.findings import Findings
from lorabench.report.tables import Table, comparison

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


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "α": r"$\alpha$", "Δ": r"$\Delta$",
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


TERMINAL = ("name", "lr", "test", "val", "trainable", "seconds", "difference", "verdict")


def terminal(f: Findings, caption: str) -> RichTable:
    """The comparison at the width of a terminal: one name a cell, and what decides."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = comparison(f)
    where = {c.key: i for i, c in enumerate(table.columns)}
    shown = [k for k in TERMINAL if k in where or k == "name" or (k == "verdict" and f.versus)]
    titles = {"name": "cell", "verdict": f"against ± {f.metric.size(f.sweep.margin)}", "seconds": "train s"}
    out = RichTable(
        title=escape(f.sweep.name), caption=escape(caption), caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for key in shown:
        title = titles.get(key) or table.columns[where[key]].title
        out.add_column(escape(title), justify="left" if key in ("name", "verdict") else "right")
    for row, result in zip(table.rows, f.results.values(), strict=True):
        texts = {k: row.texts[i] for k, i in where.items()} | {"name": result.name}
        texts["verdict"] = ", ".join(dict.fromkeys(t for t in (texts.get("direction"), texts.get("size")) if t))
        out.add_row(*(escape(texts[k]) for k in shown), style="bold" if row.mark == "recommended" else None)
    return out
