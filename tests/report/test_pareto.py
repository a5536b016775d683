"""Fronts: dominated cells are off, costs are of a cell alone, neighbours that are not resolved are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.planted_sweeps import opened, with_solo
from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.report import theme
from lorabench.report.sections import pareto
from lorabench.results.evidence import Evidence
from lorabench.results.findings import Findings

RATES = (1e-3, 2e-3, 4e-3)
CHEAP, DOMINATED, TWIN, BEST = (
    Planted("lora", RATES, 2e-3, 0.66, r=1),
    Planted("lora", RATES, 2e-3, 0.60, r=4),
    Planted("lora", RATES, 2e-3, 0.76, r=16),
    Planted("lora", RATES, 2e-3, 0.763, r=64),
)
IDS = {r: f"lora-r{r}-a16-all-linear" for r in (1, 4, 16, 64)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Evidence]:
    """Rank 4 is worse than rank 1 and costs more; rank 64 is hardly better than rank 16."""
    store = build(tmp_path_factory.mktemp("pareto") / "s", [CHEAP, DOMINATED, TWIN, BEST])
    with_solo(store, {IDS[1]: 10.0, IDS[4]: 12.0, IDS[16]: 9.0, IDS[64]: 20.0})
    return opened(store)


def ranks(cells: tuple[pareto.Result, ...]) -> list[int | None]:
    return [r.cell.r for r in cells]


def test_dominated_cells_are_off_the_front(made: tuple[Findings, Evidence]) -> None:
    f, _ = made
    best = max((r for r in f.results.values() if r.test), key=lambda r: r.test.mean if r.test else 0.0)
    by_cost = {x.cost.key: ranks(x.on) for x in pareto.fronts(f)}
    assert by_cost["trainable"] == ([1, 16] if best.cell.r == 16 else [1, 16, 64])
    assert by_cost["seconds"][0] == 16 and 1 not in by_cost["seconds"] and 4 not in by_cost["seconds"]
    assert set(by_cost) == {"trainable", "seconds", "memory"}


def test_a_front_is_what_no_cell_beats(made: tuple[Findings, Evidence]) -> None:
    """Against the definition, pair by pair."""
    f, _ = made
    for x in pareto.fronts(f):

        def point(r: pareto.Result, of: pareto.Cost = x.cost) -> tuple[float, float]:
            assert r.test is not None
            return -(of.of(r) or 0.0), r.test.mean

        for r in x.cells:
            beats = [o for o in x.cells if o is not r and all(a >= b for a, b in zip(point(o), point(r), strict=True))]
            assert (r in x.on) == (not beats)


def test_less_is_better_turns_the_front(tmp_path: Path) -> None:
    f, _ = opened(build(tmp_path / "s", [CHEAP, DOMINATED, TWIN], metric="loss"))
    (front,) = pareto.fronts(f)
    assert f.metric.lower_is_better and ranks(front.on) == [1, 16]


def test_names_stay_inside_where_less_is_better(tmp_path: Path) -> None:
    """Cells that all but reach 0 lie at the bottom, and their names below them."""
    flat = [
        Planted("lora", RATES, 2e-3, q, r=r, seed_sd=0.0) for r, q in ((1, 0.4), (4, 0.769), (16, 0.77), (64, 0.771))
    ]
    f, _ = opened(build(tmp_path / "s", flat, metric="loss"))
    figure = pareto.draw(f, pareto.fronts(f), theme.looks(f.sweep.cells)).figure
    for ax in figure.axes:
        box = ax.get_window_extent()
        assert ax.texts and all(t.get_window_extent().y0 > box.y0 for t in ax.texts)


def test_seconds_and_memory_are_of_a_cell_alone(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [CHEAP, DOMINATED, TWIN])
    assert [x.cost.key for x in pareto.fronts(opened(store)[0])] == [
        "trainable"
    ]  # a share of a pack is no cost of a cell
    with_solo(store, {IDS[1]: 10.0, IDS[4]: 12.0})
    assert [x.cost.key for x in pareto.fronts(opened(store)[0])] == ["trainable"]  # of two cells
    with_solo(store, {IDS[1]: 10.0, IDS[4]: 12.0, IDS[16]: 9.0})
    found = {x.cost.key: x for x in pareto.fronts(opened(store)[0])}
    seconds = found["seconds"]
    assert [seconds.cost.of(r) for r in seconds.cells] == pytest.approx([9.0, 10.0, 12.0])  # 100 steps, 10 measured


def test_unresolved_neighbours_are_named(made: tuple[Findings, Evidence]) -> None:
    f, e = made
    by_rank = {r.cell.r: r for r in f.results.values()}
    assert pareto.unresolved(e, [by_rank[1], by_rank[16], by_rank[64]]) == [(by_rank[16], by_rank[64])]
    part = pareto.section(f, e, theme.looks(f.sweep.cells))
    assert part is not None
    assert "on the front" in part.texts[0]
    if by_rank[64] in pareto.fronts(f)[0].on:
        assert "Not resolved from each other (95 %, exploratory): LoRA r = 16 and LoRA r = 64" in part.texts[0]


def test_picture_and_table(made: tuple[Findings, Evidence]) -> None:
    f, e = made
    looks = theme.looks(f.sweep.cells)
    part = pareto.section(f, e, looks)
    assert part is not None
    (drawing,) = part.drawings
    assert len(drawing.figure.axes) == 3
    for ax, front in zip(drawing.figure.axes, pareto.fronts(f), strict=True):
        assert {t.get_text() for t in ax.texts} == {r.name for r in front.on}
        grey = [line for line in ax.lines if line.get_color() == pareto.BEATEN_COLOUR]
        assert len(grey) == len(front.cells) - len(front.on)
    rows = {r.texts[0]: r.texts for r in part.tables[0].rows}
    assert rows["LoRA r = 4"][-1] == "–"
    assert "training time" in rows["LoRA r = 16"][-1]
    again = pareto.section(f, e, looks)
    assert again is not None and again.drawings == part.drawings


def test_two_cells_have_no_front(tmp_path: Path) -> None:
    f, e = opened(build(tmp_path / "s", RANK_SWEEP[1:3]))
    assert pareto.section(f, e, theme.looks(f.sweep.cells)) is None


def test_measured_costs_that_hardly_differ_are_one_cost(tmp_path: Path) -> None:
    """A second measurement may turn 1 % round: the better of two such cells beats the other, and of all alike there is no front."""
    store = build(tmp_path / "s", [CHEAP, DOMINATED, TWIN])
    with_solo(store, {IDS[1]: 9.0, IDS[4]: 12.0, IDS[16]: 9.1})
    f, e = opened(store)
    assert ranks({x.cost.key: x for x in pareto.fronts(f)}["seconds"].on) == [16]
    with_solo(store, {IDS[1]: 9.0, IDS[4]: 9.05, IDS[16]: 9.1})
    f, e = opened(store)
    assert "seconds" not in {x.cost.key for x in pareto.fronts(f)}
    part = pareto.section(f, e, theme.looks(f.sweep.cells))
    assert part is not None and "Training time: the same within 2 % for all, 9.0 s." in part.texts


def test_names_stay_clear_of_the_axis(tmp_path: Path) -> None:
    """The cheapest cell has the longest name, and it ends at that cell."""
    cells = [
        Planted("lora", RATES, 2e-3, q, r=r, alpha=a, label={"alpha_rule": rule})
        for q, r, a, rule in ((0.7, 1, 2.0, "2r"), (0.6, 1, 16.0, "16"), (0.72, 8, 16.0, "2r"), (0.74, 32, 64.0, "2r"))
    ]
    f, _ = opened(build(tmp_path / "s", cells))
    figure = pareto.draw(f, pareto.fronts(f), theme.looks(f.sweep.cells)).figure
    figure.draw_without_rendering()  # the layout settles here
    for ax in figure.axes:
        assert all(t.get_window_extent().x0 > ax.get_window_extent().x0 for t in ax.texts)
