"""Sweeps end to end on a tiny base: two phases, nothing done twice, failures recorded, launchers agree."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from fixtures.runs import make_base, make_data, make_run
from lorabench.report.answer import answer
from lorabench.results.findings import find
from lorabench.results.sweep import load
from lorabench.store.records import Store
from lorabench.sweep.packs import plan_packs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    base, data = make_base(root / "bert", "bert"), make_data(root / "data.csv")
    return [
        "model=hf", f"model.source={base}", "model.name=tiny", "task=text_file", f"task.file={data}", "task.max_length=32",
        "trainer.max_steps=6", "trainer.batch_size=4", "trainer.precision=64", "trainer.accelerator=cpu",
        "report.enabled=false", "sweep.measure_solo=false",
    ]  # fmt: skip


GRID = ["-m", "method.r=1,4", "optimizer.lr=1e-3,2e-2", "sweep.name=s"]
CONFIRM, WHOLE = "sweep.confirm_seeds=[7,8]", ["report.enabled=true", "sweep.measure_solo=true"]


@pytest.fixture
def cli(cli, tiny):
    """The command on the tiny base; a test's own overrides win."""

    def run(*argv: str) -> tuple[int, str]:
        own_task = any(a.startswith("task=") for a in argv)
        common = [a for a in tiny if not (own_task and a.startswith("task"))]
        flags = [a for a in argv if a.startswith("-")]
        return cli(*flags, *common, *(a for a in argv if a not in flags))

    return run


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory, _cache):
    """A whole sweep of `GRID` and its confirmation, with its report: made once, and copied by who goes on with it."""
    from lorabench import __main__ as entry

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lorabench", "-m", *tiny, *GRID[1:], CONFIRM, *WHOLE])
        entry.main()
    return folder


@pytest.fixture
def copied(cli, finished, tmp_path):
    """`cli` in a folder where the whole sweep stands already."""
    shutil.copytree(finished / "sweeps", tmp_path / "sweeps")
    return cli


def stamps(name="s"):
    return {p: p.stat().st_mtime_ns for p in Path("sweeps", name, "runs").glob("*/run.json")}


def by_id(root):
    return {r.run_id: r for r in Store(root).records()}


def test_the_recommended_command_asks_for_the_run_that_won(cli, tiny, tmp_path):
    """Base, data and budget of the command line are part of it, and so is a config folder of the user's own."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    grids:\n"
        '      lora: {method: lora, method.r: "1,4", method.dropout: 0.1, optimizer.lr: "1e-3,2e-2"}\n'
    )
    argv = [
        "--config-dir=mine",
        "+experiment=own",
        "sweep.confirm_seeds=[7,8,9]",
        "study.margin=0.9",
        "study.metric=loss",
    ]
    code, out = cli(*argv, "trainer.max_steps=3")
    assert code == 0, out
    found = find(load("sweeps/own"))
    command = answer(found).command
    assert command and found.recommendation
    words = shlex.split(command)
    assert words[:5] == ["python", "-m", "lorabench", "--config-dir", "mine"] and "sweep.name=own-chosen" in words
    manifest = found.sweep.manifest
    assert manifest["command"] == ["-m", "--config-dir", "mine", *tiny, *argv[1:], "trainer.max_steps=3"]
    lr = found.results[found.recommendation.cell].lr
    cell = next(c for c in manifest["cells"] if c["id"] == found.recommendation.cell)
    (won,) = [i for i in cell["runs"]["tune"] if manifest["runs"][i]["lr"] == lr]
    code, out = run_plain(*words[3:], "sweep.dry_run=true")
    assert code == 0 and won in out


def run_plain(*argv):
    """The words as they are, in a process of their own."""
    done = subprocess.run([sys.executable, "-m", "lorabench", *argv], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_tune_then_confirm_and_only_confirmation_sees_test(finished):
    store = Store(finished / "sweeps/s")
    records = store.records()
    tune, confirm = [r for r in records if r.role == "tune"], [r for r in records if r.role == "confirm"]
    assert len(tune) == 4 and len(confirm) == 4
    assert not any(k.startswith("test/") for r in tune for k in r.metrics)
    assert all("test/accuracy" in r.metrics for r in confirm)
    assert all(not (store.run_dir(r.run_id) / "test.npz").exists() for r in tune)
    for r in (1, 4):
        losses = {t.config["optimizer"]["lr"]: t.metrics["val/loss"] for t in tune if t.config["method"]["r"] == r}
        chosen = {c.config["optimizer"]["lr"] for c in confirm if c.config["method"]["r"] == r}
        assert chosen == {min(losses, key=losses.__getitem__)}
    assert {c.config["seed"] for c in confirm} == {7, 8}
    assert (finished / "reports/s/report.html").is_file()


def test_the_second_time_nothing_is_trained(copied):
    before = stamps()
    code, out = copied(*GRID, CONFIRM)
    assert code == 0
    assert stamps() == before
    assert "nothing to train" in out


def test_rates_are_added_outward_until_the_best_lies_inside(cli):
    """Two rates far too small: the best is the larger, at the end of what was tried, until a still larger one is worse."""
    low = [
        "-m",
        "method.r=1,4",
        "optimizer.lr=5e-4,2e-3",
        "sweep.name=s",
        "sweep.confirm_seeds=[7]",
        "sweep.extend_lr=true",
    ]
    assert cli(*low, "trainer.max_steps=12")[0] == 0
    records = Store("sweeps/s").records()
    for r in (1, 4):
        own = [x for x in records if x.config["method"]["r"] == r]
        tuned = {x.config["optimizer"]["lr"]: x.metrics["val/loss"] for x in own if x.role == "tune"}
        rates = sorted(tuned)
        assert len(rates) > 2 and all(b == pytest.approx(4 * a) for a, b in pairwise(rates))
        best = min(tuned, key=tuned.__getitem__)
        assert rates[0] < best < rates[-1] or len(rates) == 2 + 6
        assert {x.config["optimizer"]["lr"] for x in own if x.role == "confirm"} == {best}
    before = stamps()
    code, out = cli(*low, "trainer.max_steps=12")
    assert code == 0 and stamps() == before, out


def test_records_of_other_source_code_are_kept_and_said(copied):
    store = Store("sweeps/s")
    record = next(r for r in store.records() if r.role == "tune")
    record.provenance["code"] = "an older one"
    store.write(record)
    before = stamps()
    code, out = copied(*GRID)
    assert code == 0
    assert "1 finished runs were made by other source code" in out
    assert stamps() == before


def test_an_edited_record_is_kept_and_said_at_the_launch_and_in_the_report(copied):
    record = Store("sweeps/s").records()[0]
    path = Path("sweeps/s/runs", record.run_id, "run.json")
    data = json.loads(path.read_text())
    data["metrics"]["val/loss"] = 0.0
    path.write_text(json.dumps(data))
    code, out = copied(*GRID, CONFIRM, "report.enabled=true")
    assert code == 0
    assert f"{path}: edited since it was written; moved away, the run trains again" in out
    assert f"1 record changed after being written ({record.run_id})" in Path("reports/s/report.md").read_text()
    for command, argv in (("claims", ["sweeps/s"]), ("compare", ["sweeps/s", "sweeps/s"])):
        words = [sys.executable, "-m", f"lorabench.{command}", *argv]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert f"1 record changed after being written ({record.run_id})" in done.stderr, done.stderr


def test_a_manifest_whose_pack_names_an_unknown_run_is_refused_in_a_line(copied):
    path = Path("sweeps/s/sweep.json")
    manifest = json.loads(path.read_text())
    gone = manifest["packs"][0]["runs"][-1]
    del manifest["runs"][gone]
    path.write_text(json.dumps(manifest))
    argv = ["-m", "method.r=1,4", "optimizer.lr=1e-3", "sweep.name=s"]
    for more in ([], ["sweep.dry_run=true"]):
        code, out = copied(*argv, *more)
        assert (code, "Traceback" in out) == (2, False), out
        assert f"run {gone}: its sweep.json must list each run" in out.replace("\n", " ")


def test_a_manifest_that_is_nested_too_deeply_is_refused_in_a_line(copied):
    path = Path("sweeps/s/sweep.json")
    whole = path.read_text()
    for depth in (900, 100_000):
        path.write_text(whole.replace("{", '{"x": ' + "[" * depth + "]" * depth + ",", 1))
        code, out = copied("-m", "method.r=1,4", "optimizer.lr=1e-3,5e-3", "sweep.name=s")
        assert (code, "Traceback" in out) == (2, False), out
        assert "error: " in out and "RecursionError" in out or "not valid JSON" in out


def test_a_report_goes_to_a_path_that_looks_like_markup_and_beside_notes_in_the_sweep(copied):
    Path("sweeps/s/notes.txt").write_text("mine")
    Path("sweeps/s/slurm-12.out").write_text("log")
    for place in ("x[/y]", ":boom:", "sweeps/s/report"):
        for _ in range(2):  # the second replaces the first
            code, out = copied(*GRID, CONFIRM, "report.enabled=true", f"report.dir='{place}'")
            assert code == 0, out
            assert f"report: {place}/report.html" in out
        assert Path(place, "report.html").is_file()
    assert Path("sweeps/s/notes.txt").read_text() == "mine"


def test_a_bad_report_dir_is_refused_before_training(cli):
    Path("mydocs/figures").mkdir(parents=True)
    Path("mydocs/report.md").write_text("years of work")
    for place in ("mydocs", "mydocs/report.md", "mydocs/report.md/x", "sweeps", "sweeps/s", "sweeps/s/runs"):
        code, out = cli(*GRID, "report.enabled=true", f"report.dir={place}")
        assert (code, f"error: report.dir={place}: " in out) == (2, True), out
        assert not Path("sweeps").exists()
    assert Path("mydocs/report.md").read_text() == "years of work"


def test_more_rates_later_train_only_what_is_new(copied):
    before = stamps()
    assert copied("-m", "method.r=1,4", "optimizer.lr=1e-3,2e-2,5e-3", "sweep.name=s")[0] == 0
    after = stamps()
    assert len(after) == len(before) + 2
    assert {p: t for p, t in after.items() if p in before} == before


def test_asking_for_part_of_a_finished_pack_trains_nothing(copied):
    before = stamps()
    code, out = copied("-m", "method.r=1", "optimizer.lr=2e-2", "sweep.name=s")
    assert code == 0, out
    assert "nothing to train" in out
    assert stamps() == before


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
def test_hydras_own_launchers_give_the_same_records(copied, launcher, monkeypatch):
    monkeypatch.setenv("JOBLIB_MULTIPROCESSING", "1")
    extra = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    code, out = copied(*[g.replace("name=s", "name=t") for g in GRID], f"hydra/launcher={launcher}", *extra)
    assert code == 0, out
    packed, other = {i: r for i, r in by_id("sweeps/s").items() if r.role == "tune"}, by_id("sweeps/t")
    assert packed.keys() == other.keys()
    for i, record in packed.items():
        assert record.config == other[i].config
        assert record.metrics == pytest.approx(other[i].metrics, abs=1e-10)
    cells = [json.loads(Path(f"sweeps/{n}/sweep.json").read_text())["cells"] for n in "st"]
    assert [(c["id"], c["runs"]["tune"]) for c in cells[0]] == [(c["id"], c["runs"]["tune"]) for c in cells[1]]


def test_a_run_in_two_cells_trains_once(cli):
    code, out = cli("-m", "method.r=4", "method.alpha=8,2r", "sweep.name=s")
    assert code == 0, out
    assert len(stamps()) == 1
    manifest = Store("sweeps/s").manifest()
    assert len(manifest["cells"]) == 2
    assert manifest["cells"][0]["runs"]["tune"] == manifest["cells"][1]["runs"]["tune"]


def test_a_diverged_run_is_recorded_and_its_rate_not_chosen(cli):
    code, out = cli("-m", "method.r=2", "method.alpha=1e300,4", "sweep.name=s", "sweep.confirm_seeds=[9]")
    assert code == 0, out
    status = {(r.config["method"]["alpha"], r.role): r.status for r in Store("sweeps/s").records()}
    assert status == {(1e300, "tune"): "diverged", (4.0, "tune"): "completed", (4.0, "confirm"): "completed"}


def test_failed_runs_are_recorded_the_command_exits_1_and_retries_when_asked(cli, monkeypatch):
    from lorabench.tasks import text_classification

    step = text_classification.Config.step

    def fails(self, model, batch):
        if any(p.shape[-1] == 3 for n, p in model.named_parameters() if n.endswith("lora_B")):
            raise RuntimeError("the disk is on fire")
        return step(self, model, batch)

    monkeypatch.setattr(text_classification.Config, "step", fails)
    argv = ["-m", "method.r=1,3", "sweep.max_pack=1", "sweep.name=s"]
    code, out = cli(*argv)
    assert code == 1, out
    assert "the disk is on fire" in out and "sweep.retry_failed=true" in out
    assert sorted(r.status for r in Store("sweeps/s").records()) == ["completed", "failed"]
    monkeypatch.setattr(text_classification.Config, "step", step)
    assert cli(*argv)[0] == 1, "a failed run is kept until a retry is asked for"
    assert cli(*argv, "sweep.retry_failed=true")[0] == 0
    assert [r.status for r in Store("sweeps/s").records()] == ["completed"] * 2


def test_a_base_whose_slices_would_mix_trains_one_by_one(cli):
    """BERT looks its position embeddings up once for the whole batch, [1, T]: slices cannot each have their own."""
    code, out = cli("-m", "method.r=1,2", "method.target_modules=[position_embeddings]", "sweep.name=s")
    assert code == 0, out
    assert "position_embeddings" in out and "one by one" in out
    store = Store("sweeps/s")
    assert [r.status for r in store.records()] == ["completed"] * 2
    assert {r.resources["pack_size"] for r in store.records()} == {1}
    first, *parts = store.manifest()["packs"]
    assert first["replaced"] == [p["id"] for p in parts] == ["p0.0", "p0.1"]
    before = stamps()
    assert cli("-m", "method.r=1,2", "method.target_modules=[position_embeddings]", "sweep.name=s")[0] == 0
    assert stamps() == before


def test_changed_data_under_the_same_runs_is_refused(cli, tiny, tmp_path):
    data = make_data(tmp_path / "mine.csv", rows=120)
    argv = [*GRID, f"task.file={data}"]
    assert cli(*argv)[0] == 0
    before = stamps()
    make_data(data, rows=130)
    from lorabench.training import preparation

    preparation.forget_data()
    code, out = cli(*argv)
    assert code == 2
    assert "the data files are not those" in out and "sweep.accept_drift=true" in out
    assert stamps() == before
    assert cli(*argv, "sweep.accept_drift=true")[0] == 0
    assert stamps() == before


OWN = """
from dataclasses import dataclass
from lorabench.config.fields import knob
from lorabench.tasks.text_classification import Config as Base

@dataclass(frozen=True)
class Config(Base):
    kind: str = knob("local", help="")
    source: str = knob("file", help="")
    data: str = knob("", help="")

    def _rows(self, said):
        return self._file_rows(self.data, "task.data", None, said), ()
"""


def test_a_changed_file_of_the_users_own_is_refused(cli, tmp_path):
    data = make_data(tmp_path / "mine.csv")
    own = tmp_path / "my_task.py"
    own.write_text(OWN)
    argv = ["-m", "method.r=2", "sweep.name=s", "task=local", f"task.file={own}", f"+task.data={data}"]
    code, out = cli(*argv)
    assert code == 0, out
    assert cli(*argv)[0] == 0
    own.write_text(OWN + "# another thought")
    code, out = cli(*argv)
    assert code == 2
    assert "task.file=" in out and "Python files are not those" in out


def heed_interrupts() -> None:
    """A shell that runs its jobs in the background leaves SIGINT ignored to what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


KILLED = [*GRID, "sweep.max_pack=1", "trainer.max_steps=40"]  # four packs of one run


def command(folder: Path, tiny: list[str]) -> subprocess.Popen[bytes]:
    """The sweep of the kill tests as a process of its own."""
    argv = ["-m", *tiny, *KILLED[1:]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", "lorabench", *argv],
        cwd=folder,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        **quiet,
    )


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGKILL", -9), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("SIGTERM", 143), ("SIGINT", 130)))],
)
def test_stopped_in_the_middle_and_started_again_gives_the_same_records(cli, tiny, tmp_path, name, code):
    victim = command(tmp_path, tiny)
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("sweeps/s/runs/*/run.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # into the next pack's training
    os.killpg(victim.pid, getattr(signal, name))
    assert victim.wait(60) in (code, -getattr(signal, name))
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("sweeps/s/runs/*/run.json")}
    assert 2 <= len(done) < 4
    assert cli(*KILLED)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert cli(*KILLED, "sweep.dir=undisturbed")[0] == 0
    want, got = by_id("undisturbed"), by_id("sweeps/s")
    assert want.keys() == got.keys()
    for i in want:
        assert want[i].metrics == got[i].metrics
        assert Store("undisturbed").history(i) == Store("sweeps/s").history(i)


def test_packs_hold_runs_of_equal_rank_together(tiny, tmp_path):
    base, data = make_base(tmp_path / "b", "bert"), make_data(tmp_path / "d.csv")
    runs = [make_run(base, data, **{"method.r": r, "seed": s}) for s in (0, 1) for r in (1, 16)]
    runs.append(make_run(base, data, **{"method.name": "full"}))
    packs = plan_packs(runs, 2)
    got = [[(r.method.r, r.seed) for r in p.runs] for p in packs]
    assert got == [[(1, 0), (1, 1)], [(16, 0), (16, 1)], [(0, 0)]]  # a method without a rank counts as 0


class NarrowMemory:
    """A stand-in for a device too small: no machine here runs out at these sizes. Packs above `most` runs do not fit."""

    def __init__(self, monkeypatch, most):
        import torch

        from lorabench.training.module import PackModule

        step = PackModule.training_step

        def narrow(module, batch, index):
            if len(module.runs) > most and module.steps_done == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return step(module, batch, index)

        monkeypatch.setattr(PackModule, "training_step", narrow)


def test_a_pack_that_does_not_fit_trains_in_halves_with_nothing_lost(cli, monkeypatch):
    argv = ["-m", "method.r=1,2,3,4,5"]
    assert cli(*argv, "sweep.name=wide")[0] == 0
    NarrowMemory(monkeypatch, 2)
    code, out = cli(*argv, "sweep.name=narrow")
    assert code == 0, out
    assert "need more memory than there is; it trains in halves" in out
    packs = {p["id"]: p for p in Store("sweeps/narrow").manifest()["packs"]}
    assert packs["p0"]["replaced"] == ["p0.0", "p0.1"] and packs["p0.0"]["replaced"] == ["p0.0.0", "p0.0.1"]
    assert sorted(len(p["runs"]) for p in packs.values() if "replaced" not in p) == [1, 2, 2]
    wide, narrow = by_id("sweeps/wide"), by_id("sweeps/narrow")
    assert wide.keys() == narrow.keys() and len(wide) == 5
    for run_id, record in wide.items():
        assert narrow[run_id].status == "completed"
        assert narrow[run_id].metrics["val/loss"] == pytest.approx(record.metrics["val/loss"], abs=1e-10)
        steps = [row["step"] for row in Store("sweeps/narrow").history(run_id) if "train/loss" in row]
        assert steps == list(range(1, 7))  # what the pack that did not fit had written is gone
    before = stamps("narrow")
    assert cli(*argv, "sweep.name=narrow")[0] == 0
    assert stamps("narrow") == before


def test_a_lone_run_that_does_not_fit_is_a_failed_record(cli, monkeypatch):
    NarrowMemory(monkeypatch, 0)
    code, out = cli("sweep.name=s")
    assert code == 1 and "out of memory" in out
    assert [r.status for r in Store("sweeps/s").records()] == ["failed"]


def test_two_workers_give_the_records_of_one(cli):
    """Packs side by side in processes of their own: same records, live progress from both, nothing trained twice."""
    argv = ["-m", "method.r=1,2,3,4", "sweep.max_pack=1"]
    assert cli(*argv, "sweep.name=one")[0] == 0
    code, out = cli(*argv, "sweep.name=two", "sweep.workers=2", "tracker=csv")
    assert code == 0, out
    for pack in ("p0", "p1", "p2", "p3"):
        assert f"{pack}: tune LoRA" in out
    one, two = by_id("sweeps/one"), by_id("sweeps/two")
    assert one.keys() == two.keys() and len(one) == 4
    for run_id, record in one.items():
        assert two[run_id].metrics["val/loss"] == pytest.approx(record.metrics["val/loss"], abs=1e-10)
        assert Path("sweeps/two/runs", run_id, "history.csv").is_file()
    before = stamps("two")
    code, out = cli(*argv, "sweep.name=two", "sweep.workers=2")
    assert code == 0 and "nothing to train" in out
    assert stamps("two") == before


DIES = """
    def step(self, model, batch):
        import os, signal

        if any(p.shape[-1] == 3 for n, p in model.named_parameters() if n.endswith("lora_B")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(model, batch)
"""


def test_a_worker_that_dies_fails_its_pack_alone(cli, tmp_path):
    data, task = make_data(tmp_path / "mine.csv"), tmp_path / "deadly.py"
    task.write_text(OWN + DIES)
    argv = ["-m", "method.r=1,2,3", "sweep.max_pack=1"]
    mine = ["task=local", f"task.file={task}", f"+task.data={data}", "sweep.name=s", "sweep.workers=2"]
    code, out = cli(*argv, *mine)
    assert code == 1, out
    assert "its worker process died" in out
    assert {r.config["method"]["r"]: r.status for r in Store("sweeps/s").records()} == {
        1: "completed", 2: "completed", 3: "failed",
    }  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_a_launch_ends_well_whatever_its_output_takes(copied, tiny):
    """A Latin-1 stdout and a full stderr fail no run; a full stdout is said in a line, after all is recorded."""
    command = [sys.executable, "-m", "lorabench", "-m", *tiny, *GRID[1:], "sweep.confirm_seeds=[7,8,9]", *WHOLE]
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    with open("/dev/full", "wb") as full:
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, env=env, timeout=300, check=False)
        assert made.returncode == 0
        out = made.stdout.decode("latin-1")
        assert "10 runs: 10 completed" in out
        again = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, timeout=300, check=False)
    assert again.returncode == 1
    assert again.stderr.decode("latin-1").splitlines()[-1] == "error: stdout cannot be written: No space left on device"
