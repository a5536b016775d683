"""A sweep that goes on on another machine: no run is silently made under other conditions than those it is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.runs import make_base, make_data, make_run
from lorabench.report.cautions import warnings
from lorabench.results.findings import find
from lorabench.results.sweep import load
from lorabench.store.records import Store
from lorabench.training import precision
from lorabench.training.precision import note_device

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return make_base(root / "bert", "bert"), make_data(root / "data.csv", rows=60)


@pytest.fixture
def sweep(cli: Cli, places: tuple[Path, Path]) -> Cli:
    def run(*argv: str) -> tuple[int, str]:
        return cli(
            "-m", "model=hf", f"model.source={places[0]}", "model.name=tiny", "task=text_file", f"task.file={places[1]}",
            "task.max_length=32", "trainer.max_steps=2", "trainer.batch_size=4", "sweep.name=s", "sweep.measure_solo=false",
            "report.enabled=false", *argv,
        )  # fmt: skip

    return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Make this machine one with or without native bf16 products."""

    def become(native: bool) -> None:
        monkeypatch.setattr(precision, "has_fast_bf16", lambda device: native)

    return become


def precisions() -> dict[str, str]:
    """By run_id, as trained."""
    return {r.run_id: r.provenance["precision"] for r in Store("sweeps/s").records()}


@pytest.mark.parametrize(("first", "meant"), [(True, "bf16"), (False, "32")])
def test_auto_stays_what_it_was_where_the_sweep_began(
    sweep: Cli, machine: Callable[[bool], None], first: bool, meant: str
) -> None:
    machine(first)
    code, out = sweep("method.r=1,2")
    assert code == 0 and "trainer.precision=auto" not in out
    machine(not first)
    code, out = sweep("method.r=1,2,4")
    assert code == 0, out
    assert f"trainer.precision=auto is {meant} as in the runs that are there" in out
    assert set(precisions().values()) == {meant} and len(precisions()) == 3
    assert {p["resolved"]["precision"] for p in Store("sweeps/s").manifest()["packs"]} == {meant}
    code, out = sweep("method.r=1,2,4")
    assert code == 0 and "trainer.precision=auto" not in out, "nothing to train: nothing to say"


def test_records_say_it_where_the_manifest_was_lost(sweep: Cli, machine: Callable[[bool], None]) -> None:
    machine(True)
    assert sweep("method.r=1,2")[0] == 0
    Path("sweeps/s/sweep.json").unlink()
    machine(False)
    assert sweep("method.r=1,4")[0] == 0
    assert set(precisions().values()) == {"bf16"}


def test_a_precision_that_is_named_is_taken(sweep: Cli, machine: Callable[[bool], None]) -> None:
    """It would make other runs in a cell that is there: they take a sweep of their own."""
    machine(True)
    assert sweep("method.r=1")[0] == 0
    machine(False)
    code, out = sweep("method.r=1", "trainer.precision=32")
    assert code == 2 and "trainer.precision=32" in out and "another sweep.name" in out
    assert sorted(precisions().values()) == ["bf16"]


def test_a_sweep_in_which_nothing_has_trained_is_settled_anew(
    places: tuple[Path, Path], tmp_path: Path, machine: Callable[[bool], None]
) -> None:
    store, run = Store(tmp_path), make_run(*places, **{"trainer.precision": "auto"})
    store.write_manifest({"schema": 1})
    for native in (True, False):
        machine(native)
        note_device(store, run)
        assert store.manifest()["settled"] == {"device": "cpu", "precision": "bf16" if native else "32"}
    store.append_history(run.run_id, [{"step": 1}])  # a run has begun
    machine(True)
    note_device(store, run)
    assert store.manifest()["settled"]["precision"] == "32"


def test_another_kind_of_device_is_refused_until_it_is_accepted(sweep: Cli) -> None:
    assert sweep("method.r=1")[0] == 0
    store = Store("sweeps/s")
    _trained_on(store, "cuda")
    before = _files(store.root / "runs")
    assert sweep("method.r=1")[0] == 0, "nothing to train, nothing to refuse"
    code, out = sweep("method.r=1,2")
    assert code == 2 and _files(store.root / "runs") == before
    assert "trainer.accelerator=auto: cuda, on which runs of" in out and "it is cpu here" in out
    assert "trainer.accelerator=cuda" in out and "sweep.accept_drift=true" in out
    code, out = sweep("method.r=1,2", "sweep.accept_drift=true")
    assert code == 0, out
    assert sorted(r.provenance["device"] for r in store.records()) == ["cpu", "cuda"]
    assert sweep("method.r=1,2,4")[0] == 2, "accepted once is not accepted for good"


@pytest.mark.parametrize("note", [["cpu"], {"precision": 16}])
def test_a_note_that_is_none_is_bad_input(sweep: Cli, note: Any) -> None:
    store = Store("sweeps/s")
    store.write_manifest({"schema": 1, "settled": note})
    code, out = sweep("method.r=1")
    assert code == 2 and "(at settled" in out


def _trained_on(store: Store, device: str) -> None:
    manifest = store.manifest()
    store.write_manifest(manifest | {"settled": manifest["settled"] | {"device": device}})
    for record in store.records():
        record.provenance["device"] = device
        store.write(record)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_report_tells_runs_of_another_precision_apart(tmp_path: Path) -> None:
    from fixtures.sweeps import Planted, build

    store = build(tmp_path / "s", [Planted("lora", (1e-3, 4e-3), 4e-3, 0.75, r=r) for r in (1, 4)])
    for record in store.records():
        _made_by(store, record.run_id, {"precision": "bf16"})
    cells = len(find(load(store.root)).results)
    confirmed = next(r for r in store.records() if r.role == "confirm" and r.config["method"]["r"] == 4)
    _made_by(store, confirmed.run_id, {"precision": "32"})
    apart = find(load(store.root)).results
    assert len(apart) == cells + 1
    assert {dict(r.cell.extra).get("provenance.precision") for r in apart.values()} >= {"32", "bf16"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cuda"}, "differ in kind of device"),
        ({"machine": {"cpu": "Another CPU"}}, "differ in kind of CPU"),
    ],
)
def test_the_report_says_which_runs_differ(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    from fixtures.sweeps import Planted, build

    cells = [Planted("lora", (1e-3, 4e-3), 4e-3, 0.75, r=r) for r in (1, 4)]
    store = build(tmp_path / "s", cells)
    for record in store.records():
        _made_by(store, record.run_id, {"precision": "bf16", "device": "cpu", "machine": {"cpu": "A CPU"}})
    assert not any("differ in" in line for line in warnings(find(load(store.root))))
    confirmed, tuned = (
        next(r for r in store.records() if r.role == role and r.config["method"]["r"] == 4)
        for role in ("confirm", "tune")
    )
    _made_by(store, confirmed.run_id, change)
    lines = warnings(find(load(store.root)))
    assert [line.startswith("Cells compared here " + said) and "r = 4" in line for line in lines if said in line] == [
        True
    ]
    _made_by(store, tuned.run_id, change)
    lines = warnings(find(load(store.root)))
    assert any(line.startswith("Learning rates were chosen among runs that " + said) for line in lines)


def _made_by(store: Store, run_id: str, changes: dict[str, Any]) -> None:
    path = store.run_dir(run_id) / "run.json"
    data = json.loads(path.read_text())
    data["provenance"] |= changes
    path.write_text(json.dumps(data))
