"""One cell, one setting: a launch that would mix two is refused, and a report tells apart what stands mixed already."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fixtures.runs import make_base, make_data, make_run
from fixtures.sweeps import RANK_SWEEP, build
from lorabench.config.cells import VARIES_INSIDE, canonical, cell_settings
from lorabench.config.errors import ExistingWork
from lorabench.config.runs import RunConfig
from lorabench.config.settings import ReportConfig, StudyConfig, SweepConfig, TrackerConfig
from lorabench.results.findings import find
from lorabench.results.settings_apart import differences, split_cells
from lorabench.results.sweep import load
from lorabench.store.records import Record, Store
from lorabench.sweep.declaration import check_one_setting
from lorabench.sweep.packs import Job, Settings, cell_label

CELL = "lora-r8-a16-all-linear"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("one_setting")
    return make_run(make_base(folder / "base", "bert"), make_data(folder / "words.csv"))


def another(value: Any) -> Any:
    """A value of any setting that is not this one."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else "another" if value is None else f"{value}x"


def fields(run: RunConfig) -> list[tuple[str, dataclasses.Field[Any]]]:
    return [(s, f) for s in RunConfig.SECTIONS for f in dataclasses.fields(getattr(run, s))]


def job(run: RunConfig, **extra: str) -> Job:
    settings = Settings(SweepConfig(name="s"), ReportConfig(), TrackerConfig(), StudyConfig())
    return Job(run, settings, cell_label(run, extra=extra))


def manifest_of(*configs: dict[str, Any]) -> dict[str, Any]:
    ids = [f"{i:012x}" for i in range(len(configs))]
    label = {"method": "LoRA", "r": 8, "alpha": 16.0, "alpha_rule": "16", "targets": "all-linear", "extra": {}}
    runs = {i: {"config": c} for i, c in zip(ids, configs, strict=True)}
    return {"cells": [{"id": CELL, "label": label, "runs": {"tune": ids, "confirm": []}}], "runs": runs}


def test_every_identity_setting_is_of_one_value_in_a_cell(run: RunConfig) -> None:
    config, checked = run.to_dict(), 0
    for section, f in fields(run):
        key, changed = f"{section}.{f.name}", copy.deepcopy(config)
        changed[section][f.name] = another(config[section][f.name])
        if key == "method.name" or key.endswith(".kind"):
            continue  # another dataclass: the test below
        manifest = manifest_of(config, changed)
        found = split_cells(manifest, {})["cells"]
        refused = differences(cell_settings(config), cell_settings(changed))
        if not f.metadata.get("identity", True) or key in VARIES_INSIDE:
            assert (refused, len(found)) == ([], 1), key
            continue
        assert refused == [key] and [list(c["label"]["extra"]) for c in found] == [[key], [key]], key
        assert len({c["id"] for c in found}) == 2 and found[0]["id"] == CELL
        checked += 1
    assert checked > 40
    assert not differences(cell_settings(config), cell_settings({**config, "seed": 7, "role": "confirm"}))


def test_what_older_records_lack_is_at_its_default(run: RunConfig) -> None:
    config = run.to_dict()
    old = copy.deepcopy(config)
    added = [(s, f.name) for s, f in fields(run) if f.metadata.get("added")]
    for section, name in added:
        del old[section][name]
    assert added and len(split_cells(manifest_of(old, config), {})["cells"]) == 1
    assert canonical([16.0, (1,)]) == canonical([16, [1.0]])


@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer.max_steps", 40), ("optimizer.weight_decay", 0.1), ("task.train_examples", 50), ("model.dropout", 0.1)],
)
def test_a_launch_into_a_cell_of_another_setting_is_refused(run: RunConfig, key: str, value: Any) -> None:
    section, name = key.split(".")
    part = dataclasses.replace(getattr(run, section), **{name: value})
    changed, manifest = dataclasses.replace(run, **{section: part}), manifest_of(run.to_dict())
    with pytest.raises(ExistingWork, match=rf"{key}=.* cell {CELL} of the sweep in s .*another sweep\.name.*-m {key}="):
        check_one_setting(manifest, [job(changed)], "s")
    with pytest.raises(ExistingWork, match=key):
        check_one_setting({}, [job(run), job(changed)], "s")  # in one launch, too
    other_rank = dataclasses.replace(changed, method=dataclasses.replace(changed.method, r=4))
    with pytest.raises(ExistingWork, match=rf"{key}=.*: the sweep in s was trained with"):
        check_one_setting(manifest, [job(other_rank)], "s")  # a new cell beside it
    check_one_setting(manifest, [job(changed, **{key: str(value)})], "s")  # an axis
    check_one_setting(manifest, [job(dataclasses.replace(run, seed=9, role="confirm"))], "s")
    check_one_setting({}, [job(run), job(other_rank)], "s")  # a grid's own settings


def mixed(folder: Path, change: Any) -> Path:
    store = build(folder, RANK_SWEEP[1:3], examples=200)
    manifest = store.manifest()
    for run_id in manifest["cells"][0]["runs"]["confirm"][1:]:
        record = store.read(run_id)
        assert record
        change(record)
        manifest["runs"][run_id]["config"] = record.config
        store.write(record)
    store.write_manifest(manifest)
    return Path(store.root)


def fewer_steps(record: Record) -> None:
    record.config["trainer"]["max_steps"] = 2


def other_data(record: Record) -> None:
    record.provenance["data_fingerprint"] = "fedcba9876543210"


@pytest.mark.parametrize(("change", "axis"), [(fewer_steps, "max_steps 2"), (other_data, "data_fingerprint fedcba98")])
def test_a_report_never_averages_two_settings(tmp_path: Path, change: Any, axis: str) -> None:
    sweep = load(mixed(tmp_path / "mixed", change))
    runs = {name: len(c.confirm) for c in sweep.cells for name in [sweep.names[c.id]] if c.r == 4}
    assert sorted(runs.values()) == [1, 2] and runs[next(n for n in runs if axis in n)] == 2, runs
    results = find(sweep).results.values()
    assert sorted(len(r.runs) for r in results if r.cell.r == 4) == [1, 2]
    assert len(Store(sweep.store.root).manifest()["cells"]) == 2  # the files stay as they are


def test_cells_of_one_method_under_unlike_budgets_show_it(tmp_path: Path) -> None:
    short = dataclasses.replace(RANK_SWEEP[1], config={"trainer": {"max_steps": 2}})
    store = build(tmp_path / "unlike", (short, *RANK_SWEEP[2:4], RANK_SWEEP[5]), examples=200)
    cells = load(store.root).cells
    assert {c.r: c.conditions["trainer.max_steps"] for c in cells} == {4: "2", 16: "none", 64: "none", None: "none"}
    decayed = dataclasses.replace(RANK_SWEEP[5], config={"optimizer": {"weight_decay": 0.1}})
    own = build(tmp_path / "own", (*RANK_SWEEP[1:3], decayed), examples=200)
    assert not any(c.extra for c in load(own.root).cells)  # a method's own decay is no axis
