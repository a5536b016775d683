"""The plane of scale and learning rate: its rows, its marks, and sweeps that have no such plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

from fixtures.planted_sweeps import opened, rule_sweep
from fixtures.sweeps import Planted, build
from lorabench.report.sections import alpha_rates
from lorabench.results.evidence import Evidence


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """At alpha = 2r and rank 64 the rates from 2e-3 up diverge."""
    return opened(rule_sweep(tmp_path_factory.mktemp("alpha") / "s", diverges=1.9e-3))[1]


def test_a_panel_a_rank_with_its_scales_upwards(plane: Evidence) -> None:
    found = alpha_rates.panels(plane)
    assert [p.title for p in found] == ["r = 1", "r = 8", "r = 64"]
    labels = [[b.label.split("\n")[0] for b in p.bands] for p in found]
    assert labels[0] == ["s = 2", "s = 5.66", "s = 16"]
    assert labels[2] == ["s = 0.25", "s = 0.707", "s = 2"]


def test_rules_that_meet_and_share_their_runs_are_one_row(plane: Evidence) -> None:
    (band,) = alpha_rates.panels(plane)[1].bands
    assert band.label == "s = 2\nα = 16, α = 2r"


def test_marks_and_words(plane: Evidence) -> None:
    made = alpha_rates.section(plane)
    assert made is not None
    (drawing,) = made.drawings
    assert "A cross" in drawing.caption and "White: not tried" in drawing.caption and "A bar" not in drawing.caption
    assert "s = 2 (α = 2r) chosen 1e-3 with 0.61" in drawing.alt and "out: 2e-3, 4e-3" in drawing.alt
    ax = drawing.figure.axes[2]  # r = 64
    crosses = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "x"]
    ticks = [t.get_text() for t in ax.get_xticklabels()]
    assert [ticks[int(x)] for x in crosses] == ["2e-3", "4e-3"]
    again = alpha_rates.section(plane)
    assert again is not None and again.drawings == made.drawings  # svg and png, byte by byte


def test_the_chosen_rate_is_framed(plane: Evidence) -> None:
    made = alpha_rates.section(plane)
    assert made is not None
    for ax, p in zip(made.drawings[0].figure.axes, alpha_rates.panels(plane), strict=False):
        ticks = [t.get_text() for t in ax.get_xticklabels()]
        frames = {(ticks[int(x.get_x())], int(x.get_y())) for x in ax.patches if not x.get_fill()}
        low = 3 - len(p.bands)
        assert frames == {
            (f"{b.result.lr:.1e}".replace("e-0", "e-").replace(".0", ""), low + k) for k, b in enumerate(p.bands)
        }


def test_colours_keep_their_order_in_grey() -> None:
    """Luminance falls from the lowest loss to the highest, so grey print and colour-blind readers see one order."""
    colours = colormaps[alpha_rates.COLOUR_MAP](np.linspace(0, 1, 32))[:, :3]
    assert (np.diff(colours @ [0.299, 0.587, 0.114]) < 0).all()


def test_rules_at_ranks_of_their_own(tmp_path: Path) -> None:
    rates = (1e-3, 2e-3, 4e-3)
    cells = [Planted("lora", rates, 2e-3, 0.75, r=r) for r in (1, 4)]
    cells += [Planted("lora", rates, 2e-3, 0.75, r=r, alpha=2.0 * r, label={"alpha_rule": "2r"}) for r in (16, 64)]
    found = alpha_rates.panels(opened(build(tmp_path / "s", cells, confirm=()))[1])
    assert [p.title for p in found] == ["α = 16", "α = 2r"]
    assert [b.label for b in found[1].bands] == ["r = 16\ns = 2", "r = 64\ns = 2"]


def test_one_rule_has_no_plane(tmp_path: Path) -> None:
    assert alpha_rates.section(opened(build(tmp_path / "s", confirm=()))[1]) is None
