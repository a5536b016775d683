"""Samples before and after: which runs, which rows, and texts that must stay text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from fixtures.planted_sweeps import opened, with_samples
from fixtures.sweeps import RANK_SWEEP, build
from lorabench.report import render
from lorabench.report.sections import samples
from lorabench.store.records import Store

SMALL, LARGE = "lora-r16-a16-all-linear", "lora-r64-a16-all-linear"  # recommended, reference
CELLS = (RANK_SWEEP[2], RANK_SWEEP[3])
HOSTILE = "<script>alert('x')</script> & <img src=x onerror=y> {{ 7 * 7 }} \\textbf | =1+1"


def rows(n: int, *, before: str = "b", after: str = "a") -> list[dict[str, str]]:
    return [
        {"text": f"text {k}", "expected": f"e{k}", "before": f"{before}{k}", "after": f"{after}{k}"} for k in range(n)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return build(tmp_path / "s", CELLS)


def table(store: Store) -> samples.Table | None:
    made = samples.section(opened(store)[0])
    return made.tables[0] if made else None


def test_the_recommended_cell_beside_the_reference(store: Store) -> None:
    one = with_samples(store, SMALL, rows(3, after="small"))
    two = with_samples(store, LARGE, rows(3, after="large"))
    f, _ = opened(store)
    assert f.recommendation is not None and (f.recommendation.cell, f.reference) == (SMALL, LARGE)
    made = table(store)
    assert made is not None
    assert [c.title for c in made.columns] == ["text", "expected", "before", "after, LoRA r = 16", "after, LoRA r = 64"]
    assert made.rows[1].texts == ("text 1", "e1", "b1", "small1", "large1")
    assert made.rows[1].runs == (one.run_id, two.run_id)
    assert one.run_id in made.notes[0] and two.run_id in made.notes[0]


def test_two_starts_are_both_shown(store: Store) -> None:
    with_samples(store, SMALL, rows(2, before="x"))
    with_samples(store, LARGE, rows(2, before="y"))
    made = table(store)
    assert made is not None
    assert made.rows[0].texts == ("text 0", "e0", "x0", "a0", "y0", "a0")


def test_at_most_eight_rows_and_long_texts_are_cut(store: Store) -> None:
    with_samples(
        store,
        SMALL,
        [{"prompt": f"{k} " + "long " * 100, "expected": "", "before": "", "after": "x"} for k in range(20)],
    )
    made = table(store)
    assert made is not None
    assert len(made.rows) == samples.MAX_ROWS == 8
    assert all(len(r.texts[0]) <= samples.MAX_TEXT_LENGTH and r.texts[0].endswith("…") for r in made.rows)
    assert made.rows[0].texts[1:] == ("–", "–", "x")


def test_texts_that_two_runs_do_not_share(store: Store) -> None:
    with_samples(store, SMALL, rows(9))
    with_samples(store, LARGE, [{**r, "text": r["text"] + "!"} for r in rows(9)])
    made = table(store)
    assert made is not None
    assert [r.texts[0] for r in made.rows] == [f"text {k}" for k in range(4)] + [f"text {k}!" for k in range(4)]
    assert made.rows[0].texts[-1] == "–" and made.rows[7].texts[3] == "–"


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "{}", '[{"text": ""}]', "[]"])
def test_a_torn_or_foreign_file_counts_as_none(content: str, store: Store) -> None:
    with_samples(store, SMALL, content)
    assert table(store) is None


def test_nothing_without_samples(store: Store) -> None:
    assert table(store) is None


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


@pytest.mark.usefixtures("undrawn")
def test_texts_stay_text_in_every_face(store: Store, tmp_path: Path) -> None:
    hostile = [{"text": HOSTILE, "expected": "better", "before": "half \ud800 \x00", "after": "=1+1"}]
    with_samples(store, SMALL, hostile)
    render(store.root, tmp_path / "r")
    page = (tmp_path / "r/report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.found and "img" not in tags.found
    assert "&lt;script&gt;alert" in page and "{{ 7 * 7 }}" in page and "\x00" not in page
    md = (tmp_path / "r/report.md").read_text(encoding="utf-8")
    assert "\\<script\\>" in md and "\\|" in md
    tex = (tmp_path / "r/tables/samples.tex").read_text(encoding="utf-8")
    assert r"\textbackslash{}textbf" in tex
    assert "'=1+1" in (tmp_path / "r/tables/samples.csv").read_text(encoding="utf-8")
    render(store.root, tmp_path / "again")
    assert (tmp_path / "again/report.html").read_bytes() == (tmp_path / "r/report.html").read_bytes()
