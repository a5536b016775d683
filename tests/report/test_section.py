"""Whole pages of sweeps that have many parts: headings in order, words for figures, equal bytes; and what stood there before."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from fixtures.planted_sweeps import rule_sweep, target_sweep, with_probe, with_samples
from lorabench.report import render
from lorabench.store.records import Store

HAVE = {
    "rules": ("alpha_rates", "best_rates", "pareto"),
    "targets": ("targets", "pareto", "forgetting", "samples"),
}


@pytest.fixture(scope="module", params=HAVE)
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Store, Path]:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "rules":
        store = rule_sweep(root / "s", diverges=1.9e-3)
    else:
        store = target_sweep(root / "s", tune=(0, 1))
        with_probe(store)
        with_samples(store, "lora-r20-a2r-all", [{"text": "t", "expected": "e", "before": "b", "after": "a"}])
    render(store.root, root / "r")
    return request.param, store, root / "r"


def test_every_part_in_every_face(rendered: tuple[str, Store, Path]) -> None:
    name, _, out = rendered
    page, md = ((out / f"report.{x}").read_text(encoding="utf-8") for x in ("html", "md"))
    assert re.findall(r'<h2 id="part-(\w+)">', page) == list(HAVE[name])
    for key in HAVE[name]:
        if key != "samples":
            assert f"figures/{key}.svg" in md and (out / f"figures/{key}.png").stat().st_size > 1000
            assert f'<figure id="{key}"' in page
        if key != "alpha_rates":
            for ending in ("tex", "csv"):
                assert (out / f"tables/{'slopes' if key == 'best_rates' else key}.{ending}").is_file()


def test_headings_go_down_one_level_at_a_time(rendered: tuple[str, Store, Path]) -> None:
    levels = [int(n) for n in re.findall(r"<h([1-6])[ >]", (rendered[2] / "report.html").read_text(encoding="utf-8"))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_ids_are_unique_and_figures_have_words(rendered: tuple[str, Store, Path]) -> None:
    page = (rendered[2] / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    alts = re.findall(r'<title id="(\w+)-alt">([^<]+)</title>', page)
    assert len(alts) == page.count("<figure") and all(len(text) > 40 for _, text in alts)


def test_equal_records_give_equal_bytes(rendered: tuple[str, Store, Path], tmp_path: Path) -> None:
    _, store, out = rendered
    render(store.root, tmp_path / "again")
    files = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert [p for p in files if (out / p).read_bytes() != (tmp_path / "again" / p).read_bytes()] == []


@pytest.mark.usefixtures("undrawn")
def test_training_lost_runs_subspaces_and_spectra_are_in_the_page(repo: Path, tmp_path: Path) -> None:
    """The committed sweep has all of them but lost runs, which the planted one has."""
    render(repo / "sweeps/ref_rank_sweep", tmp_path / "r")
    page = (tmp_path / "r/report.html").read_text(encoding="utf-8")
    for key in ("training", "subspaces", "spectra", "pareto"):
        assert f'<figure id="{key}"' in page, key
    lost = rule_sweep(tmp_path / "s", diverges=1.9e-3, confirm=())
    render(lost.root, tmp_path / "lost")
    assert "Runs that failed, diverged or were pruned" in (tmp_path / "lost/report.html").read_text(encoding="utf-8")
