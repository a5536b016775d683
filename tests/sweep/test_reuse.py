"""`sweep.reuse`: what another sweep has trained is taken from there, and the records are those of a sweep that trained all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.runs import make_base, make_data, make_run
from lorabench.config.runs import RunConfig, Settings
from lorabench.config.settings import ReportConfig, StudyConfig, SweepConfig, TrackerConfig
from lorabench.report.budget import budget
from lorabench.results.findings import find
from lorabench.results.sweep import load
from lorabench.slim import slim
from lorabench.store.records import Record, Store
from lorabench.sweep.packs import Job, assign_packs, cell_label
from lorabench.sweep.reuse import copy_runs, preview_copy
from lorabench.training import precision, preparation

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return make_base(root / "bert", "bert"), make_data(root / "data.csv", rows=60)


@pytest.fixture
def sweep(cli: Cli, places: tuple[Path, Path]) -> Cli:
    def run(name: str, *argv: str) -> tuple[int, str]:
        return cli(
            "-m", "model=hf", f"model.source={places[0]}", "model.name=tiny", "task=text_file", f"task.file={places[1]}",
            "task.max_length=32", "trainer.max_steps=2", "trainer.batch_size=4", f"sweep.name={name}",
            "sweep.measure_solo=false", "report.enabled=false", *argv,
        )  # fmt: skip

    return run


PHASES = ("optimizer.lr=1e-3,2e-3", "sweep.confirm_seeds=[100,101]")


def results(name: str) -> dict[str, tuple[object, ...]]:
    """By run_id: what a run found out, to the last bit."""
    store = Store(f"sweeps/{name}")
    tests = {i: store.arrays(i, "test") or {} for i in store.run_ids()}
    arrays = {i: {k: v.tobytes() for k, v in found.items()} for i, found in tests.items()}
    return {r.run_id: (r.status, r.metrics, store.history(r.run_id), arrays[r.run_id]) for r in store.records()}


def taken(name: str) -> dict[str, str]:
    return {
        r.run_id: r.provenance["reused_from"]
        for r in Store(f"sweeps/{name}").records()
        if "reused_from" in r.provenance
    }


def test_what_another_sweep_trained_is_not_trained_again(sweep: Cli) -> None:
    assert sweep("first", "method.r=2,4", *PHASES)[0] == 0
    code, said = sweep("second", "method.r=2,8", *PHASES, "sweep.reuse=[sweeps/first]")
    assert code == 0
    assert "2 runs taken from sweeps/first" in said
    assert sweep("alone", "method.r=2,8", *PHASES)[0] == 0
    assert results("second") == results("alone")
    assert len(taken("second")) == 4
    assert set(taken("second").values()) == {"first"}
    assert {Store("sweeps/second").read(i).config["method"]["r"] for i in taken("second")} == {2}  # type: ignore[union-attr]
    adapter = f"runs/{min(taken('second'))}/adapter/adapter_model.safetensors"
    assert Path("sweeps/second", adapter).read_bytes() == Path("sweeps/first", adapter).read_bytes()
    assert ", 4 taken from first" in dict(budget(find(load("sweeps/second"))))["Runs"]
    slim(Path("sweeps/first"), Path("sweeps/kept"))
    assert sweep("third", "method.r=2,8", *PHASES, "sweep.reuse=[sweeps/kept]")[0] == 0
    assert (results("third"), set(taken("third").values())) == (results("alone"), {"kept"})
    before = results("second")
    code, said = sweep("second", "method.r=2,8", *PHASES, "sweep.reuse=[sweeps/first]")
    assert (code, results("second")) == (0, before)
    assert "taken" not in said


def test_a_dry_run_shows_what_is_there_and_writes_nothing(sweep: Cli) -> None:
    assert sweep("first", "method.r=2", *PHASES)[0] == 0
    code, said = sweep("second", "method.r=2,4", *PHASES, "sweep.reuse=[sweeps/first]", "sweep.dry_run=true")
    assert code == 0 and not Path("sweeps/second").exists()
    assert "dry run: 2 of 4 runs to train, in 1 pack" in said and "2 runs taken from sweeps/first" in said
    assert not [run_id for run_id in Store("sweeps/first").run_ids() if run_id in said]
    assert sweep("second", "method.r=2", "optimizer.lr=1e-3,2e-3", "sweep.confirm_seeds=[]")[0] == 0
    before = {path: path.read_bytes() for path in Path("sweeps/second").rglob("*") if path.is_file()}
    code, said = sweep("second", "method.r=2,4", *PHASES, "sweep.dry_run=true")
    assert code == 0
    assert "dry run: 2 of 4 runs to train, in 1 pack" in said and "2 runs finished in sweeps/second" in said
    code, said = sweep("second", "method.r=2", *PHASES, "sweep.dry_run=true")
    assert code == 0 and "nothing to train" in said
    assert {path: path.read_bytes() for path in Path("sweeps/second").rglob("*") if path.is_file()} == before


def test_runs_made_under_other_conditions_are_left(sweep: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: True)
    assert sweep("bf16", "method.r=2")[0] == 0
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: False)
    assert sweep("mixed", "method.r=4")[0] == 0
    code, said = sweep("mixed", "method.r=2,4", "sweep.reuse=[sweeps/bf16]")
    assert code == 0
    assert "0 runs taken from sweeps/bf16; 1 of other data, base, device or precision" in said
    assert {r.provenance["precision"] for r in Store("sweeps/mixed").records()} == {"32"}
    assert sweep("all", "method.r=2,4", "sweep.reuse=[sweeps/bf16]")[0] == 0  # a new sweep goes on as it began
    assert {r.provenance["precision"] for r in Store("sweeps/all").records()} == {"bf16"}


def test_torn_and_pruned_runs_train_here(sweep: Cli) -> None:
    assert sweep("first", "method.r=2,4")[0] == 0
    store = Store("sweeps/first")
    torn, pruned = store.run_ids()
    (store.run_dir(torn) / "history.jsonl").write_text("{")
    record = store.read(pruned)
    assert record is not None
    record.status = "pruned"
    store.write(record)
    assert sweep("second", "method.r=2,4", "sweep.reuse=[sweeps/first]")[0] == 0
    assert not taken("second")
    assert {r.status for r in Store("sweeps/second").records()} == {"completed"}


def test_a_copy_that_was_cut_is_made_again(sweep: Cli) -> None:
    assert sweep("first", "method.r=2")[0] == 0
    (run_id,) = Store("sweeps/first").run_ids()
    cut = Path(f"sweeps/second/runs/.{run_id}.0123abcd.tmp")
    cut.mkdir(parents=True)
    (cut / "history.jsonl").write_text('{"step": 1')
    (Path("sweeps/first/runs") / run_id / "link").symlink_to("/etc/passwd")
    assert sweep("second", "method.r=2", "sweep.reuse=[sweeps/first]")[0] == 0
    assert taken("second")
    assert not cut.exists()
    assert results("second") == results("first")
    assert not (Path("sweeps/second/runs") / run_id / "link").exists()


def test_what_was_trained_on_other_data_trains_here(sweep: Cli) -> None:
    assert sweep("first", "method.r=2")[0] == 0
    (path,) = Path("sweeps/first/runs").glob("*/run.json")
    data = json.loads(path.read_text())
    data["provenance"]["data_fingerprint"] = "another"
    path.write_text(json.dumps(data))
    code, said = sweep("second", "method.r=2", "sweep.reuse=[sweeps/first]")
    assert code == 0
    assert "0 runs taken from sweeps/first; 1 of other data" in said
    assert not taken("second")


@pytest.mark.parametrize("path", ["sweeps/none", "."])
def test_what_is_no_sweep_is_refused_and_nothing_is_written(sweep: Cli, path: str) -> None:
    code, said = sweep("second", "method.r=2", f"sweep.reuse=[{path}]")
    assert code == 2
    assert "sweep.reuse" in said
    assert path in said
    assert not Path("sweeps/second").exists()


def own_run(places: tuple[Path, Path], r: int) -> RunConfig:
    return make_run(*places, **{"method.r": r, "trainer.precision": "auto"})


def made(root: Path, run: RunConfig, precision: str) -> str:
    """A sweep that has trained one run; its path."""
    store, data = Store(root), preparation.load_data(run.task).fingerprint
    store.write_manifest({"schema": 1, "cells": [], "runs": {}, "packs": []})
    about = {
        "data_fingerprint": data,
        "model_fingerprint": preparation.model_fingerprint(run),
        "device": "cpu",
        "precision": precision,
    }
    store.write(Record(run.run_id, "tune", "completed", run.to_dict(), {"val/loss": 1.0}, provenance=about))
    return str(root)


def test_a_note_from_before_any_run_does_not_outlive_what_is_taken(places: tuple[Path, Path], tmp_path: Path) -> None:
    """A launch that was cut before it trained had settled on this machine's choice."""
    run, store = own_run(places, 2), Store(tmp_path / "new")
    note = {"settled": {"device": "cpu", "precision": "32"}}
    store.write_manifest({"schema": 1, "cells": [], "runs": {}, "packs": [], **note})
    assert list(copy_runs(store, [run], [made(tmp_path / "bf16", run, "bf16")]))
    precision.note_device(store, run)
    assert precision.noted_precision(store) == "bf16"


def test_what_would_be_taken_is_what_is_taken(places: tuple[Path, Path], tmp_path: Path) -> None:
    """And what `auto` means is what it will mean; a note from before any run counts for neither."""
    runs = [own_run(places, r) for r in (2, 4, 8)]
    sources = [made(tmp_path / p, run, p) for p, run in zip(("bf16", "32"), runs[:2], strict=True)]
    for note in ({}, {"settled": {"device": "cpu", "precision": "32"}}):
        store = Store(tmp_path / f"new{len(note)}")
        store.write_manifest({"schema": 1, "cells": [], "runs": {}, "packs": [], **note})
        found = preview_copy(store, runs, sources)
        assert store.manifest().get("settled") == note.get("settled") and not store.run_ids()
        lines = list(copy_runs(store, runs, sources))
        assert [f"{store.root}: {line}" for line in found.lines] == lines and len(lines) == 2
        assert (found.run_ids, found.precision) == ({*store.run_ids()}, "bf16")


def test_a_launch_that_was_cut_while_it_copied_takes_no_more_than_it_would_have(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    runs = [own_run(places, r) for r in (2, 4)]
    sources = [made(tmp_path / p, run, p) for p, run in zip(("bf16", "32"), runs, strict=True)]
    for name in ("whole", "cut"):
        store = Store(tmp_path / name)
        store.write_manifest({"schema": 1, "cells": [], "runs": {}, "packs": []})
        if name == "cut":
            list(copy_runs(store, runs, sources[:1]))
        list(copy_runs(store, runs, sources))
        assert store.run_ids() == [runs[0].run_id]


def test_what_was_taken_fills_no_pack_of_what_is_to_train(places: tuple[Path, Path], tmp_path: Path) -> None:
    """A pack trains all of its members."""
    runs, store = [own_run(places, r) for r in (2, 4)], Store(tmp_path / "new")
    store.write_manifest({"schema": 1, "cells": [], "runs": {}, "packs": []})
    list(copy_runs(store, runs, [made(tmp_path / "first", runs[0], "32")]))
    settings = Settings(SweepConfig(max_pack=8), ReportConfig(), TrackerConfig(), StudyConfig())
    packs = assign_packs(store, [Job(run, settings, cell_label(run)) for run in runs])
    assert [p.run_ids for p in packs] == [[runs[1].run_id], [runs[0].run_id]]
