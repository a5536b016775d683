"""A pack killed at any instant goes on from its last checkpoint, and what it leaves equals what an undisturbed one leaves."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixtures.packs import remains
from fixtures.runs import make_base, make_data, make_run
from lorabench.config.errors import ExistingWork
from lorabench.config.runs import Pack
from lorabench.runtime import provenance
from lorabench.store import checkpoints
from lorabench.store.records import Store
from lorabench.sweep.workers import Workers
from lorabench.training import distributed
from lorabench.training.module import PackModule
from lorabench.training.train import Listener, OutOfMemory, measure_alone, train


class Killed(BaseException):
    """As sudden as a signal: nothing of ours catches it."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return make_base(root / "bert", "bert", dropout=0.1), make_data(root / "data.csv", rows=60)


COMMON = {
    "trainer.max_steps": 7,
    "trainer.eval_interval": 3,
    "trainer.precision": "32",
    "trainer.checkpoint_interval": 2,
}


def pack_of(places: tuple[Path, Path], *runs: dict[str, Any], prune: bool = False, **common: Any) -> Pack:
    made = [make_run(*places, **{**COMMON, **common, **own}) for own in runs or ({},)]
    return Pack("p0", tuple(made), prune=prune)


def mixed(places: Any) -> Pack:
    """Ranks, seeds, rates and dropout: of the adapters, and the base's own."""
    ranks = ({"method.r": 1}, {"method.r": 4, "seed": 1}, {"method.r": 2, "optimizer.lr": 2e-2})
    return pack_of(places, *ranks, **{"model.dropout": 0.1, "method.dropout": 0.2})


def pruning(places: Any) -> Pack:
    rates = [{"optimizer.lr": lr} for lr in (1e-5, 1e-4, 1e-3, 5e-3, 2e-2, 5e-2)]
    return pack_of(places, *rates, prune=True, **{"trainer.eval_interval": 2})


def diverging(places: Any) -> Pack:
    """One slice's loss is not finite, one stops at once, one stops while others train, and what is best is not the last."""
    slices = ({"method.alpha": 1e30}, {"optimizer.lr": 1e-12}, {"optimizer.lr": 0.3}, {"optimizer.lr": 1e-3})
    stop = {"trainer.early_stopping_patience": 1, "trainer.eval_interval": 1}
    return pack_of(places, *slices, **stop)


def relatives(places: Any) -> Pack:
    """LoRA+ and LoRA-FA have rates of their own; PiSSA's change of start is kept beside what trains."""
    return pack_of(places, *({"method.name": name} for name in ("loraplus", "lorafa", "pissa", "olora")))


PACKS: dict[str, Callable[[Any], Pack]] = {
    "mixed": mixed,
    "pruning": pruning,
    "diverging": diverging,
    "relatives": relatives,
    "dora": lambda places: pack_of(places, {"method.name": "dora"}, {"method.name": "dora", "seed": 1}),
    "full": lambda places: pack_of(places, **{"method.name": "full", "trainer.precision": "bf16"}),
    "accumulation": lambda places: pack_of(places, {}, {"seed": 1}, **{"trainer.accumulate_grad_batches": 2}),
    "last": lambda places: pack_of(places, {}, {"seed": 1}, **{"trainer.keep": "last", "trainer.log_interval": 2}),
    "head": lambda places: pack_of(places, {"method.name": "head"}, {"method.name": "head", "seed": 1}),
    "upper": lambda places: pack_of(places, {}, {"seed": 1}, **{"method.layers": [1]}),
    "confirm": lambda places: pack_of(places, {}, {"method.r": 2}, **{"role": "confirm", "trainer.eval_interval": 2}),
}


def killed(pack: Pack, store: Store, at: int) -> None:
    def step(now: int, total: int) -> None:
        if now == at:
            raise Killed

    with pytest.raises(Killed):
        train(pack, store, Listener(step=step))


SLOW = {"relatives", "dora", "accumulation", "last", "head"}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in PACKS])
def test_killed_at_every_step(places: Any, tmp_path: Path, kind: str) -> None:
    pack = PACKS[kind](places)
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    train(pack, whole)
    want = remains(whole, pack)
    last = max(record.resources["steps"] for record in whole.records())
    for at in range(1, last + 1):
        killed(pack, cut, at)
    first = train(pack, cut)[0]
    assert first.provenance["resumed"], "it went on from a checkpoint"
    assert remains(cut, pack) == want
    assert whole.read(first.run_id).provenance.keys() == first.provenance.keys() - {"resumed"}
    assert not (cut.root / "checkpoints").exists()


@pytest.mark.parametrize("interval", [0, 1, 2, 3], ids=lambda n: f"every{n}")
def test_sigterm_finishes_the_step_and_writes_a_checkpoint(places: Any, tmp_path: Path, interval: int) -> None:
    """At every step in turn: between evaluations, before one, inside one of several batches, at the last step."""
    small = {"trainer.eval_batch_size": 4, "trainer.checkpoint_interval": interval and 100, "role": "confirm"}
    pack = pack_of(places, {}, {"seed": 1}, **small, **{"trainer.eval_interval": interval or 3})
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    train(pack, whole)

    def step(now: int, total: int) -> None:
        if now == at:
            os.kill(os.getpid(), signal.SIGTERM)

    for at in range(1, 8):
        with pytest.raises(SystemExit) as e:
            train(pack, cut, Listener(step=step))
        assert e.value.code == 143
        assert checkpoints.last_step(cut.root, "p0") == (at if interval else None)
    first = train(pack, cut)[0]
    assert first.provenance.get("resumed") == ([1, 2, 3, 4, 5, 6, 7] if interval else None)
    assert remains(cut, pack) == remains(whole, pack)


def test_sigterm_while_testing(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = pack_of(places, {}, {"seed": 1}, **{"role": "confirm", "trainer.eval_batch_size": 4})
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    train(pack, whole)

    def told(module: Any) -> None:
        module._chunks = {}
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PackModule, "on_test_epoch_start", told)
        with pytest.raises(SystemExit) as e:
            train(pack, cut)
    assert e.value.code == 143
    assert train(pack, cut)[0].provenance["resumed"] == [7]
    assert remains(cut, pack) == remains(whole, pack)


def test_sigterm_while_a_cell_is_timed(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own way out has exit code 0 there."""
    step = PackModule.training_step

    def told(module: Any, batch: Any, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, index)

    monkeypatch.setattr(PackModule, "training_step", told)
    with pytest.raises(SystemExit) as e:
        measure_alone(pack_of(places).runs[0], Store(tmp_path))
    assert e.value.code == 143


@pytest.mark.parametrize("before", ["fit", "validate", "test"])
def test_sigterm_between_what_lightning_does(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Lightning hears nothing before it trains or evaluates: the signal is not lost, and the last step is in a checkpoint."""
    from lorabench.training import fit

    pack = pack_of(places, {}, {"seed": 1}, **{"role": "confirm", "trainer.checkpoint_interval": 100})
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    train(pack, whole)
    call = getattr(fit.pl.Trainer, before)

    def told(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return call(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fit.pl.Trainer, before, told)
        with pytest.raises(SystemExit) as e:
            train(pack, cut)
    assert e.value.code == 143
    assert checkpoints.last_step(cut.root, "p0") == (0 if before == "fit" else 7)
    train(pack, cut)
    assert remains(cut, pack) == remains(whole, pack)


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from lorabench.config.runs import RunConfig
from lorabench.store.records import Store
from lorabench.config.runs import Pack
from lorabench.training.train import Listener, train

runs = tuple(RunConfig.from_dict(r) for r in json.loads(Path(sys.argv[1]).read_text()))
at, name = int(sys.argv[3]), sys.argv[4]
train(Pack("p0", runs), Store(sys.argv[2]),
      Listener(step=lambda now, total: os.kill(os.getpid(), getattr(signal, name)) if now == at else None))
"""


@pytest.mark.parametrize(
    ("name", "code", "step"), [("SIGKILL", -9, 4), pytest.param("SIGTERM", 143, 5, marks=pytest.mark.slow)]
)  # SIGTERM: at every step, in this process, by the test above; in one of its own by tests/faults
def test_a_process_that_is_killed(places: Any, tmp_path: Path, whole: Any, name: str, code: int, step: int) -> None:
    """In a process of its own, by a signal: this one goes on from what it left."""
    pack, store = mixed(places), Store(tmp_path / "cut")
    (tmp_path / "runs.json").write_text(json.dumps([run.to_dict() for run in pack.runs]))
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path / "runs.json"), str(store.root), "5", name]
    done = subprocess.run(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=200)
    assert done.returncode == code, done.stderr.decode()
    assert train(pack, store)[0].provenance["resumed"] == [step]
    assert remains(store, pack) == whole


DIES_ONCE = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
import torch
from lorabench.config.fields import knob
from lorabench.tasks.text_classification import Config as Base

calls = []

@dataclass(frozen=True)
class Config(Base):
    kind: str = knob("local", help="")
    source: str = knob("file", help="")
    data: str = knob("", help="")

    def _rows(self, said):
        return self._file_rows(self.data, "task.data", None, said), ()

    def step(self, model, batch):
        calls.append(torch.is_grad_enabled())
        marker = Path(__file__ + ".died")
        if sum(calls) == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(model, batch)
"""


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_pack_goes_on(places: Any, tmp_path: Path) -> None:
    base, data = places
    file = tmp_path / "mine.py"
    file.write_text(DIES_ONCE)
    task = {
        "kind": "local",
        "name": "mine",
        "file": str(file),
        "data": str(data),
        "text_column": "text",
        "label_column": "label",
    }
    run = make_run(base, data, **COMMON, task=task)
    cut, whole, pack = Store(tmp_path / "cut"), Store(tmp_path / "whole"), Pack("p0", (run,))
    with Workers(1, "cpu") as workers:
        (record,) = workers.train(pack, cut, Listener(), keep=())
        assert record.provenance["resumed"] == [4]
        workers.train(pack, whole, Listener(), keep=())
    assert remains(cut, pack) == remains(whole, pack)


def sweep(folder: Path, places: tuple[Path, Path]) -> subprocess.Popen[bytes]:
    """Two packs of one run, side by side, with checkpoints at SIGTERM only."""
    folder.mkdir(exist_ok=True)
    argv = [
        "-m", "method.r=1,2", "model=hf", f"model.source={places[0]}", "model.name=tiny", "task=text_file", f"task.file={places[1]}",
        "task.max_length=32", "trainer.max_steps=200", "trainer.eval_interval=10", "trainer.batch_size=4", "trainer.precision=32",
        "trainer.accelerator=cpu", "trainer.checkpoint_interval=1000", "sweep.max_pack=1", "sweep.workers=2", "sweep.name=s",
        "sweep.measure_solo=false", "report.enabled=false",
    ]  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "lorabench", *argv], cwd=folder, start_new_session=True)


@pytest.mark.slow
def test_sigterm_reaches_the_workers(places: Any, tmp_path: Path) -> None:
    """Of the launcher alone: its workers finish their step and write a checkpoint, and the same command goes on from there."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    victim = sweep(cut, places)
    deadline = time.monotonic() + 120
    while len(list(cut.glob("sweeps/s/runs/*/history.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.send_signal(signal.SIGTERM)
    assert victim.wait(60) == 143
    assert len(list(cut.glob("sweeps/s/checkpoints/p*/*"))) == 2
    assert sweep(cut, places).wait(200) == 0
    assert sweep(whole, places).wait(200) == 0
    got, want = Store(cut / "sweeps/s"), Store(whole / "sweeps/s")
    assert [(r.run_id, r.metrics) for r in got.records()] == [(r.run_id, r.metrics) for r in want.records()]
    assert all(got.history(i) == want.history(i) and len(got.history(i)) == 220 for i in want.run_ids())
    assert all(len(r.provenance["resumed"]) == 1 for r in got.records())


@pytest.mark.slow
def test_a_worker_that_starts_while_all_end(places: Any, tmp_path: Path) -> None:
    """SIGTERM came a moment before its process was there: it is told none the less."""
    pack = pack_of(places, **{"trainer.max_steps": 10_000, "trainer.checkpoint_interval": 10_000})
    with Workers(1, "cpu") as workers:
        late = Listener(step=lambda now, total: workers._ending.set())
        with pytest.raises(SystemExit) as e:
            workers.train(pack, Store(tmp_path), late, keep=())
    assert e.value.code == 143
    assert 0 < (checkpoints.last_step(tmp_path, "p0") or 0) < 10_000


def test_the_packs_hold_what_they_are_meant_to(places: Any, tmp_path: Path) -> None:
    """Each kind shows the state it is there for; else the test above would prove little."""
    found = {}
    for kind in ("pruning", "diverging", "head", "upper"):
        found[kind] = train(PACKS[kind](places), Store(tmp_path / kind))
    assert {r.status for r in found["pruning"]} == {"completed", "pruned"}
    assert [r.status for r in found["diverging"]] == ["diverged", "completed", "completed", "completed"]
    assert found["diverging"][1].resources["steps"] < found["diverging"][3].resources["steps"]
    assert found["head"][0].provenance["reused_blocks"] == 2 and found["upper"][0].provenance["reused_blocks"] == 1


def test_trunk_reuse_stays_as_it_was_decided(places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried on another batch it might come out otherwise: what was decided is kept, and not tried again."""
    from lorabench.adapters import trunk

    pack, cut = PACKS["upper"](places), Store(tmp_path)
    killed(pack, cut, 4)
    monkeypatch.setattr(trunk, "_exact", lambda *args: False)
    assert train(pack, cut)[0].provenance["reused_blocks"] == 1


def interrupted(places: Any, store: Store, at: int = 6, kind: str = "mixed") -> tuple[Pack, list[Path]]:
    """A pack cut at a step, and its checkpoints, the newest first."""
    pack = PACKS[kind](places)
    killed(pack, store, at)
    return pack, checkpoints.list_checkpoints(checkpoints.pack_folder(store.root, "p0"))


@pytest.fixture(scope="module")
def whole(places: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the pack `mixed` leaves, undisturbed."""
    store = Store(tmp_path_factory.mktemp("whole"))
    train(mixed(places), store)
    return remains(store, mixed(places))


def test_the_last_two_are_kept(places: Any, tmp_path: Path) -> None:
    _, paths = interrupted(places, Store(tmp_path), 7)
    assert [checkpoints.step_of(p) for p in paths] == [6, 4]
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    """A whole checkpoint of other runs: of another sweep's p0."""
    tensors, state = checkpoints.read(path)
    path.unlink()
    checkpoints.write(path.parent, checkpoints.step_of(path), tensors, state | {"runs": ["0" * 12]})


def renamed(path: Path) -> None:
    """Whole and of these runs, yet its tensors have other names: as another version's might."""
    tensors, state = checkpoints.read(path)
    path.unlink()
    checkpoints.write(path.parent, checkpoints.step_of(path), {f"x{name}": t for name, t in tensors.items()}, state)


def partial(path: Path) -> None:
    tensors, state = checkpoints.read(path)
    path.unlink()
    del state["slices"]
    checkpoints.write(path.parent, checkpoints.step_of(path), tensors, state)


def pickled(path: Path) -> None:
    """Bytes under a name that fits them, and nothing in them that is ours."""
    raw = pickle.dumps({"state": print})
    path.unlink()
    path.with_name(f"{path.name[:8]}-{hashlib.sha256(raw).hexdigest()}.safetensors").write_bytes(raw)


@pytest.mark.parametrize("harm", [truncated, flipped, emptied, foreign, partial, pickled])
def test_a_bad_checkpoint_falls_back_to_the_one_before(
    places: Any, tmp_path: Path, whole: Any, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    store = Store(tmp_path)
    pack, paths = interrupted(places, store, 7)
    harm(paths[0])
    assert train(pack, store)[0].provenance["resumed"] == [4]
    assert "checkpoint of step 6 of pack p0: " in (err := capsys.readouterr().err)
    assert "the pack goes on from the one of step 4" in err
    assert remains(store, pack) == whole


def test_without_a_readable_checkpoint_the_pack_starts_anew(
    places: Any, tmp_path: Path, whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    pack, paths = interrupted(places, store)
    for path in paths:
        truncated(path)
    assert "resumed" not in train(pack, store)[0].provenance
    assert "torn or corrupt" in (err := capsys.readouterr().err) and "the pack starts anew" in err
    assert remains(store, pack) == whole


def test_one_that_does_not_fit_after_all_starts_anew(
    places: Any, tmp_path: Path, whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    pack, paths = interrupted(places, store, 7)
    renamed(paths[0])
    assert "resumed" not in train(pack, store)[0].provenance
    assert "not as this version writes it (KeyError: 'trained/" in capsys.readouterr().err
    assert remains(store, pack) == whole


def test_a_history_that_lost_rows_is_not_gone_on_from(places: Any, tmp_path: Path, whole: Any) -> None:
    """What a power cut may do to rows that were not on disk yet."""
    store = Store(tmp_path)
    pack, _ = interrupted(places, store, 7)
    path = store.run_dir(pack.run_ids[1]) / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    assert train(pack, store)[0].provenance["resumed"] == [4]
    assert remains(store, pack) == whole


def test_rows_are_heard_again_from_the_checkpoint_only(places: Any, tmp_path: Path) -> None:
    store, heard = Store(tmp_path), []
    pack, _ = interrupted(places, store, 7)
    train(pack, store, Listener(rows=lambda run_id, rows: heard.extend((run_id, row["step"]) for row in rows)))
    assert min(step for _, step in heard) == 7


def test_a_checkpoint_holds_no_base_weights(places: Any, tmp_path: Path) -> None:
    _, paths = interrupted(places, Store(tmp_path))
    tensors, state = checkpoints.read(paths[0])
    base = Path(places[0], "model.safetensors").stat().st_size
    assert paths[0].stat().st_size < base / 5
    assert {name.split("/")[0] for name in tensors} == {"generator", "trained", "moment", "best"}
    assert all(".lora_" in name or "classifier" in name for name in tensors if not name.startswith("generator"))
    assert state["history"].keys() == set(state["runs"])


def test_best_weights_that_are_the_present_ones_are_not_written_twice(places: Any, tmp_path: Path) -> None:
    """Each evaluation is better than the one before: only between evaluations best and present differ."""
    store = Store(tmp_path)
    pack = pack_of(places, **{"trainer.eval_interval": 2, "trainer.checkpoint_interval": 1, "trainer.max_steps": 9})
    killed(pack, store, 6)
    for path in checkpoints.list_checkpoints(checkpoints.pack_folder(store.root, "p0")):
        tensors, state = checkpoints.read(path)
        assert state["slices"][0]["best_step"] == 4
        assert state["slices"][0]["present_is_best"] == (state["step"] == 4)
        assert any(name.startswith("best/") for name in tensors) == (state["step"] != 4)


CHANGES = {"code": "code_fingerprint", "torch": "packages"}


@pytest.mark.parametrize("name", CHANGES)
def test_drift_is_refused_and_shown_and_can_be_accepted(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store = Store(tmp_path)
    pack, paths = interrupted(places, store, 7)
    then = checkpoints.read(paths[0])[1]["facts"][name]
    value: Any = "9.9.9" if name == "code" else {**provenance.packages(), "torch": "9.9.9"}
    monkeypatch.setattr(provenance, CHANGES[name], lambda: value)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ExistingWork, match="p0 was begun .6 of 7 steps. with") as e:
        train(pack, store)
    assert f"with {name} {then}, here 9.9.9;" in str(e.value)
    assert "sweep.accept_drift=true" in str(e.value) and str(paths[0].parent) in str(e.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (first, *_) = train(pack, store, accept_drift=True)
    assert (first.status, first.provenance["resumed"]) == ("completed", [6])
    assert first.provenance["resumed_with_drift"] == {name: [then, "9.9.9"]}


def test_threads_are_part_of_where_a_number_comes_from(places: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    pack, _ = interrupted(places, store)
    torch.set_num_threads(2)
    with pytest.raises(ExistingWork, match="threads 1, here 2"):
        train(pack, store)


def test_what_else_a_number_depends_on_is_held_against_a_checkpoint(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many processes shared its batches, and the data that forgetting is measured on."""
    store = Store(tmp_path)
    pack, _ = interrupted(places, store)
    monkeypatch.setattr(distributed, "_place", (0, 2))
    monkeypatch.setattr("lorabench.training.checkpointing.probe_fingerprint", lambda run: "changed")
    with pytest.raises(ExistingWork, match="probe None, here changed, processes 1, here 2"):
        train(pack, store)


def test_files_of_a_run_whose_record_stands_are_left_as_they_are(places: Any, tmp_path: Path) -> None:
    """It trains along with those that have none, perhaps under other code: its record speaks of the files that are there."""
    store, pack = Store(tmp_path), pack_of(places, {}, {"method.r": 2}, **{"role": "confirm", "trainer.max_steps": 2})
    train(pack, store)
    kept, other = (store.run_dir(i) for i in pack.run_ids)
    files = {p: p.stat().st_ino for p in kept.rglob("*")}
    assert {p.name for p in files} >= {"adapter", "plan.json", "test.npz", "samples.json", "run.json", "history.jsonl"}
    (other / "run.json").unlink()
    train(pack, store, keep=pack.run_ids[:1])
    assert {p: p.stat().st_ino for p in kept.rglob("*")} == files
    assert (other / "run.json").exists()


def test_a_pack_that_prunes_otherwise_starts_anew(places: Any, tmp_path: Path) -> None:
    """`sweep.prune=false` trains to the end what was pruned: a checkpoint in which rates have left is of no use."""
    store = Store(tmp_path)
    pack, _ = interrupted(places, store, 7, "pruning")
    assert {r.status for r in train(replace(pack, prune=False), store)} == {"completed"}


def test_checkpoints_can_be_off(places: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    killed(pack_of(places, **{"trainer.checkpoint_interval": 0}), store, 7)
    assert not (tmp_path / "checkpoints").exists()


def test_by_default_they_come_with_evaluations_while_these_are_cheap(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorabench.training import checkpointing

    pack = pack_of(places, **{"trainer.checkpoint_interval": None})
    monkeypatch.setattr(checkpointing.Saver, "cost", 0.0)
    monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", 1e9)
    killed(pack, Store(tmp_path / "cheap"), 7)
    monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", 1e-9)
    monkeypatch.setattr(checkpointing.Saver, "cost", 0.0)
    killed(pack, Store(tmp_path / "dear"), 7)
    monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", 1e9)
    monkeypatch.setattr(checkpointing, "MAX_SECONDS_BETWEEN", 0.0)
    killed(pack, Store(tmp_path / "long"), 6)
    steps = {
        name: [checkpoints.step_of(p) for p in checkpoints.list_checkpoints(tmp_path / name / "checkpoints/p0")]
        for name in ("cheap", "dear", "long")
    }
    assert steps == {"cheap": [6, 3], "dear": [3], "long": [5, 4]}


def test_a_checkpoint_that_cannot_be_written_stops_nothing(
    places: Any, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    store, pack = Store(tmp_path), mixed(places)
    monkeypatch.setattr(checkpoints.os, "replace", full)
    monkeypatch.setattr("lorabench.runtime.files.os", SimpleNamespace(**{**vars(os), "replace": os.rename}))
    train(pack, store)
    assert "no checkpoint at step 2: [Errno 28] No space left on device" in capsys.readouterr().err
    assert remains(store, pack) == whole
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_pack_that_fails_keeps_its_checkpoints_for_another_try(
    places: Any, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, pack = Store(tmp_path), mixed(places)

    def step(now: int, total: int) -> None:
        if now == 5:
            raise OSError("the disk is on fire")

    assert {r.status for r in train(pack, store, Listener(step=step))} == {"failed"}
    assert train(pack, store)[0].provenance["resumed"] == [4]
    assert remains(store, pack) == whole


def test_a_pack_that_is_split_leaves_no_checkpoint(places: Any, tmp_path: Path) -> None:
    store, pack = Store(tmp_path), mixed(places)

    def step(now: int, total: int) -> None:
        if now == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory):
        train(pack, store, Listener(step=step))
    assert not (tmp_path / "checkpoints").exists()


def test_names_of_packs_stay_inside_the_sweep(tmp_path: Path) -> None:
    for name in ("../p0", "/p0", ".", "..", "p0/../..", ""):
        with pytest.raises(ExistingWork):
            checkpoints.remove(tmp_path, name)


def test_seconds_and_memory_add_up_over_restarts(places: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    pack, paths = interrupted(places, store)
    tensors, state = checkpoints.read(paths[0])
    state |= {"seconds": {"train": 1000.0, "eval": 500.0}, "peak_memory": 2**50}
    checkpoints.write(paths[0].parent, checkpoints.step_of(paths[0]), tensors, state)
    resources = train(pack, store)[0].resources
    assert 1500 < resources["pack_seconds"] < 1600 and resources["peak_memory_bytes"] == 2**50
