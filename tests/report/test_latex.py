"""`tables/*.tex` in a real document: what the reports' README names is all that they need."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.report import render, table_formats
from lorabench.report.tables import Column, Row, Table

SPECIAL = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}
HOSTILE = (
    "".join(SPECIAL),
    r"\input{secret}",
    "[2pt] after a row's end",
    "*",
    "a--b",
    "<script>",
    "`\"'",
    "日本語",
    "é ß «x» Ð",
    "\x00\x07",
    "α ± 1 → 2",
)
pdflatex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed (texlive-latex-base)")


def document(repo: Path, table: str) -> str:
    """The reports' README has the document; a table takes the place of its own."""
    text = (repo / "reports/README.md").read_text(encoding="utf-8")
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    found = "\n".join(lines[lines.index(r"\documentclass{article}") : lines.index(r"\end{document}") + 1])
    assert re.findall(r"\\usepackage\{(\w+)\}", found) == ["booktabs"]
    return re.sub(r"\\input\{[^}]+\}", lambda _: f"\\input{{{table}}}", found)


def compiled(folder: Path, source: str) -> str:
    """The log of a run that must end well and leave one PDF."""
    (folder / "paper.tex").write_text(source, encoding="utf-8")
    argv = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, timeout=120)
    log = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, log[-2000:]
    assert (folder / "paper.pdf").read_bytes().startswith(b"%PDF")
    return log


@pytest.mark.parametrize("char", SPECIAL)
def test_a_special_character_is_escaped_wherever_it_stands(char: str) -> None:
    table = Table("t", "t", (Column("a", char), Column("b", f"b{char}")), (Row((f"x{char}y", char)),))
    lines = table_formats.latex(table).splitlines()
    assert lines[3] == rf"{SPECIAL[char]} & b{SPECIAL[char]} \\"
    assert lines[5] == rf"x{SPECIAL[char]}y & {SPECIAL[char]} \\"


def test_what_would_be_read_as_an_option_or_a_dash() -> None:
    lines = table_formats.latex(Table("t", "t", (Column("a", "a"),), (Row(("[2pt]",)), Row(("*--x",))))).splitlines()
    assert (lines[5], lines[6]) == (r"{[}2pt{]} \\", r"{*}-{}-x \\")


def test_columns_of_long_texts_break_their_lines() -> None:
    made = table_formats.latex(
        Table("t", "t", (Column("a", "a"), Column("b", "b", "right")), (Row(("word " * 30, "1")),))
    )
    assert r"\begin{tabular}{p{0.30\linewidth}r}" in made
    assert "\\raggedright word word" in made


def test_no_character_of_our_own_texts_is_lost(repo: Path) -> None:
    sources = [p.read_text(encoding="utf-8") for p in (repo / "lorabench/report").glob("*.py")]
    lost = {ch for text in sources for ch in text if ord(ch) > 255 and table_formats.escape_tex(ch) == "?"}
    assert not lost, "characters that tables print as `?`: give them a name in faces.TEX"


@pdflatex
def test_every_table_of_a_report_compiles(tmp_path: Path, repo: Path) -> None:
    hostile = Planted(
        "lora",
        (1e-3, 2e-3),
        2e-3,
        0.7,
        r=2,
        label={"targets": "a_b&c%d#e~f^g\\h{i}$j", "extra": {"task.x_y": "50 % & [1]"}},
    )
    root = build(tmp_path / "a_sweep", (*RANK_SWEEP, hostile)).root
    render(root, tmp_path / "report")
    made = sorted(tmp_path.glob("*/tables/*.tex"))
    assert {p.stem for p in made} >= {"comparison", "rates", "claims", "lost"}
    for table in made:
        log = compiled(tmp_path, document(repo, table.relative_to(tmp_path).as_posix()))
        assert "undefined" not in log, table


@pdflatex
def test_hostile_texts_compile(tmp_path: Path, repo: Path) -> None:
    latin = "".join(map(chr, range(32, 256)))
    texts = [*HOSTILE, *(latin[i : i + 30] for i in range(0, len(latin), 30))]
    rows = tuple(Row((t, t * 5)) for t in texts)
    (tmp_path / "t.tex").write_text(
        table_formats.latex(Table("t", "t", (Column("a", HOSTILE[0]), Column("b", "[x]")), rows)), encoding="utf-8"
    )
    assert "Missing character" not in compiled(tmp_path, document(repo, "t.tex"))
