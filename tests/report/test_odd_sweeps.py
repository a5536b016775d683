"""Sweeps of few seeds, few examples, doubled cells or none of a kind: a report says no more of them than they show."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.config import overrides
from lorabench.report import answer as words
from lorabench.report import tables
from lorabench.report.cautions import warnings
from lorabench.report.sections import conditions
from lorabench.results.best_rate import Missing
from lorabench.results.evidence import gather
from lorabench.results.findings import Findings, find
from lorabench.results.recommendation import Recommendation
from lorabench.results.scores import Sample, difference
from lorabench.results.sweep import load
from lorabench.stats import estimates, power
from lorabench.store.records import Store

PAIR = (RANK_SWEEP[1], RANK_SWEEP[3])  # r = 4, r = 64
FOUR, TOP = "lora-r4-a16-all-linear", "lora-r64-a16-all-linear"


def found(store: Store) -> Findings:
    return find(load(store.root))


def of(f: Findings, name: str, key: str) -> str:
    """One text of the comparison table."""
    table = tables.comparison(f)
    row = list(f.results).index(name)
    return table.rows[row].texts[[c.key for c in table.columns].index(key)]


def flat(cells: Sequence[Planted]) -> list[Planted]:
    return [dataclasses.replace(c, seed_sd=0.0) for c in cells]


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    """An interval over the examples alone would leave the seed out."""
    f = found(build(tmp_path / "s", (*PAIR, RANK_SWEEP[4]), confirm=(100,), examples=200))
    said = dict(words.answer(f).points)["Against head-only"]
    assert "(no interval); no verdict (1 seed in common, a verdict takes three)" in said
    assert "(" not in of(f, FOUR, "difference")
    assert any(
        w.startswith("1 confirmation seed in some cells: neither an interval nor a verdict.") for w in warnings(f)
    )


@pytest.mark.parametrize("unfinished", [False, True])
def test_one_cell_is_not_recommended(tmp_path: Path, unfinished: bool) -> None:
    """There was nothing to choose from, however many seeds it has and whatever else was begun."""
    store = build(tmp_path / "s", PAIR if unfinished else PAIR[1:], examples=200)
    for record in store.records():
        if record.role == "confirm" and record.config["method"].get("r") == 4:
            shutil.rmtree(store.run_dir(record.run_id))
    f = found(store)
    said = words.answer(f)
    assert f.recommendation is None and said.command is None
    assert said.lead.startswith("LoRA r = 64 reaches") and said.lead.endswith("no other test result to set it against.")
    assert "recommended" not in [row.mark for row in tables.comparison(f).rows]


def test_results_that_never_vary_give_no_verdict(tmp_path: Path) -> None:
    """Rounded numbers of another tool, or runs whose seed changes nothing: zero scatter is not certainty."""
    store = build(tmp_path / "s", flat(PAIR), arrays=False)
    f, e = found(store), gather(load(store.root))
    made = f.versus[FOUR]
    assert made.estimate.variance == 0 and made.estimate.mean < 0
    assert made.direction == made.size == "not resolved" and made.blocked and "same for every seed" in made.blocked
    assert f.recommendation is not None and f.recommendation.cell is None
    assert isinstance(e.difference(f.results[FOUR], f.results[TOP]), Missing)


def doubled(store: Store, name: str, *rules: str) -> None:
    """The runs of a cell listed under other rules of alpha, too."""
    manifest = store.manifest()
    for rule in rules:
        twin = json.loads(json.dumps(next(c for c in manifest["cells"] if c["id"] == name)))
        twin["id"], twin["label"]["alpha_rule"] = f"{name}-{rule}", rule
        manifest["cells"].append(twin)
    store.write_manifest(manifest)


def test_a_cell_of_two_names_counts_once(tmp_path: Path) -> None:
    """Two cells say nothing of what is typical, whatever else their runs are called; and no run is compared with itself."""
    store = build(tmp_path / "s", PAIR, examples=200, study={"reference": TOP})
    before = found(store)
    doubled(store, TOP, "1r", "2r")
    doubled(store, FOUR, "4r")
    f = found(store)
    assert f.measured.scatter == {}
    assert set(f.versus) == {FOUR, f"{FOUR}-4r"}
    assert f.versus[FOUR].estimate == before.versus[FOUR].estimate
    assert of(f, f"{TOP}-2r", "difference") == "the reference's runs"
    four = build(tmp_path / "t", RANK_SWEEP[:4], examples=200)
    alone = found(four).measured.scatter[FOUR]
    doubled(four, FOUR, "4r")
    scatter = found(four).measured.scatter
    assert alone.cells == 4 and scatter[FOUR] == scatter[f"{FOUR}-4r"] == alone


def test_cells_of_other_test_examples_are_not_compared(tmp_path: Path) -> None:
    """Their difference is one of test sets, too, and an interval over seeds would leave that out."""
    store = build(tmp_path / "s", PAIR, examples=200)
    f = found(store)
    for x in f.results[FOUR].runs:
        columns = dict(store.arrays(x.run_id, "test") or {})
        store.write_arrays(x.run_id, "test", {**columns, "example": columns["example"] + np.uint64(1)})
    f = found(store)
    assert f.versus == {}
    assert "Tested on other examples than LoRA r = 64, so not compared with it: LoRA r = 4." in warnings(f)
    made = gather(load(store.root)).difference(f.results[FOUR], f.results[TOP])
    assert isinstance(made, Missing) and "different examples" in made.reason


def test_a_smaller_adapter_of_other_seeds_is_not_called_absent(tmp_path: Path) -> None:
    """Runs adopted without a seed share none."""
    store = build(tmp_path / "s", PAIR, arrays=False)
    for x in found(store).results[FOUR].runs:
        store.write(dataclasses.replace(x, config={**x.config, "seed": x.config["seed"] + 50}))
    f = found(store)
    assert f.recommendation is not None and dict(f.recommendation.skipped) == {
        FOUR: "shares no seed or no test examples with it"
    }
    assert words.answer(f).lead.endswith(
        "; whether a smaller one would do gets no verdict. "
        "Not tested: LoRA r = 4 (shares no seed or no test examples with it)."
    )


def test_examples_of_one_group_are_one_draw() -> None:
    table = np.random.default_rng(4).random((3, 50))
    sample = Sample((0, 1, 2), table.mean(1), table, examples=np.arange(50), groups=np.zeros(50, int))
    made = sample.estimate()
    assert (made.example, made.examples) == (0, None)
    assert made == estimates.mean_over_seeds(table.mean(1))
    assert (both := difference(sample, sample)) and both.estimate().examples is None


def test_a_control_is_of_the_best_adapters_conditions(tmp_path: Path) -> None:
    """Full fine-tuning of the small data says nothing of adapters on the large."""
    sizes = [
        dataclasses.replace(c, label={"extra": {"task.train_examples": n, **more}})
        for c, n, more in (
            (RANK_SWEEP[1], "9600", {"method.init": "gaussian"}),
            (RANK_SWEEP[3], "9600", {"method.init": "kaiming"}),
            (RANK_SWEEP[5], "500", {}),
        )
    ]
    store = build(tmp_path / "s", sizes, examples=200)
    assert found(store).controls == {}
    full = dataclasses.replace(
        RANK_SWEEP[5], label={"extra": {"task.train_examples": "9600"}}, config={"trainer": {"log_interval": 5}}
    )
    f = found(build(tmp_path / "t", [*sizes, full], examples=200))
    assert f.controls["full"].other.endswith("9600")


def test_without_adapters_nothing_is_said_of_them(tmp_path: Path) -> None:
    lead = words.answer(found(build(tmp_path / "s", RANK_SWEEP[4:], examples=200))).lead
    assert lead.startswith("Full fine-tuning has the best validation loss") and "adapter" not in lead


def test_many_seeds_are_not_called_none(tmp_path: Path) -> None:
    """Where only seeds are known some number of them settles it; where examples are few none does."""
    near = dataclasses.replace(RANK_SWEEP[1], quality=0.770)
    f = found(build(tmp_path / "s", (near, RANK_SWEEP[3]), arrays=False))
    made = f.versus[FOUR]
    gap = 1e-5
    edge = dataclasses.replace(
        made, size="not resolved", blocked=None, estimate=dataclasses.replace(made.estimate, mean=gap - f.sweep.margin)
    )
    margin = f.sweep.margin
    assert (
        words.seeds_clause(f, edge, -margin, margin)
        == "; were that the true difference, more than 200 confirmation seeds would settle it with 80 % power"
    )
    few = dataclasses.replace(edge, estimate=dataclasses.replace(edge.estimate, example=1e-4, example_df=50))
    assert words.seeds_clause(f, few, -margin, margin).endswith("it takes more test examples")


def test_what_settles_a_step_down_is_its_own_test(tmp_path: Path) -> None:
    """A cell that scores better by nearly the margin is far from falling short by it, if its interval is wide."""
    f = found(build(tmp_path / "s", PAIR, examples=200))
    e = estimates.mean_over_seeds(np.array([-0.01, 0.019, 0.048]))
    stopped = dataclasses.replace(f.versus[FOUR], estimate=e, size=estimates.size(e, 0.02), blocked=None)
    assert not estimates.non_inferior(e, 0.02, lower_is_better=False) and stopped.size == "not resolved"
    step = Recommendation(TOP, TOP, (TOP,), stopped)
    said = words.how_small(dataclasses.replace(f, recommendation=step))
    needed = power.seeds_to_settle(e, -0.02, np.inf)
    assert needed and needed < 30
    assert f"were that the true difference, {needed} confirmation seeds would settle it with 80 % power" in said
    assert "more than 200 confirmation seeds" in words.margin_clause(f, stopped)


def test_where_no_adapter_passes_the_first_step_is_shown(tmp_path: Path) -> None:
    """The sequence begins at the largest adapter, which need not be the best one."""
    far = dataclasses.replace(RANK_SWEEP[5], quality=0.95)
    store = build(tmp_path / "s", (*PAIR, far), examples=200, study={"reference": "full-everything"})
    f = found(store)
    assert f.recommendation is not None and f.recommendation.cell is None
    assert dict(words.answer(f).points)["How small"].startswith(
        "LoRA r = 64 was the first not shown to be within the margin"
    )


def test_words_of_a_command_are_hydras() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    texts = (r".*\.(query|value)$", "a b", "it's", r"a\'b", "c\\", "q_proj", "all-linear", "größe", "${x}", "")
    for value in (*texts, ["q", r"v\d+"], 5e-4, None, True, 8):
        parsed = OverridesParser.create().parse_override(f"method.target_modules={overrides.override_value(value)}")
        assert parsed.value() == value, value


def test_no_command_for_what_was_trained_elsewhere(tmp_path: Path) -> None:
    store = build(tmp_path / "s", PAIR, examples=200, manifest=False)
    assert words.answer(found(store)).command
    for record in store.records():
        store.write(
            dataclasses.replace(record, provenance={**record.provenance, "adopted": {"file": "runs.csv", "row": 1}})
        )
    assert words.answer(found(store)).command is None


def test_the_margin_names_its_series(tmp_path: Path) -> None:
    from lorabench.report import figures

    cells = [
        dataclasses.replace(c, method=m, label={"method": shown})
        for m, shown in (("lora", "LoRA"), ("dora", "DoRA"))
        for c in PAIR
    ]
    f = found(build(tmp_path / "s", cells, examples=200))
    assert f.reference is not None
    ax: Any = SimpleNamespace(axhline=lambda *args, **more: None)
    assert figures.draw_margin_line(ax, f, several=True)[0][2] == f"{f.results[f.reference].name} − margin"
    assert figures.draw_margin_line(ax, f, several=False)[0][2] == "r = 64 − margin"
    assert figures.is_by_rank(f) and conditions.conditions(f) == []


def test_a_dry_run_names_every_axis() -> None:
    from lorabench.sweep.dry_run import _cell_name

    label = {
        "method": "LoRA",
        "r": 8,
        "alpha_rule": "16",
        "targets": "all-linear",
        "extra": {"task.train_examples": "500"},
    }
    assert _cell_name(label) == "LoRA r=8 alpha=16 all-linear train_examples=500"
