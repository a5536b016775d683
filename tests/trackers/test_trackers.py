"""Mirrors: what is read back is what was recorded, and a mirror that breaks costs a run nothing."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lorabench.config.settings import TrackerConfig
from lorabench.store.records import Record, Store
from lorabench.trackers import make_tracker
from lorabench.trackers.contract import Mirror, Tracker
from lorabench.trackers.wandb.runs import display_name, wandb_id
from lorabench.trackers.wandb.tracker import WandbTracker, resolve_mode

RUNS = ("0123456789ab", "ba9876543210", "aaaabbbbcccc")
CONFIG: dict[str, Any] = {"method": {"name": "lora", "r": 8, "alpha": 16.0}, "optimizer": {"lr": 1e-3}, "seed": 3}
HISTORY = (
    {"step": 10, "train/loss": 0.9, "lr": 0.001},
    {"step": 20, "train/loss": 0.7, "lr": 0.0005},
    {"step": 20, "val/loss": 0.8, "val/accuracy": 0.71},
)


def record(run_id: str, status: str = "completed") -> Record:
    metrics = {"val/accuracy": 0.74, "test/accuracy": 0.73, "primary": "accuracy", "best_step": 10}
    return Record(run_id, "confirm", status, CONFIG, metrics, {"train_seconds": 2.5, "trainable_parameters": 4096})


def mirror(kind: str, sweep_dir: Path, runs: tuple[str, ...] = RUNS) -> None:
    """Mirror three runs that are live at once, as in a pack. Rows are in the records before a mirror hears of them."""
    store = Store(sweep_dir)
    tracker = make_tracker(TrackerConfig(name=kind), sweep="my sweep", sweep_dir=sweep_dir)
    assert tracker is not None
    for run_id in runs:
        tracker.start(run_id, CONFIG, method="lora", tags=["minilm", "tweets"])
    for row in HISTORY:
        for k, run_id in enumerate(runs):
            shifted = {key: value if key == "step" else value + k for key, value in row.items()}
            store.append_history(run_id, [shifted])
            tracker.log(run_id, shifted)
    for run_id in runs:
        store.write(record(run_id))
        tracker.finish(run_id, record(run_id))
    tracker.close()
    if isinstance(tracker.tracker, WandbTracker):
        with pytest.MonkeyPatch.context() as m:
            for name, value in {
                "MAX_WAIT": 90.0,
                "WAIT_SHARE": math.inf,
            }.items():  # the machine may do other things, too
                m.setattr(f"lorabench.trackers.wandb.tracker.{name}", value)
            tracker.tracker.leave()


def test_none_is_no_tracker(sweep_dir: Path) -> None:
    assert make_tracker(TrackerConfig(), sweep="s", sweep_dir=sweep_dir) is None


def test_making_one_imports_no_client(sweep_dir: Path) -> None:
    code = """
import sys
from pathlib import Path
from lorabench.config.settings import TrackerConfig
from lorabench.trackers import make_tracker
for kind in ("wandb", "tensorboard", "csv"):
    make_tracker(TrackerConfig(name=kind), sweep="s", sweep_dir=Path("nowhere")).close()
import lorabench.trackers.wandb.mirror, lorabench.trackers.tensorboard
assert not {"wandb", "torch", "tensorboard"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shipped_configs_are_the_trackers_there_are(repo: Path) -> None:
    from omegaconf import OmegaConf

    configs = {path.stem: OmegaConf.load(path) for path in (repo / "conf/tracker").glob("*.yaml")}
    allowed = TrackerConfig.__dataclass_fields__["name"].metadata["choices"]
    assert sorted(configs) == sorted(allowed)
    for stem, cfg in configs.items():
        merged = OmegaConf.merge(OmegaConf.structured(TrackerConfig), cfg)  # an unknown key raises
        assert merged.name == stem


def test_csv_reads_back(sweep_dir: Path) -> None:
    mirror("csv", sweep_dir)
    for k, run_id in enumerate(RUNS):
        with open(sweep_dir / "runs" / run_id / "history.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        assert list(rows[0]) == ["step", "train/loss", "lr", "val/loss", "val/accuracy"]
        read = [{key: float(value) for key, value in row.items() if value} for row in rows]
        assert read == [{key: value if key == "step" else value + k for key, value in row.items()} for row in HISTORY]


def test_csv_of_a_run_that_starts_again_starts_again(sweep_dir: Path) -> None:
    mirror("csv", sweep_dir)
    first = (sweep_dir / "runs" / RUNS[0] / "history.csv").read_text()
    mirror("csv", sweep_dir)
    assert (sweep_dir / "runs" / RUNS[0] / "history.csv").read_text() == first


def test_a_run_that_goes_on_from_a_checkpoint_keeps_its_rows(sweep_dir: Path) -> None:
    """The process that logged the first rows is gone. Each row stands once, those after the checkpoint as they come."""
    whole, cut = sweep_dir / "whole", sweep_dir / "cut"
    for root, on_disk, logged in ((whole, [], HISTORY), (cut, HISTORY[:2], HISTORY[1:])):
        Store(root).append_history(RUNS[0], on_disk)
        tracker = make_tracker(TrackerConfig(name="csv"), sweep="s", sweep_dir=root)
        assert tracker is not None
        tracker.start(RUNS[0], CONFIG, method="lora", tags=[])
        for row in logged:
            tracker.log(RUNS[0], row)
        tracker.finish(RUNS[0], record(RUNS[0]))
        tracker.close()
    texts = [(root / "runs" / RUNS[0] / "history.csv").read_text() for root in (whole, cut)]
    assert texts[0] == texts[1] and texts[0].count("\n") == 1 + len(HISTORY)


def test_tensorboard_reads_back(sweep_dir: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mirror("tensorboard", sweep_dir)
    mirror("tensorboard", sweep_dir, RUNS[:1])  # starts again: no second file beside the first
    for k, run_id in enumerate(RUNS):
        folder = sweep_dir / "runs" / run_id / "tensorboard"
        assert len(list(folder.iterdir())) == 1
        events = EventAccumulator(str(folder)).Reload()
        loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert loss == [(10, pytest.approx(0.9 + k)), (20, pytest.approx(0.7 + k))]
        assert [(e.step, e.value) for e in events.Scalars("final/test/accuracy")] == [(10, pytest.approx(0.73))]
        text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
        assert '"lr": 0.001' in text


def test_tensorboard_of_a_pack_that_starts_again_leaves_nothing_open(sweep_dir: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = make_tracker(TrackerConfig(name="tensorboard"), sweep="s", sweep_dir=sweep_dir)
    assert tracker is not None
    before = threading.active_count()
    for _ in range(3):
        tracker.start(RUNS[0], CONFIG, method="lora", tags=[])
    tracker.finish(RUNS[0], record(RUNS[0]))
    tracker.close()
    assert threading.active_count() == before


def inspect(folder: Path) -> list[dict[str, Any]]:
    """The records of the one .wandb file under a run's folder, through W&B's own reader."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_wandb_offline_reads_back(sweep_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client: three live runs of one process, each with its own group, config, history and summary."""
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    mirror("wandb", sweep_dir)
    for k, run_id in enumerate(RUNS):
        entries: dict[str, list[dict[str, Any]]] = {}
        for entry in inspect(sweep_dir / "runs" / run_id):
            entries.setdefault(entry["type"], []).append(entry[entry["type"]])
        assert not {"stats", "output", "output_raw"} & set(entries)  # no system metrics, no console
        (run,) = entries["run"]
        assert (run["project"], run["run_group"], run["job_type"]) == ("lorabench", "my sweep", "lora")
        assert run["run_id"] == wandb_id("my sweep", run_id) and run["tags"] == ["minilm", "tweets"]
        assert {key: run["config"]["update"][key] for key in CONFIG} == CONFIG
        steps = {entry["item"]["_step"]: entry["item"] for entry in entries["history"]}
        assert len(steps) == len(entries["history"]) == 2
        assert steps[10]["train/loss"] == pytest.approx(0.9 + k)
        assert steps[20]["val/loss"] == pytest.approx(0.8 + k)  # one step holds what was logged at it
        assert steps[20]["train/loss"] == pytest.approx(0.7 + k)
        summary = {key: value for entry in entries["summary"] for key, value in entry["update"].items()}
        assert summary["val/accuracy"] == 0.74 and summary["test/accuracy"] == 0.73  # the record's, not the last row's
        assert summary["resources/trainable_parameters"] == 4096 and summary["status"] == "completed"
        assert entries["exit"][0].get("exit_code", 0) == 0


def test_wandb_ids_are_stable_and_legal() -> None:
    assert wandb_id("rank_sweep", RUNS[0]) == f"rank_sweep-{RUNS[0]}"
    odd = [wandb_id(sweep, RUNS[0]) for sweep in ("a/b c", "a/b-c", "a b/c", "x" * 60, "x" * 61)]
    assert len(set(odd)) == len(odd)
    assert all(len(i) <= 64 and not set(i) & set("/\\#?%: ") for i in odd)


def test_wandb_names_say_what_varies() -> None:
    assert display_name(RUNS[0], CONFIG) == "lora r=8 alpha=16.0 lr=0.001 seed=3"
    assert (
        display_name(RUNS[0], {"method": {"name": "head"}, "optimizer": {"lr": 0.01}, "seed": 0})
        == "head lr=0.01 seed=0"
    )


def test_wandb_is_offline_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine somewhere.else login user password key\n")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "http://somewhere.else:8080")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("online") == "online"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://elsewhere")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert resolve_mode("auto") == "online"


class Broken(Tracker):
    """A tracker that breaks at a given call for a given run."""

    def __init__(self, at: str, run_id: str = RUNS[0]) -> None:
        self.at, self.run_id, self.calls = at, run_id, []  # type: ignore[var-annotated]

    def _note(self, what: str, run_id: str) -> None:
        if what == self.at and run_id in (self.run_id, "close"):
            raise ConnectionError("the server said no")
        self.calls.append((what, run_id))

    def start(self, run_id: str, config: Any, *, method: str, tags: list[str]) -> None:
        self._note("start", run_id)

    def log(self, run_id: str, row: Any) -> None:
        self._note("log", run_id)

    def finish(self, run_id: str, record: Record) -> None:
        self._note("finish", run_id)

    def close(self) -> None:
        self._note("close", "close")


@pytest.mark.parametrize("at", ["build", "start", "log", "finish", "close"])
def test_a_broken_mirror_is_heard_once_and_fails_nothing(at: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Broken(at)

    def build() -> Broken:
        if at == "build":
            raise ImportError("the server said no")
        return broken

    tracker = Mirror("wandb", build)
    for run_id in RUNS:
        tracker.start(run_id, CONFIG, method="lora", tags=[])
    for row in HISTORY:
        for run_id in RUNS:
            tracker.log(run_id, row)
    for run_id in RUNS:
        tracker.finish(run_id, record(run_id))
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("the server said no") == 1
    if at in ("start", "log", "finish"):  # off for that run alone
        assert not [x for x in broken.calls if x[1] == RUNS[0] and x[0] in ("log", "finish")][3:]
        assert [x for x in broken.calls if x[0] == "finish"] == [("finish", RUNS[1]), ("finish", RUNS[2])]


def test_a_client_that_is_not_installed_is_a_message(
    sweep_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    mirror("tensorboard", sweep_dir)
    assert 'pip install "lorabench[tensorboard]"' in capsys.readouterr().err
