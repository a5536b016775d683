"""`hydra/sweeper=optuna` on a tiny base: trials are runs with records, and the same command goes on with the study."""

import json
import math
import signal
from pathlib import Path

import pytest

from fixtures.runs import make_base, make_data
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.store.records import Record, Store

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install 'lorabench[optuna]'")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

from lorabench.launch.optuna_space import parse_space  # noqa: E402


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("interval(0.0,0.5)", FloatDistribution(0.0, 0.5)),
        ("int(interval(1,64))", IntDistribution(1, 64)),
        ("tag(log,int,interval(1.0,64.0))", IntDistribution(1, 64, log=True)),
        ("range(2,10,3)", IntDistribution(2, 8, step=3)),
        ("1,4,16", CategoricalDistribution(["1", "4", "16"])),
        ("16,2r", CategoricalDistribution(["16", "2r"])),
    ],
)
def test_the_grammar_of_an_axis(text, expected):
    assert parse_space({}, [f"k={text}", "other=1"]).axes == {"k": expected}


def test_the_command_line_wins_and_values_keep_to_their_bounds():
    space = parse_space({"a": "1,2", "b": "interval(0.12344,0.2)"}, ["a=5", "c=x"])
    assert set(space.axes) == {"b"} and space.fixed == ("a=5", "c=x")
    assert space.overrides({"b": 0.12344}) == ("a=5", "c=x", "b=0.12344")  # 0.1234 would lie outside
    assert space.overrides({"b": 0.123456})[-1] == "b=0.1235"


@pytest.mark.parametrize("text", ["5", "tag(log,interval(0.0,1.0))", "interval(3,1)"])
def test_a_space_that_cannot_be_searched(text):
    with pytest.raises(ConfigError):
        parse_space({}, [f"optimizer.lr={text}"])


def record(status, **metrics):
    return Record("0" * 12, "tune", status, {}, {"primary": "accuracy", **metrics})


def test_a_trials_outcome():
    from lorabench.launch.optuna_study import outcome

    good, better = record("completed", **{"val/accuracy": 0.5}), record("completed", **{"val/accuracy": 0.7})
    assert outcome([good, better])[0].name == "COMPLETE" and math.isclose(outcome([good, better])[1] or 0, 0.6)
    assert outcome([good, record("diverged")])[0].name == outcome([record("pruned")])[0].name == "PRUNED"
    assert outcome([good, record("completed", **{"val/accuracy": None})])[0].name == "PRUNED"
    assert outcome([good, record("failed")])[0].name == outcome([None])[0].name == "FAIL"


@pytest.fixture
def search(cli, tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    base, data = make_base(root / "bert", "bert"), make_data(root / "data.csv")

    def run(*argv):
        return cli(
            "-m",
            "hydra/sweeper=optuna",
            "model=hf",
            f"model.source={base}",
            "model.name=tiny",
            "task=text_file",
            f"task.file={data}",
            "task.max_length=32",
            "trainer.max_steps=6",
            "trainer.batch_size=4",
            "trainer.precision=64",
            "trainer.accelerator=cpu",
            "report.enabled=false",
            "sweep.measure_solo=false",
            "sweep.name=s",
            "optimizer.lr=tag(log,interval(1e-3,1e-1))",
            "method.r=1,4",
            "method.alpha=1r,16",
            *argv,
        )

    return run


def study():
    backend = optuna.storages.journal.JournalFileBackend("sweeps/s/optuna/journal")
    return optuna.load_study(study_name="lorabench", storage=optuna.storages.JournalStorage(backend))


def test_trials_are_runs_and_the_study_goes_on(search):
    code, out = search("hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=3")
    assert code == 0, out
    store = Store("sweeps/s")
    records = store.records()
    assert len(records) == 5 and {r.role for r in records} == {"tune"}
    trials = study().trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 5
    assert sorted(t.value for t in trials) == sorted(r.metrics["val/accuracy"] for r in records)
    assert study().direction.name == "MAXIMIZE" and "best of 5 trials: optimizer.lr=" in out
    packs = [p["runs"] for p in store.manifest()["packs"]]
    assert sorted(map(len, packs))[-1] > 1, "a batch is packed"
    cells = {(c["label"]["r"], c["label"]["alpha_rule"]): c["runs"]["tune"] for c in store.manifest()["cells"]}
    assert set(cells) <= {(r, a) for r in (1, 4) for a in ("1r", "16")} and sum(map(len, cells.values())) == 5
    before = {p: p.stat().st_mtime_ns for p in Path("sweeps/s/runs").glob("*/run.json")}
    assert search("hydra.sweeper.n_trials=5")[0] == 0 and len(study().trials) == 5
    assert before == {p: p.stat().st_mtime_ns for p in Path("sweeps/s/runs").glob("*/run.json")}

    cut = study().ask(dict(trials[0].distributions))  # asked for by a launcher that was killed
    code, out = search("hydra.sweeper.n_trials=7", "sweep.confirm_seeds=[7]")
    assert code == 0, out
    assert len(study().trials) == 7 and study().trials[cut.number].state.name == "COMPLETE"
    confirmed = [r for r in store.records() if r.role == "confirm"]
    assert len(confirmed) == 1 and confirmed[0].config["seed"] == 7

    code, out = search("hydra.sweeper.n_trials=8", "method.r=1,2")
    assert code == 2 and "its study searches another space" in out, out


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_that_was_cut_draws_what_it_would_have_drawn(search, sampler):
    short = ["trainer.max_steps=1", f"hydra.sweeper.sampler={sampler}", "hydra.sweeper.n_jobs=2"]
    drawn = {}
    for name, counts in {"whole": [4], "cut": [2, 4]}.items():
        for n in counts:
            code, out = search(f"hydra.sweeper.n_trials={n}", *short)
            assert code == 0, out
        drawn[name] = [t.params for t in study().trials]
        Path("sweeps").rename(name)
    assert drawn["cut"] == drawn["whole"] and len({str(p) for p in drawn["cut"]}) == 4


AXES = {"x": FloatDistribution(0, 1)}


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Make the study as one more launcher of the same sweep loads it, from the folder where it was started."""
    from lorabench.launch.optuna_space import Space
    from lorabench.launch.optuna_study import OptunaStudy, StudySettings

    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # one that waits without end fails
    signal.alarm(300)

    def make(n_trials=4, retry_failed=False):
        settings = StudySettings(n_trials, "random", 0, retry_failed)
        return OptunaStudy(Store("sweeps/s"), Space((), AXES), settings, metric="accuracy", lower_is_better=False)

    yield make
    signal.alarm(0)


def report(launcher, trials, status="completed"):
    for trial in trials:
        launcher.report(trial.number, [record(status, **{"val/accuracy": 0.5})])


def test_a_trial_that_failed_is_asked_for_again_once(launcher):
    """However often the same command is given: what it would ask for again is a trial of the budget."""
    first = launcher(n_trials=5)
    report(first, first.ask(1), "failed")
    (failed,) = study().trials
    for _ in range(3):
        again = launcher(n_trials=5, retry_failed=True)
        asked = again.ask(5)
        assert len(asked) == 5
    assert [t.params for t in study().trials].count(failed.params) == 2
    report(again, asked)
    assert launcher(n_trials=5, retry_failed=True).ask(5) == []
    assert states() == ["FAIL"] + ["COMPLETE"] * 5


def states():
    return [t.state.name for t in study().trials]


def test_a_journal_that_the_disk_had_no_room_for_goes_on(launcher):
    first = launcher()
    report(first, first.ask(2))
    journal = Path("sweeps/s/optuna/journal")
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"study_i')
    for _ in range(2):
        again = launcher()
        report(again, again.ask(2))
    assert states() == ["COMPLETE"] * 4 and journal.read_bytes().startswith(whole)
    journal.write_bytes(whole + b"no line of a journal\n" + whole)
    with pytest.raises(ExistingWork, match="a whole journal"):
        launcher()


def test_a_launcher_that_was_killed_while_it_wrote_stops_nobody(launcher):
    """The lock is a lease, which ends with its holder. Optuna's own would be waited for without end."""
    journal = Path("sweeps/s/optuna/journal")
    journal.parent.mkdir(parents=True)
    Path(f"{journal}.lock").symlink_to(journal)  # as Optuna makes it: to a path that leads nowhere from there
    assert len(launcher().ask(2)) == 2
    held = Store("sweeps/s").leases.take("journal")
    lease = json.loads(held.file.read_text())
    held.file.write_text(json.dumps(lease | {"start": "1"}))  # of a process that is no more
    assert len(launcher().ask(2)) == 2


def test_two_launchers_share_a_study(launcher):
    """Each trains what the other has asked for and not reported yet; together they try as many as one."""
    first, second = launcher(), launcher()
    asked = [first.ask(2), second.ask(2)]
    assert [t.number for t in asked[0]] == [t.number for t in asked[1]] == [0, 1]
    report(first, asked[0])
    report(first, first.ask(2))
    report(second, asked[1])
    assert first.ask(2) == second.ask(2) == [] and states() == ["COMPLETE"] * 4


def test_a_trial_that_was_cut_while_it_was_drawn_is_none(launcher):
    launcher()
    study().ask()  # no parameter was drawn
    for _ in range(2):
        again = launcher()
        report(again, again.ask(2))
    assert sorted(states()) == ["COMPLETE"] * 4 + ["FAIL"]


def test_bad_input_leaves_nothing(search):
    for bad in (
        "method.r=0,1",
        "optimizer.no_such=1,2",
        "seed=1,2",
        "hydra.sweeper.sampler=best",
        "hydra.sweeper.n_jobs=0",
    ):
        code, out = search(bad)
        assert code == 2, out
    assert search("sweep.dry_run=true")[0] == 0
    assert not Path("sweeps").exists()
