"""Grids and what a command line does to them."""

import pytest

from lorabench.config.errors import ConfigError
from lorabench.launch.grid import expand

GRIDS = {
    "lora": {"method": "lora", "method.r": "1,4", "optimizer.lr": "1e-3,2e-3"},
    "head": {"method": "head", "optimizer.lr": "1e-2,3e-2"},
}


def cells(points):
    return [dict(p.axes) for p in points]


def test_a_sweep_is_the_union_of_products():
    points = expand(GRIDS, {}, ["+experiment=x"])
    assert cells(points) == [
        {"method": "lora", "method.r": "1"},
        {"method": "lora", "method.r": "4"},
        {"method": "head"},
    ]
    assert points[0].rates == ("optimizer.lr=0.001", "optimizer.lr=0.002")
    assert points[2].rates == ("optimizer.lr=0.01", "optimizer.lr=0.03")
    assert all(p.fixed[0] == "+experiment=x" for p in points)


def test_an_axis_on_the_command_line_replaces_it_only_in_the_grids_that_have_it():
    points = expand(GRIDS, {}, ["method.r=16,32,64"])
    assert cells(points) == [{"method": "lora", "method.r": r} for r in ("16", "32", "64")] + [{"method": "head"}]


def test_a_plain_override_of_an_axis_fixes_it_where_it_is_one():
    assert cells(expand(GRIDS, {}, ["method.r=8"])) == [{"method": "lora", "method.r": "8"}, {"method": "head"}]


def test_a_plain_override_of_anything_else_applies_to_all():
    points = expand(GRIDS, {}, ["trainer.batch_size=8"])
    assert all("trainer.batch_size=8" in p.fixed for p in points)


def test_a_new_axis_goes_to_every_grid():
    points = expand(GRIDS, {}, ["trainer.batch_size=8,16"])
    assert len(points) == 6
    assert {p.axes["trainer.batch_size"] for p in points} == {"8", "16"}


def test_without_grids_the_command_line_is_the_grid():
    points = expand({}, {}, ["method.r=1,4", "optimizer.lr=1e-3,1e-2", "seed=0,1"])
    assert cells(points) == [{"method.r": "1"}, {"method.r": "4"}]
    assert points[0].seeds == ("seed=0", "seed=1")


def test_one_rate_and_one_seed_on_the_command_line():
    (point,) = expand({}, {}, ["optimizer.lr=1e-3", "seed=5"])
    assert point.rates == ("optimizer.lr=1e-3",)
    assert point.seeds == ("seed=5",)
    assert point.fixed == ()


def test_zipped_axes_advance_together():
    grids = {"m": {"zip": {"method.target_modules": ["attention", "mlp"], "method.r": [45, 36]}}}
    got = [(p.axes["method.target_modules"], p.axes["method.r"]) for p in expand(grids, {}, [])]
    assert got == [("attention", "45"), ("mlp", "36")]


def test_a_zipped_rate_or_seed_is_that_of_its_cell():
    """Beside the one of the config, which would win, it would train nowhere."""
    grids = {"m": {"zip": {"method.r": [1, 4], "optimizer.lr": [1e-3, 1e-4], "seed": [3, 5]}}}
    one, two = expand(grids, {}, [])
    assert (one.fixed, one.rates, one.seeds) == (("method.r=1",), ("optimizer.lr=0.001",), ("seed=3",))
    assert (two.fixed, two.rates, two.seeds) == (("method.r=4",), ("optimizer.lr=0.0001",), ("seed=5",))
    assert cells([one, two]) == [{"method.r": "1"}, {"method.r": "4"}]


def test_an_axis_without_values_is_refused():
    with pytest.raises(ConfigError, match="method.r=.*at least one value"):
        expand({"m": {"method.r": []}}, {}, [])


@pytest.mark.parametrize("grid", ["method=lora", {"zip": ["method.r", "method.alpha"]}])
def test_a_grid_that_is_no_mapping_is_refused(grid):
    with pytest.raises(ConfigError, match="hydra.sweeper.grids.m.*a mapping of axes"):
        expand({"m": grid}, {}, [])


def test_zipped_axes_of_unequal_length_are_refused():
    with pytest.raises(ConfigError, match="hydra.sweeper.grids.m.zip.*equal length"):
        expand({"m": {"zip": {"a": [1, 2], "b": [1]}}}, {}, [])


def test_a_zipped_axis_cannot_be_replaced_alone():
    with pytest.raises(ConfigError, match="zipped"):
        expand({"m": {"zip": {"a": [1, 2], "b": [1, 2]}}}, {}, ["a=3,4"])


def test_lists_of_lists_are_axes_of_lists():
    points = expand({}, {"method.target_modules": [["query", "value"], "all-linear"]}, [])
    assert [p.axes["method.target_modules"] for p in points] == ["[query,value]", "all-linear"]


def test_a_regex_in_a_list_keeps_its_backslashes():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    regex = r"encoder\.layer\.5\..*\.dense"
    (point,) = expand({"one": {"method.target_modules": [regex]}}, {}, [])
    assert OverridesParser.create().parse_override(point.fixed[0]).value() == regex
