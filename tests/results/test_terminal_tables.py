"""At 80 columns a table breaks no word."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.report import terminal_table
from lorabench.results.terminal_tables import WholeWords


def words_at(width: int, table: object) -> set[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    assert max(map(len, out.getvalue().splitlines())) <= width
    return set(out.getvalue().split())


def test_a_sweep_with_long_names_and_an_axis(tmp_path: Path) -> None:
    extras = [{"extra": {"task.train_examples": n}} for n in (500, 2500)]
    cells = [
        Planted(p.method, p.rates, p.best, p.quality, r=p.r, label=label, config={"trainer": {"max_epochs": i + 1}})
        for i, label in enumerate(extras)
        for p in RANK_SWEEP[1:4]
    ]
    store = build(tmp_path / "sizes", cells)
    shown = words_at(80, terminal_table(store.root))
    assert {"accuracy", "trainable", "reference", "(train_examples", "2500)"} <= shown
    assert not any("…" in word for word in shown)


@pytest.mark.parametrize("justify", ["left", "right"])
def test_words_stay_whole_and_text_wraps(justify: str) -> None:
    table = Table()
    for name in ("cell", "comparable or not", "score", "trainable parameters"):
        table.add_column(name, justify=justify if name == "score" else "left")  # type: ignore[arg-type]
    table.add_row("full fine-tuning of all that there is in the base", "not comparable", "77.5 ± 1.2", "everything")
    shown = words_at(60, WholeWords(table))
    assert {"fine-tuning", "comparable", "parameters", "everything", "trainable"} <= shown
