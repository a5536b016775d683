"""The parts of pictures that can be checked without looking: colours, labels, ids. And one look in a browser."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.report import curves, figures, render, theme
from lorabench.results.findings import find
from lorabench.results.formatting import Metric, compact, duration, memory, number, rate, share
from lorabench.results.sweep import load


def contrast(colour: str) -> float:
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_one_hue_a_method_lighter_for_smaller_ranks(tmp_path: Path) -> None:
    cells = load(build(tmp_path / "s").root).cells
    found = theme.looks(cells)
    ranks = [found[c.id].colour for c in cells if c.adapter]
    assert len(set(ranks)) == 4
    assert sorted(ranks, key=contrast) == ranks
    assert all(contrast(c) >= 2 for c in ranks)
    assert all(contrast(theme.readable_colour(c)) >= 4.5 for c in ranks)
    assert found["full-everything"].colour == theme.HUES["full"]


def test_a_panel_of_rates_names_no_alpha_where_there_is_none() -> None:
    def cell(rule: str | None) -> SimpleNamespace:
        found = SimpleNamespace(method="VeRA", r=8, adapter=True, alpha_rule=rule, extra=(("task.max_length", "64"),))
        return SimpleNamespace(cell=found)

    titles = [curves.family(cell(rule)) for rule in (None, "16")]  # type: ignore[arg-type]
    assert titles == ["VeRA, max_length 64", "VeRA, α = 16, max_length 64"]


def test_a_method_keeps_its_colour_whatever_else_is_there(tmp_path: Path) -> None:
    alone = load(build(tmp_path / "a", [RANK_SWEEP[4], RANK_SWEEP[3]]).root).cells
    together = load(build(tmp_path / "b").root).cells
    for name in ("headonly-head",):
        assert theme.looks(alone)[name] == theme.looks(together)[name]
    cell = next(c for c in alone if c.adapter)
    assert theme.method_colour(cell, theme.looks(alone)) == theme.HUES["LoRA"]


def test_labels_move_apart_and_no_further() -> None:
    assert theme.spread_apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert theme.spread_apart([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    crowded = theme.spread_apart([0.0, 0.01, 0.02, 0.9], 0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in pairwise(crowded))
    assert crowded[3] == pytest.approx(0.9)
    assert sum(crowded[:3]) / 3 == pytest.approx(0.01)  # least squares


def test_figures_follow_the_data(tmp_path: Path) -> None:
    ladder = build(tmp_path / "a").root
    assert [d.key for d in figures.draw(find(load(ladder)))] == ["metric_by_rank", "learning_rates", "training"]
    lone = [Planted("lora", (1e-3,), 1e-3, 0.7, r=8, targets=t) for t in ("mlp", "attention")]
    assert [d.key for d in figures.draw(find(load(build(tmp_path / "b", lone).root)))] == ["metric_by_cell", "training"]


def test_every_figure_has_words_and_no_date(tmp_path: Path) -> None:
    for d in figures.draw(find(load(build(tmp_path / "s").root))):
        assert len(d.alt) > 40
        assert d.caption
        assert "<dc:date>" not in d.svg
        assert "atplotlib v" not in d.svg
        assert b"Software" not in d.png
        page = theme.inline_svg(d)
        assert page.startswith("<svg")
        assert d.alt.split(":")[0] in page


def test_two_cells_at_one_score_and_one_evaluation(tmp_path: Path) -> None:
    """A sweep so short that nothing varies still draws."""
    store = build(tmp_path / "s", RANK_SWEEP[:2], tune=(0, 1))
    for record in store.records():
        path = store.run_dir(record.run_id) / "history.jsonl"
        path.write_text(
            '{"step": 1, "train/loss": 1.0}\n{"step": 1, "val/loss": 0.5, "val/accuracy": 0.5}\n', encoding="utf-8"
        )
        if record.status == "completed":
            record.metrics |= {"val/loss": 0.5, "val/accuracy": 0.5}
            store.write(record)
    render(store.root, tmp_path / "out")
    assert (tmp_path / "out/figures/training.png").is_file()


def test_numbers_as_readers_see_them() -> None:
    assert [rate(x) for x in (1e-3, 2.5e-5, 0.016, 0.1, 3e-2, None)] == ["1e-3", "2.5e-5", "1.6e-2", "0.1", "3e-2", "–"]
    assert [number(x, 1, sign=True) for x in (-1.25, 0.04, -0.04, 1234.5)] == ["−1.2", "0.0", "0.0", "+1,234.5"]
    assert [share(*x) for x in ((1155, 22_714_371), (43_395, 22_714_371), (676_995, 22_714_371), (1, 1))] == [
        "0.005 %",
        "0.19 %",
        "3.0 %",
        "100 %",
    ]
    assert [compact(x) for x in (1155, 43_395, 999_600, 22_714_371)] == ["1,155", "43.4 k", "1.0 M", "22.7 M"]
    assert [memory(x) for x in (720 << 20, 3 << 30, None)] == ["720 MiB", "3.0 GiB", "–"]
    assert [duration(x) for x in (40, 600, 9000)] == ["40 s", "10 min", "2.5 h"]
    points = Metric("accuracy", False, 1, 100.0, "%", "points")
    assert [points.size(x, unit=False) for x in (0.0004, 0.0006, 0.0)] == ["<0.1", "0.1", "0.0"]
    assert Metric("loss", True, 3).size(2e-4) == "<0.001"
    assert points.value(0.7731, unit=True) == "77.3 %"
    assert points.difference(-0.012, unit=True) == "−1.2 points"


def test_ticks_stand_at_the_rates_tried_where_their_labels_have_room() -> None:
    def ticks(rates: list[float]) -> list[str]:
        with theme.canvas(4, 3) as figure:
            ax = figure.add_subplot()
            theme.set_rate_axis(ax, rates)
            return [t.get_text() for t in ax.get_xticklabels()]

    assert ticks([4e-3, 5e-4, 1e-3, 2e-3, 1e-3]) == ["5e-4", "1e-3", "2e-3", "4e-3"]
    assert ticks([1e-4, 2e-4, 4e-4, 3e-2, 0.1, 0.3]) == ["1e-4", "1e-3", "1e-2", "0.1"]
    assert ticks([1e-3]) == ["1e-3"]


def test_a_panel_is_as_wide_as_a_phone_unless_a_name_is_long() -> None:
    """A phone's page shows 5.2 inches of a picture without swiping (page.css)."""
    assert theme.panel_width(["LoRA r = 1 (α = 16)", "full fine-tuning"]) == 5.2
    assert theme.panel_width(["LoRA r = 1 (α = 16, batch size 64)"]) > 5.2
    assert theme.panel_width([]) == 5.2


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_runs_over_the_edge_in_a_browser(width: int, tmp_path: Path) -> None:
    """The page itself never scrolls sideways (tables scroll inside their own box), and asks the network for nothing."""
    store = build(tmp_path / "s")
    render(store.root, tmp_path / "out")
    probe = (
        "<script>addEventListener('load',()=>{const f=document.querySelector('iframe').contentDocument.documentElement;\
document.title=f.scrollWidth+' '+f.clientWidth})</script>"
    )
    frame = f'<iframe src="out/report.html" style="width:{width}px;height:800px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(frame + probe, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *flags,
            "--virtual-time-budget=3000",
            "--window-size=1400,1000",
            "--dump-dom",
            f"file://{tmp_path}/frame.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    scroll, client = map(int, title.split())
    assert client == width
    assert scroll <= client
