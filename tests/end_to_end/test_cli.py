"""The command line: errors name what is wrong, exit codes mean what they say, and nothing half-done stays."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from lorabench.plan import __main__ as plan
from lorabench.store.records import Store
from lorabench.training import preparation

FAST = [
    "task.train_examples=64",
    "task.val_examples=32",
    "task.test_examples=32",
    "trainer.max_steps=2",
    "trainer.batch_size=8",
]


def write(text: str | bytes, name: str = "data.csv") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


GOOD = "text,label\n" + "".join(f"a {w} thing number {i},{w}\n" for i in range(60) for w in ("good", "bad"))
FILE = ["task=text_file", "task.text_column=text", "task.label_column=label"]

BAD = {
    "unknown key": (["bogus=1"], "bogus"),
    "unknown key, added": (["+bogus=1"], "bogus=1"),
    "unknown nested key": (["+method.rank=4"], "method.rank=4"),
    "wrong type": (["method.r=four"], "method.r=four"),
    "r = 0": (["method.r=0"], "method.r=0"),
    "r negative": (["method.r=-3"], "method.r=-3"),
    "r above min(in, out)": (["method.r=385"], "method.r=385"),
    "alpha = 0": (["method.alpha=0"], "method.alpha=0"),
    "alpha < 0": (["method.alpha=-2"], "method.alpha=-2"),
    "several ranks as a list": (
        ["method.r=[1,4,16]"],
        "method.r=[1, 4, 16]: one value; several are tried one by one with -m method.r=1,4,16\n",
    ),
    "several rates without -m": (
        ["optimizer.lr=1e-3,2e-3"],
        "optimizer.lr=1e-3,2e-3: one value; several are tried one by one with -m optimizer.lr=1e-3,2e-3\n",
    ),
    "several names without -m": (
        ["method.target_modules=query,value"],
        "with -m method.target_modules=query,value; a list is written 'method.target_modules=[query,value]'\n",
    ),
    "confirmation seeds as a number": (
        ["-m", "sweep.confirm_seeds=3", "method.r=1,4"],
        "sweep.confirm_seeds=3: a list of seeds: sweep.confirm_seeds=[3] is one, sweep.confirm_seeds=[100,101,102] are",
    ),
    "tuning seeds as a number": (
        ["-m", "sweep.tune_seeds=3", "method.r=1,4"],
        "sweep.tune_seeds=3: a list of at least one seed: sweep.tune_seeds=[0,1] are two\n",
    ),
    "unmatched target": (["method.target_modules=[nonsense]"], "method.target_modules="),
    "unknown method": (["method.name=adalora"], "method.name=adalora"),
    "unknown model": (["model.source=no/such-model"], "model.source=no/such-model"),
    "unknown model group": (["model=nope"], "model/nope"),
    "rate out of range": (["optimizer.lr=0"], "optimizer.lr=0"),
    "precision": (["trainer.precision=16-mixed"], "trainer.precision=16-mixed"),
    "accelerator": (["trainer.accelerator=tpu9"], "trainer.accelerator=tpu9"),
    "seed": (["seed=-1"], "seed=-1"),
    "role": (["sweep.role=both"], "sweep.role=both"),
    "missing file": ([*FILE, "task.file=absent.csv"], "task.file=absent.csv"),
    "schedule": (["optimizer.schedule=stairs"], "optimizer.schedule=stairs"),
    "free target": (["+model._target_=os.system"], "model._target_"),
    "a value that needs quotes": (
        [*FILE, "task.text_column=Review (en)"],
        """is written 'task.text_column="Review (en)"'""",
    ),
    "no value": (["-m", "method.r"], "argument=method.r: a setting, key=value"),
    "two things at once": (["-m", "--cfg", "job", "method.r=1,2"], "argument=-m --cfg: one of -m, --cfg and --info"),
    "another tool's name": (
        ["trainer.lr=1e-3"],
        "trainer.lr=1e-3: no such setting in the config; here it is optimizer.lr\n",
    ),
    "an experiment as an option": (["--experiment", "smoke"], "an experiment is +experiment=NAME"),
    "no source": (["model=hf"], "model.source=???: must be set: package:<module>/<folder>, a local folder"),
    "unknown experiment": (["+experiment=nope"], "experiment/nope"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_key_and_value_and_writes_nothing(cli, case):
    argv, named = BAD[case]
    code, out = cli(*argv)
    assert code == 2, out
    assert named in out
    assert "Traceback" not in out
    assert os.listdir() == []


BAD_DATA = {
    "missing column": ("words,label\na,b\n", "task.text_column=text"),
    "one class": ("text,label\n" + "".join(f"thing number {i},same\n" for i in range(50)), "task.label_column=label"),
    "empty": ("text,label\n", "task.file=data.csv"),
    "not UTF-8": (b"text,label\ncaf\xe9,good\n" + GOOD.encode()[11:], "task.file=data.csv"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_names_key_and_value_and_writes_nothing(cli, case):
    content, named = BAD_DATA[case]
    write(content)
    code, out = cli(*FILE, "task.file=data.csv")
    assert code == 2, out
    assert named in out
    assert "Traceback" not in out
    assert os.listdir() == ["data.csv"]


def test_a_label_unseen_in_training_is_refused(cli):
    write(GOOD)
    write("text,label\none of a kind,rare\nquite a good thing,good\n", "test.csv")
    code, out = cli(*FILE, "task.file=data.csv", "task.test_file=test.csv")
    assert code == 2, out
    assert "task.label_column=label" in out and "'rare'" in out and "test" in out
    assert sorted(os.listdir()) == ["data.csv", "test.csv"]


def test_an_empty_split_is_refused(cli):
    write(GOOD)
    code, out = cli(*FILE, "task.file=data.csv", "task.val_fraction=0.0001")
    assert code == 2, out
    assert "task.val_fraction=0.0001" in out
    assert os.listdir() == ["data.csv"]


def test_one_bad_run_of_a_sweep_stops_it_before_anything_is_written(cli):
    code, out = cli("-m", "method.r=4,999", "sweep.name=s", *FAST)
    assert code == 2, out
    assert "method.r=999" in out
    assert os.listdir() == []


def test_a_directory_of_other_software_is_refused(cli):
    os.makedirs("sweeps/s")
    write("mine", "sweeps/s/thesis.docx")
    code, out = cli("sweep.name=s", *FAST)
    assert code == 2
    assert "sweep.dir=" in out and "thesis.docx" in out
    assert os.listdir("sweeps/s") == ["thesis.docx"]


def test_a_dry_run_writes_nothing_and_shows_runs_packs_and_parameters(cli):
    code, out = cli("-m", "method.r=1,4", "optimizer.lr=1e-3,1e-2", "sweep.dry_run=true", *FAST)
    assert code == 0, out
    assert "dry run: 4 runs in 1 pack" in out
    assert "GiB" in out
    assert os.listdir() == []


def test_confirmation_seeds_of_a_single_run_are_said_to_be_none(cli):
    code, out = cli("sweep.confirm_seeds=[7,8]", "sweep.dry_run=true", *FAST)
    assert code == 0, out
    assert "sweep.confirm_seeds=[7,8]: a single run confirms nothing; with -m it tunes, then confirms\n" in out
    code, out = cli(*FAST, "method.r=1,4", "-m", "sweep.confirm_seeds=[7,8]", "sweep.dry_run=true")  # -m wherever
    assert code == 0 and "then 4 confirmation runs" in out and "confirms nothing" not in out, out


def test_a_dry_run_counts_both_phases_and_its_hint_at_the_hours_works(cli, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path / "cache"))
    preparation.forget_data()
    grid = ["-m", "method.r=1,4", "optimizer.lr=1e-3,1e-2", "sweep.confirm_seeds=[7,8,9]", *FAST]
    code, out = cli(*grid, "sweep.dry_run=true")
    assert code == 0, out
    assert "then 6 confirmation runs at the rates that tuning chooses (2 cells x 3 seeds): 10 runs in all" in out
    assert os.listdir() == [], "not even what the cache could hold"
    hint = shlex.split(out[out.index("hours: ") :].splitlines()[0])
    assert hint[1:4] == ["python", "-m", "lorabench.plan"]
    assert plan.main([*hint[4:], "--no-measure"]) == 0
    out = capsys.readouterr().out
    assert "2 cells, 2 learning rates in all, 1 tuning seed: 4 tuning runs; 3 confirmation seeds x 2" in out
    assert os.listdir() == []


def test_a_dry_run_says_what_does_not_fit_and_how_it_takes_less(cli, monkeypatch):
    write(GOOD)
    own = [*FILE, "task.file=data.csv", "sweep.dry_run=true", "trainer.max_steps=1"]
    monkeypatch.setattr("lorabench.sweep.memory.available_memory", lambda device: 2**20)
    code, out = cli(*own, "trainer.batch_size=5000")
    said = re.search(r"p0: an estimated (\S+ \S+), more than the 1 MiB that are free here; .* with (.*)", out)
    assert code == 0 and said, out
    assert said[2] == "trainer.batch_size=38 trainer.accumulate_grad_batches=2"  # of the 77 rows to train on
    monkeypatch.setattr("lorabench.sweep.memory.available_memory", lambda device: 2**50)
    code, out = cli(*own, *said[2].split())  # it can be typed
    assert code == 0 and "more than" not in out, out


def test_one_run_trains_and_the_second_time_is_kept(cli):
    argv = ["method.r=2", "sweep.name=one", *FAST]
    code, out = cli(*argv)
    assert code == 0, out
    (run_id,) = Store("sweeps/one").run_ids()
    path = Path("sweeps/one/runs", run_id, "run.json")
    first = path.stat().st_mtime_ns
    record = json.loads(path.read_text())
    assert record["status"] == "completed"
    assert not any(k.startswith("test/") for k in record["metrics"])
    code, out = cli(*argv)
    assert code == 0, out
    assert path.stat().st_mtime_ns == first
    assert Path("reports/one/report.html").is_file()


@pytest.mark.parametrize("tuned", ["sweep.tune_seeds=[0,1]", "seed=0,1", "seed=1"])
def test_confirmation_seeds_must_be_fresh(cli, tuned):
    code, out = cli("-m", tuned, "sweep.confirm_seeds=[1,2]", *FAST)
    assert code == 2
    assert "sweep.confirm_seeds=[1, 2]: fresh seeds: [1] are tuning seeds too" in out
    assert os.listdir() == []


@pytest.mark.parametrize("sweeper", ["grid", "optuna"])
@pytest.mark.parametrize("seeds", ["[]", "3", "null"])
def test_tuning_seeds_are_a_list(cli, seeds, sweeper):
    code, out = cli("-m", f"hydra/sweeper={sweeper}", "method.r=1,2", f"sweep.tune_seeds={seeds}", *FAST)
    assert code == 2, out
    assert f"sweep.tune_seeds={'None' if seeds == 'null' else seeds}: a list of at least one seed" in out
    assert os.listdir() == []
