"""The sweep benchmark: its grid, its arithmetic and its JSON; and once, for real and small, all of it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import sweep_grid as g
from benchmarks import sweep_vs_peft as command
from benchmarks.sweep_launch import BenchmarkFailed, environment, high_water, launch
from benchmarks.sweep_results import Outcome, Run, Shape, check_equal_work, memory_ratio, ratios, summary, useful_gflops
from benchmarks.sweep_table import tables

SMALL = g.Settings(runs=2, repeats=2, train_examples=20, val_examples=8, batch_size=8, evaluations=2)
TOKENS = 200
FACTS = {
    "blocks": [[4, 6], [6, 4]], "layers": 1, "width": 4, "tokens": TOKENS, "mean_length": 10.0,
    "machine": {"cpu": "one", "cores": 2, "torch": "2"},
}  # fmt: skip
ROOFLINE = {"32": 100.0, "bf16": 200.0}


def make_run(r=4, lr=1e-3, **changes):
    made = Run(
        r=r, lr=lr, seconds=2.0, train_seconds=1.0, tokens=TOKENS, steps=3, evaluated_at=[2, 3], trainable=10 * r,
        train_examples=20, val_examples=8, metric=0.5, peak_memory_bytes=1000,
    )  # fmt: skip
    return replace(made, **changes)


def outcome(variant, repeat, makespan, *, precision="32", peak=1000, **changes):
    runs = [make_run(lr=1e-3, **changes), make_run(lr=2e-3, **changes)]
    return Outcome(variant, repeat, makespan, makespan, peak, precision, runs)


def all_outcomes():
    spans = {"trainer_processes": 40, "trainer_tuned": 30, "peft_loop": 24, "lorabench": 10, "lorabench_fp32": 12}
    return [
        outcome(v, i, span * (1 + i), precision="bf16" if v in ("trainer_tuned", "lorabench") else "32",
                peak=1500 if v == "lorabench" else 1000)
        for i in range(2) for v, span in spans.items()
    ]  # fmt: skip


# -- grid ------------------------------------------------------------------------------------------------------------


def test_the_default_grid_is_four_ranks_at_two_rates():
    asked = g.grid(8, "minilm", prune=False)
    assert asked == g.Grid((4, 8, 16, 32), (1e-3, 2e-3))
    assert len(set(asked.points)) == 8


@pytest.mark.parametrize("runs", [1, 2, 4, 6, 8, 12, 16, 24])
def test_a_grid_has_as_many_runs_as_asked(runs):
    assert len(set(g.grid(runs, "smollm2", prune=False).points)) == runs


@pytest.mark.parametrize(("runs", "prune"), [(3, False), (10, False), (2, True), (12, True), (40, True)])
def test_other_numbers_of_runs_are_refused_by_name(runs, prune):
    with pytest.raises(ValueError, match=f"--runs {runs}"):
        g.grid(runs, "minilm", prune=prune)


def test_pruning_has_eight_rates_a_factor_two_apart_in_each_cell():
    asked = g.grid(8, "minilm", prune=True)
    assert asked.ranks == (8,) and len(asked.rates) == 8
    assert [b / a for a, b in zip(asked.rates, asked.rates[1:], strict=False)] == [2.0] * 7
    assert asked.rates[3:5] == (1e-3, 2e-3)


def test_evaluations_are_spread_and_the_last_is_at_the_last_step():
    s = g.Settings(train_examples=160, batch_size=16)
    assert (s.steps, s.eval_interval, s.evaluated_at) == (10, 5, [5, 10])
    s = replace(s, train_examples=161, epochs=1, evaluations=3)
    assert (s.steps, s.evaluated_at) == (11, [4, 8, 11])
    assert replace(s, evaluations=1).evaluated_at == [11]


def test_lorabench_is_asked_for_the_same_runs(tmp_path):
    """Hydra, the sweeper and the schema read the command line as the peers' settings say."""
    from hydra import compose, initialize_config_dir

    from lorabench.launch.command_line import config_dir
    from lorabench.launch.job import make_job

    s = replace(SMALL, dropout=None)
    overrides = [o for o in g.sweep_overrides(s, "lorabench_fp32") if o != "-m"]
    assert {o for o in overrides if o.startswith(("method.r=", "optimizer.lr="))} == {
        "method.r=4", "optimizer.lr=0.001,0.002"
    }  # fmt: skip
    single = [o.replace("0.001,0.002", "0.001") for o in overrides]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        job = make_job(compose("config", overrides=single), name="x", experiment=None)
    run, t = job.run, job.run.trainer
    assert (run.method.r, run.method.alpha, run.method.dropout, run.method.target_modules) == (
        4,
        16.0,
        0.0,
        "all-linear",
    )
    assert (run.optimizer.weight_decay, run.optimizer.schedule, run.optimizer.warmup_ratio) == (0.0, "linear", 0.06)
    assert (t.batch_size, t.max_epochs, t.eval_interval, t.gradient_clip_val, t.precision) == (8, 1, 2, 1.0, "32")
    assert (run.task.train_examples, run.task.val_examples, run.task.max_length) == (20, 8, 64)
    assert run.model.dropout is None and t.keep == "last" and not job.settings.sweep.measure_solo
    assert job.settings.sweep.workers == 1


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_flops_a_token_by_hand():
    shape = Shape(((4, 6), (6, 4)), layers=1, width=4)
    # P = 48: 4 * 48 = 192; LoRA r = 2: 6 * 2 * (10 + 10) = 240; attention T = 10, H = 4: 12 * 10 * 4 = 480
    assert shape.flops_per_token(2, 10.0) == 192 + 240 + 480


def test_flops_of_minilm():
    """Six blocks of width 384 and 1536: P = 6 * (4 * 384^2 + 2 * 384 * 1536) = 10,616,832."""
    blocks = 6 * [*4 * [(384, 384)], (384, 1536), (1536, 384)]
    shape = Shape(tuple(blocks), layers=6, width=384)
    assert shape.flops_per_token(0, 0) == 4 * 10_616_832
    assert shape.flops_per_token(8, 0) - shape.flops_per_token(0, 0) == 6 * 8 * 6 * (4 * 768 + 2 * 1920)


def test_useful_gflops_weigh_each_run_by_its_own_rank():
    shape = Shape(((4, 6),), layers=0, width=0)
    made = Outcome("lorabench", 0, 9.0, 9.0, 1, "32", [make_run(r=1, tokens=10), make_run(r=2, tokens=10)])
    assert useful_gflops(made, shape, 1.0) == pytest.approx((10 * (96 + 60) + 10 * (96 + 120)) / 2 / 1e9)


def test_ratios_compare_runs_of_one_repeat():
    made = [
        outcome("trainer_processes", 0, 40.0), outcome("lorabench", 0, 10.0),
        outcome("trainer_processes", 1, 90.0), outcome("lorabench", 1, 30.0),
        outcome("trainer_processes", 2, 50.0), outcome("lorabench", 2, 10.0),
        outcome("peft_loop", 0, 24.0),
    ]  # fmt: skip
    assert ratios(made) == {"trainer_processes": {"median": 4.0, "min": 3.0, "max": 5.0, "values": [4.0, 3.0, 5.0]}}


def test_the_loop_is_compared_with_float32_and_pruning_with_the_processes():
    found = ratios([*all_outcomes(), outcome(g.PRUNED, 0, 5.0)])
    assert found["trainer_tuned"]["median"] == 3.0 and found["peft_loop"]["median"] == 2.0
    assert found["trainer_processes_pruned"]["values"] == [8.0]


def test_memory_is_compared_with_one_trainer_process():
    assert memory_ratio(all_outcomes()) == 1.5
    assert memory_ratio([outcome("lorabench", 0, 1.0)]) is None


# -- equal work ------------------------------------------------------------------------------------------------------


def test_equal_work_passes():
    check_equal_work(all_outcomes(), SMALL, TOKENS)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens": 199}, "tokens 199, wanted 200"),
        ({"steps": 2}, "steps 2, wanted 3"),
        ({"evaluated_at": [3]}, "evaluations at steps"),
        ({"train_examples": 19}, "training rows"),
        ({"val_examples": 7}, "validation rows"),
        ({"trainable": 1}, "trainable parameters"),
        ({"status": "diverged"}, "status diverged"),
        ({"lr": 3e-3}, "runs"),
    ],
)
def test_unequal_work_is_an_error(change, what):
    made = all_outcomes()
    made[3].runs[1] = replace(made[3].runs[1], **change)
    with pytest.raises(BenchmarkFailed, match="unequal work: lorabench, repeat 1.*" + what):
        check_equal_work(made, SMALL, TOKENS)


def test_a_pruned_run_may_stop_early_and_only_in_the_variant_that_prunes():
    s = replace(SMALL, runs=8, prune=True)
    points = g.grid(8, "minilm", prune=True).points

    def made(variant):
        runs = [
            make_run(r, lr, status="completed" if i else "pruned", steps=3 if i else 1)
            for i, (r, lr) in enumerate(points)
        ]
        return Outcome(variant, 0, 1.0, 1.0, 1, "32", runs)

    check_equal_work([made(g.PRUNED)], s, TOKENS)
    with pytest.raises(BenchmarkFailed, match="status pruned"):
        check_equal_work([made("lorabench")], s, TOKENS)


# -- output ----------------------------------------------------------------------------------------------------------


def test_the_json_has_its_shape():
    found = json.loads(json.dumps(summary(all_outcomes(), SMALL, FACTS, ROOFLINE), allow_nan=False))
    assert set(found) == {"ratios", "roofline_fraction", "memory_ratio", "runs", "variants", "machine", "settings"}
    assert set(found["ratios"]) == {"trainer_processes", "trainer_tuned", "peft_loop"}
    assert {"median", "min", "max"} <= set(found["ratios"]["peft_loop"])
    per_token = 192 + 6 * 4 * 20 + 480
    assert found["roofline_fraction"] == pytest.approx(2 * TOKENS * per_token / 2 / 1e9 / 200)
    assert len(found["runs"]) == 2 * 5 * 2 and len(found["variants"]) == 2 * 5
    assert {"variant", "repeat", "r", "lr", "seconds", "tokens", "metric", "metric_name"} <= set(found["runs"][0])
    assert {"makespan", "best", "tokens_per_second", "gflops", "peak_memory_bytes"} <= set(found["variants"][0])
    assert found["machine"]["torch"] == "2" and found["machine"]["roofline_gflops"] == ROOFLINE
    assert found["settings"]["ranks"] == [4] and found["settings"]["tokens_per_run"] == TOKENS


def test_float32_is_held_against_the_float32_roofline():
    found = summary([outcome("lorabench", 0, 10.0, precision="32")], SMALL, FACTS, ROOFLINE)
    assert found["variants"][0]["roofline_gflops"] == 100.0 and found["memory_ratio"] is None and found["ratios"] == {}


def test_the_best_of_a_loss_is_the_smallest():
    made = outcome("lorabench", 0, 1.0)
    made.runs[1] = replace(made.runs[1], metric=0.25)
    found = [summary([made], replace(SMALL, model=m), FACTS, ROOFLINE)["variants"][0]["best"] for m in g.MODELS]
    assert found == [0.5, 0.25]


def test_the_table_fits_eighty_columns():
    from rich.console import Console

    made = [*all_outcomes(), outcome(g.PRUNED, 0, 5000.0, peak=10**11, metric=12.5, tokens=10**5)]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for table in tables(summary(made, SMALL, FACTS, ROOFLINE)):
            console.print(table)
    text = console.export_text()
    assert "…" not in text and g.PRUNED in text and "trainer_processes" in text


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--runs", "3"], "--runs 3"),
        (["--repeats", "0"], "a whole number above 0"),
        (["--dropout", "2"], "none, or a number from 0 to 0.9"),
        (["--variants", "lorabench,x"], "x: allowed are trainer_processes"),
        (["--variants", "lorabench_pruned"], "needs --prune"),
        (["--evaluations", "7", "--train-examples", "32"], "these settings make 2 steps"),
        (["--json", "no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(argv, said, capsys):
    with pytest.raises(SystemExit) as e:
        command.main(argv)
    assert e.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(SystemExit):
        command.main([])
    assert "not installed: no_such_package" in capsys.readouterr().err


def test_variants_keep_one_order_and_the_pruned_one_comes_with_its_flag():
    def chosen(*argv):
        return command.settings_of(command.parser().parse_args(argv)).variants

    assert chosen() == g.VARIANTS and chosen("--prune") == (*g.VARIANTS, g.PRUNED)
    assert chosen("--variants", "lorabench,trainer_processes") == ("trainer_processes", "lorabench")


def test_a_child_is_timed_and_watched_and_its_failure_shown(tmp_path):
    held = "import time; x = bytearray(200 * 2**20); x[::4096] = b'1' * len(x[::4096]); time.sleep(0.5)"
    done = launch("holder", ["-c", held], folder=tmp_path / "a", device="cpu")
    assert 0.5 < done.seconds < 30 and done.peak_memory_bytes > 200 * 2**20 and 0 < done.cpu_seconds < 30
    with pytest.raises(BenchmarkFailed, match=r"(?s)broken ended with exit code 3.*the reason") as e:
        launch("broken", ["-c", "print('the reason'); raise SystemExit(3)"], folder=tmp_path / "b", device="cpu")
    assert e.value.code == 1
    assert high_water(Path("/proc/0/status")) == 0


def test_children_find_converted_weights_but_no_tokenised_rows(tmp_path, monkeypatch):
    users = tmp_path / "users"
    (users / "gguf" / "weights").mkdir(parents=True)
    (users / "encoded" / "rows").mkdir(parents=True)
    monkeypatch.setenv("LORABENCH_CACHE", str(users))
    env = environment("cpu", tmp_path / "run")
    own = Path(env["LORABENCH_CACHE"])
    assert (own / "gguf" / "weights").is_dir() and not (own / "encoded").exists() and own != users
    assert env["PYTHONPATH"].startswith(str(Path(command.__file__).parent.parent))
    assert environment("cpu", tmp_path / "run")["LORABENCH_CACHE"] == str(own)  # a second call, as the roofline's


def test_a_benchmark_that_is_ended_ends_its_child(tmp_path, repo):
    """SIGTERM: neither a child nor a scratch folder stays behind."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    script = [sys.executable, repo / "benchmarks" / "sweep_vs_peft.py", "--runs", "1", "--repeats", "1"]
    bench = subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (children := children_of(bench.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        bench.terminate()
        assert bench.wait(30) == 143
    finally:
        bench.kill()
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not list(tmp_path.glob("sweep-benchmark-*"))


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(x) for x in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
def test_end_to_end(tmp_path, repo):
    script, out = repo / "benchmarks" / "sweep_vs_peft.py", tmp_path / "result.json"
    size = ["--runs", "2", "--repeats", "1", "--train-examples", "64", "--val-examples", "32"]
    done = subprocess.run(
        [sys.executable, script, *size, "--json", out], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(out.read_text())
    assert set(found["ratios"]) == {"trainer_processes", "trainer_tuned", "peft_loop"}
    assert [v["variant"] for v in found["variants"]] == list(g.VARIANTS)
    assert len({r["tokens"] for r in found["runs"]}) == 1 and len({r["trainable"] for r in found["runs"]}) == 1
    assert all(0 <= r["metric"] <= 1 and r["seconds"] > 0 for r in found["runs"])
    assert 0 < found["roofline_fraction"] < 1.5 and 0.2 < found["memory_ratio"] < 5
    assert not any(p.name != "result.json" for p in tmp_path.iterdir())
    assert done.stdout.count("[1/1]") == 2 + 2 + 3
