"""Packs as jobs: who may train a pack, what becomes of one whose job died, and what a launcher finds when it comes back.

The engine here runs a job inside this process, or loses it; `tests/slurm` has the same with a real Slurm.
"""

import dataclasses
import errno
import importlib.util
import itertools
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from fixtures.runs import make_base, make_data, make_run
from lorabench.clusters import crew, engines, job, slurm, watch
from lorabench.clusters.engines import Death, check_executor
from lorabench.clusters.notice import PREEMPTED, STOPPED, TIME_LIMIT, Notice
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.config.runs import Pack
from lorabench.runtime import signals
from lorabench.store import checkpoints
from lorabench.store.records import Store
from lorabench.sweep import ranks
from lorabench.training import preparation
from lorabench.training.train import Listener, OutOfMemory


class Here:
    """An engine whose jobs run when the queue is looked at. lose: how many of them die without a word, and why."""

    name, room = "here", None
    count = itertools.count()

    def __init__(self, lose=0, death=None):
        self.lose, self.why, self.jobs, self.queue = lose, death or Death("node lost"), [], {}

    def submit(self, jobs):
        made = {f"j{next(self.count)}": job for job in jobs}
        self.jobs += jobs
        self.queue |= made
        return list(made)

    def alive(self, ids):
        for i in ids:
            waiting = self.queue.pop(i, None)
            if waiting and self.lose:
                self.lose -= 1
            elif waiting:
                waiting.run(i)
        return set(ids) & set(self.queue)

    def death(self, job):
        return self.why

    def close(self):
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    base, data = make_base(root / "bert", "bert"), make_data(root / "data.csv")
    return [
        "model=hf", f"model.source={base}", "model.name=tiny", "task=text_file", f"task.file={data}", "task.max_length=32",
        "trainer.max_steps=6", "trainer.batch_size=4", "trainer.precision=64", "trainer.accelerator=cpu",
        "report.enabled=false", "sweep.measure_solo=false",
    ]  # fmt: skip


GRID = ["-m", "method.r=1,4", "optimizer.lr=1e-3,2e-2", "sweep.max_pack=2"]


@pytest.fixture
def sweep(cli, tiny, monkeypatch):
    """The grid with its packs as jobs of an engine; returns (exit code, output)."""

    def run(engine, *argv):
        monkeypatch.setattr("lorabench.clusters.engines.EXECUTORS", ("inline", "here"))
        monkeypatch.setattr(crew, "make_engine", lambda *args: engine)
        return cli(
            *GRID, *tiny, "sweep.name=s", "hydra.launcher.executor=here", "hydra.launcher.poll_seconds=0.05", *argv
        )

    return run


def metrics(root="sweeps/s"):
    return {r.run_id: (r.status, r.metrics) for r in Store(root).records()}


def test_a_job_leaves_the_records_of_a_pack_trained_here(sweep, cli, tiny):
    engine = Here()
    code, out = sweep(engine)
    assert code == 0, out
    assert cli(*GRID, *tiny, "sweep.name=inline")[0] == 0
    assert metrics() == metrics("sweeps/inline")
    assert sorted(j.pack_id for j in engine.jobs) == ["p0", "p1"]
    assert "p0: tune LoRA r=1 x 2: 6 steps" in out  # heard from the histories


def test_a_pack_whose_job_died_is_submitted_again(sweep):
    engine = Here(lose=1)
    code, out = sweep(engine)
    assert code == 0, out
    assert sorted(Counter(j.pack_id for j in engine.jobs).values()) == [1, 2]
    assert {s for s, _ in metrics().values()} == {"completed"}


def test_a_pack_whose_jobs_all_die_fails_with_the_reason(sweep):
    engine = Here(lose=99)
    code, out = sweep(engine, "hydra.launcher.resubmit=2")
    assert code == 1, out
    records = Store("sweeps/s").records()
    assert len(records) == 4 and {r.status for r in records} == {"failed"}
    assert all(r.error.startswith("node lost; sweep.retry_failed=true") for r in records)
    assert len(engine.jobs) == 2 * 3
    code, out = sweep(Here(), "sweep.retry_failed=true")
    assert code == 0 and {s for s, _ in metrics().values()} == {"completed"}, out


def test_an_engine_that_is_busy_is_asked_again(sweep):
    """A controller that times out once must not end a sweep of days."""

    class Late(Here):
        asked = 0

        def submit(self, jobs):
            self.asked += 1
            if self.asked < 4:
                raise engines.Busy("sbatch: error: Socket timed out on send/recv operation")
            return super().submit(jobs)

    engine = Late()
    code, out = sweep(engine, "method.r=1")
    assert code == 0 and engine.asked == 4 and len(engine.jobs) == 1, out
    assert out.count("takes no jobs now") == 1


@pytest.mark.parametrize("times", [3, 99])
def test_a_file_that_cannot_be_read_for_a_moment_ends_nothing(sweep, monkeypatch, times):
    real, asked = watch.pass_on_rows, itertools.count()

    def hear(seen):
        if next(asked) < times:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        real(seen)

    monkeypatch.setattr(watch, "pass_on_rows", hear)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)) if times > crew.MISSES_UNTIL_LOST else nullcontext():
        code, out = sweep(Here(), "method.r=1")
        assert code == 0, out


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            engines.Busy,
        ),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", engines.Busy),
        ("sbatch: error: invalid partition specified: gpus", ConfigError),
    ],
)
def test_what_sbatch_says_no_to(tmp_path, said, error):
    submitit = pytest.importorskip("submitit")

    class Executor:
        batch = staticmethod(nullcontext)

        def submit(self, job):
            raise submitit.core.utils.FailedJobError(f"usage\n{said}")

    engine = object.__new__(engines.Submitit)
    engine.name, engine._executor = "slurm", Executor()
    with pytest.raises(error, match="sbatch: error"):
        engine.submit([job.PackJob(str(tmp_path), "p0")])


def test_a_death_that_will_repeat_is_not_submitted_again(sweep):
    engine = Here(lose=99, death=Death("CANCELLED", again=False))
    assert sweep(engine)[0] == 1
    assert len(engine.jobs) == 2


def test_a_preempted_job_costs_no_try(sweep):
    engine = Here(lose=6, death=Death("PREEMPTED", cause=PREEMPTED))
    code, out = sweep(engine, "hydra.launcher.resubmit=0")
    assert code == 0 and len(engine.jobs) == 2 + 6, out
    assert {s for s, _ in metrics().values()} == {"completed"}


@pytest.mark.parametrize("death", [Death("TIMEOUT", cause=TIME_LIMIT), Death("FAILED")], ids=["time-out", "killed"])
@pytest.mark.parametrize(("steps", "jobs"), [([7, 9, 9], 3), ([0], 1)], ids=["further", "no further"])
def test_a_death_costs_a_try_only_without_progress(sweep, monkeypatch, steps, jobs, death):
    """steps: of the checkpoint that each job leaves when it ends; one that is no further than the last is the end."""

    class Late(Here):
        def death(self, job):
            step = steps[len(self.jobs) - 1]
            monkeypatch.setattr(checkpoints, "last_step", lambda root, pack: step)
            return self.why

    engine = Late(lose=99, death=death)
    code, out = sweep(engine, "hydra.launcher.resubmit=0", "method.r=1")
    assert code == 1 and len(engine.jobs) == jobs, out
    begun = steps[-2] if len(steps) > 1 else 0
    limit = f"hydra.launcher.timeout_min is its limit, it went from step {begun} to {steps[-1]}"
    assert all((limit in r.error) == (death.cause == TIME_LIMIT) for r in Store("sweeps/s").records())


@pytest.mark.parametrize(
    ("state", "cause"),
    [("NODE_FAIL", PREEMPTED), ("PREEMPTED", PREEMPTED), ("TIMEOUT", TIME_LIMIT), ("FAILED", None)],
)
def test_what_slurm_says_of_a_death(tmp_path, monkeypatch, state, cause):
    """A lost node is as little a pack's fault as a preemption."""
    engine = object.__new__(engines.Submitit)
    engine.name, engine.logs = "slurm", tmp_path
    monkeypatch.setattr(slurm, "job_state", lambda job: (state, "0:9"))
    assert engine.death("7_0") == Death(f"Slurm job 7_0 ended: {state} (exit code 0:9)", cause=cause)


@pytest.mark.parametrize(
    ("number", "training", "code"), [("SIGTERM", False, 143), ("SIGUSR2", False, None), ("SIGUSR2", True, None)]
)
def test_what_a_job_hears(number, training, code):
    """SIGTERM leaves; SIGUSR2 is for Lightning, while that trains, as its SIGTERM; nothing is heard twice."""
    told, number = [], getattr(signal, number)
    with Notice() as notice:
        own = signal.getsignal(signal.SIGTERM)

        def lightning(number, frame):
            told.append(number)
            own(number, frame)  # Lightning's handler calls the one that was there

        if training:
            signal.signal(signal.SIGTERM, lightning)
        with pytest.raises(SystemExit) if code else nullcontext() as left:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        assert not code or left.value.code == code
        assert (notice.heard, told) == (number, [signal.SIGTERM] if training else [])
        if code or training:
            signal.signal(signal.SIGTERM, own)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        assert notice.why("7_0", on_slurm=False) == (TIME_LIMIT if number == signal.SIGUSR2 else STOPPED)
    assert signal.getsignal(signal.SIGTERM) != own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_job_hears_what_is_deferred_while_a_pack_trains(number):
    """Whoever trains ends at its next whole state, and the job knows why it ended."""
    heard = []

    def train() -> None:
        with signals.defer_stop() as stopped:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            heard.append(stopped())

    with Notice() as notice, pytest.raises(SystemExit, match="143"):
        train()
    assert heard == [True] and notice.heard == number


@pytest.mark.parametrize(
    ("why", "step", "requeues"), [(PREEMPTED, 0, 1), (TIME_LIMIT, 5, 1), (TIME_LIMIT, 3, 0), (STOPPED, 5, 0)]
)
def test_which_jobs_ask_for_another_start(tmp_path, monkeypatch, why, step, requeues):
    """Preempted ones, and timed out ones that got further than the step 3 they began at. All of them say why they left."""
    asked = []

    class Environment:
        job_id = "7_0"
        _requeue = staticmethod(asked.append)

    store = Store(tmp_path)
    job.note_job(store, "p0", engine="slurm", job="7_0", tries=1, step=3)
    monkeypatch.setattr(checkpoints, "last_step", lambda root, pack: step)
    job.PackJob(str(tmp_path), "p0")._leave(store, Environment(), why, begun=3)
    assert (len(asked), job.leave_reason(store, "p0", "7_0"), job.leave_reason(store, "p0", "8_0")) == (
        requeues,
        why,
        None,
    )


@pytest.mark.parametrize(
    ("shown", "state"),
    [
        ("JobState=FAILED ExitCode=143:0 PreemptTime=None", "FAILED"),
        ("JobState=FAILED ExitCode=143:0 PreemptTime=2026-01-01T00:00:00", "PREEMPTED"),
        ("JobState=CANCELLED ExitCode=0:15 PreemptTime=2026-01-01T00:00:00", "CANCELLED"),
    ],
)
def test_a_job_that_ended_in_its_grace_time_was_preempted(monkeypatch, shown, state):
    monkeypatch.setattr(slurm, "command_output", lambda *command: shown)
    assert slurm.job_state("7_0")[0] == state


def test_a_job_killed_for_its_memory_is_split(sweep):
    engine = Here(lose=1, death=Death("OUT_OF_MEMORY", memory=True))

    def death(name):  # it had come some way
        where = checkpoints.pack_folder(Store("sweeps/s").root, job.unended_jobs(Store("sweeps/s")).popitem()[0])
        checkpoints.write(where, 2, {}, {"schema": 1})
        return engine.why

    engine.death = death
    code, out = sweep(engine)
    assert code == 0, out
    assert not list(checkpoints.pack_folder(Store("sweeps/s").root, "p0").parent.glob("*/*"))
    lost = next(j.pack_id for j in engine.jobs if "." in j.pack_id).split(".")[0]
    assert sorted(j.pack_id for j in engine.jobs) == sorted(["p0", "p1", f"{lost}.0", f"{lost}.1"])
    assert {s for s, _ in metrics().values()} == {"completed"}


def test_a_pack_that_ran_out_of_memory_in_its_job_is_split(sweep, monkeypatch):
    from lorabench.sweep import ranks as module

    real = module.train

    def small(pack, *args, **options):
        if len(pack.runs) > 1:
            raise OutOfMemory(f"{pack.id}: too large")
        return real(pack, *args, **options)

    monkeypatch.setattr(module, "train", small)
    engine = Here()
    code, out = sweep(engine)
    assert code == 0, out
    assert sorted(j.pack_id for j in engine.jobs) == ["p0", "p0.0", "p0.1", "p1", "p1.0", "p1.1"]


def test_a_launcher_that_comes_back_waits_for_the_jobs_there_are(sweep, tiny, cli):
    """The first launcher is stopped while its jobs wait; the second finds them and submits nothing."""
    first, looks = Here(), []

    def stop(ids):
        looks.append(ids)
        if len(looks) > 3:
            raise SystemExit(143)
        return set(ids)

    first.alive = stop
    assert sweep(first)[0] == 143
    noted = {p: job.job_entry(Store("sweeps/s"), p)["job"] for p in ("p0", "p1")}
    assert set(noted.values()) == set(first.queue) and not Store("sweeps/s").records()
    second, seen = Here(), []
    second.queue, run = first.queue, second.alive

    def once_more(ids):  # the first look asks what is there; the jobs run after it
        seen.append(ids)
        return set(ids) if len(seen) == 1 else run(ids)

    second.alive = once_more
    code, out = sweep(second)
    assert code == 0, out
    assert not second.jobs and len(Store("sweeps/s").records()) == 4


def test_a_run_whose_history_is_torn_trains_again_in_a_job(sweep):
    assert sweep(Here(), "method.r=1")[0] == 0
    torn = Store("sweeps/s").run_dir(Store("sweeps/s").run_ids()[0]) / "history.jsonl"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-9])
    engine = Here()
    code, out = sweep(engine, "method.r=1")
    assert code == 0 and "the run trains again" in out, out
    assert len(engine.jobs) == 1 and torn.read_bytes() == whole


def test_a_job_trains_as_it_was_asked_last(sweep):
    """What is no part of a run's identity may be said otherwise when a sweep is started again."""
    assert sweep(Here(lose=9), "method.r=1", "hydra.launcher.resubmit=0")[0] == 1
    code, out = sweep(Here(), "method.r=1", "sweep.retry_failed=true", "trainer.save_weights=false")
    assert code == 0, out
    assert len(metrics()) == 2 and not list(Store("sweeps/s").root.glob("runs/*/adapter"))


def test_a_job_holds_its_pack_and_waits_for_whoever_does(sweep, monkeypatch, capsys):
    """Slurm starts a job of a node that is cut off anew elsewhere, while the first start may train on; and a launcher that
    finds no squeue cannot tell that a job of another one is there."""
    real, held = ranks.train, []

    def train(pack, store, *args, **options):
        holders = {name: store.leases.look(name) for name in (pack.id, f"{pack.id}.job")}
        held.append((store.lease and store.lease.parent.name, {n: bool(h and not h.dead) for n, h in holders.items()}))
        return real(pack, store, *args, **options)

    monkeypatch.setattr(ranks, "train", train)
    code, out = sweep(Here(), "method.r=1")
    assert code == 0, out
    assert held == [("p0", {"p0": True, "p0.job": True})]
    store = Store("sweeps/s")
    assert not [p for p in store.leases.folder.glob("p*") if p.is_dir()]

    again = store.run_ids()[0]
    (store.run_dir(again) / "run.json").unlink()
    job.note_job(store, "p0", engine="here", job="twin", tries=1)
    first = store.leases.take("p0")
    with ThreadPoolExecutor(1) as thread:
        twin = thread.submit(job.PackJob(str(store.root), "p0").run, "twin")
        while "p0: waits for process" not in (said := capsys.readouterr().out) and not twin.done():
            time.sleep(0.05)
        assert "which trains it" in said and not job.job_end(store, "p0", "twin") and len(held) == 1
        first.release()
        twin.result(300)
    assert len(held) == 2 and job.job_end(store, "p0", "twin") == {"kind": "done", "job": "twin"}
    assert store.read(again)


def test_a_job_that_no_launcher_noted_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SECONDS_UNTIL_NOTED", 0.3)
    store = Store(tmp_path)
    made = job.PackJob(str(tmp_path), "p0")
    assert not made._is_mine(store, "7_0")
    job.note_job(store, "p0", engine="slurm", job="8_0", tries=1)
    assert not made._is_mine(store, "7_0") and made._is_mine(store, "8_0")


def test_an_end_is_that_of_one_job(tmp_path):
    store = Store(tmp_path)
    job.note_job(store, "p0", engine="slurm", job="7_0", tries=1)
    (job.jobs_folder(store) / "p0.end.json").write_text('{"kind": "done", "job": "7_0"}')
    assert job.job_end(store, "p0", "7_0")["kind"] == "done"
    assert job.job_end(store, "p0", "8_0") == {}
    job.note_job(store, "p0", engine="slurm", job="7_0", tries=2)
    assert job.job_end(store, "p0", "7_0") == {}, "submitted again under a number that came back"
    (job.jobs_folder(store) / "p0.json").write_text("[1")
    assert job.job_entry(store, "p0") == {}
    with pytest.raises(AssertionError):
        job.job_entry(store, "../../x")


def test_jobs_of_another_engine_are_not_trained_here_too(tmp_path, monkeypatch):
    store = Store(tmp_path)
    for pack, made in (("p0", "7_0"), ("p1", "7_1"), ("p2", "7_2")):
        job.note_job(store, pack, engine="slurm", job=made, tries=1)
    (job.jobs_folder(store) / "p1.end.json").write_text('{"kind": "done", "job": "7_1"}')
    monkeypatch.setattr(engines, "alive_jobs", lambda name, ids, logs: set(ids) - {"7_2"})
    with pytest.raises(ExistingWork, match=r"p0: slurm jobs still \(7_0\)"):
        engines.refuse_others(store, "inline")
    engines.refuse_others(store, "slurm")
    monkeypatch.setattr(engines, "alive_jobs", lambda name, ids, logs: None)
    engines.refuse_others(store, "inline")


def test_an_executor_that_is_none(cli):
    code, out = cli("hydra.launcher.executor=slrum", "-m")
    assert code == 2 and "allowed: null, inline, local, slurm, ray" in out


@pytest.mark.parametrize(("executor", "extra"), [("slurm", "slurm"), ("local", "slurm"), ("ray", "ray")])
def test_a_missing_engine_is_named_with_its_extra(executor, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'lorabench\[{extra}\]'"):
        check_executor(executor)


def test_slurm_needs_its_commands(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="no sbatch, srun here"):
        check_executor("slurm")


def test_a_watch_hears_each_row_once(tmp_path, monkeypatch):
    """A pack that was requeued starts its history again; rows that repeat were heard."""

    class Run:
        run_id = "0" * 12

    @dataclasses.dataclass
    class OnePack:
        id = "p0"
        runs = (Run(),)
        run_ids = (Run.run_id,)

    store, heard, began = Store(tmp_path), [], []
    listener = Listener(rows=lambda i, rows: heard.extend(r["step"] for r in rows), start=began.append)
    monkeypatch.setattr(watch, "_total", lambda pack: 9)
    seen = watch.Watch(OnePack(), store, listener, ())
    for rows in ([1, 2], [1], [1, 2], [1, 2, 3]):
        store.reset_history(Run.run_id)
        store.append_history(Run.run_id, [{"step": s} for s in rows])
        watch.pass_on_rows(seen)
    assert heard == [1, 2, 3] and len(began) == 1


def test_a_watch_counts_the_steps_that_a_job_takes(tmp_path):
    """Of plain text an example is a block; rows are sections of several: a bar that ended too soon ended the launcher."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The number of this line is {i}, and so on.\n\n" for i in range(400)))
    task = {"kind": "causal_lm", "source": "text", "file": str(text), "max_length": 16}
    run = make_run(make_base(tmp_path / "gpt2", "gpt2"), text, task=task, **{"trainer.max_steps": None})
    prepared = preparation.prepare(run)
    blocks, rows = (len(splits["train"]) for splits in (prepared.encoded.splits, prepared.data.splits))
    assert blocks > 2 * rows
    assert watch._total(Pack("p0", (run,))) == -(-blocks // 4)


def test_a_file_system_that_timed_out_ends_the_wait_for_a_job(tmp_path):
    """Its error is a TimeoutError like that of a wait that is not over yet: it was waited for on and on."""
    made = crew.JobCrew("here", {"poll_seconds": 1, "resubmit": 1}, "s")
    pack = Pack("p0", ())

    class Answered(watch.Watch):
        def __init__(self, *given):
            super().__init__(*given)
            watch.resolve(self, error=TimeoutError(110, "Connection timed out"))

    with pytest.MonkeyPatch.context() as m, ThreadPoolExecutor(1) as thread:
        m.setattr(crew, "Watch", Answered)
        waiting = thread.submit(made.train, pack, Store(tmp_path), Listener(), keep=())
        try:
            with pytest.raises(TimeoutError, match="Connection timed out"):
                waiting.result(60)
            assert waiting.done()
        finally:
            made._stop.set()


def test_submission_files_are_their_users_alone(tmp_path):
    logs = tmp_path / "locks" / "jobs" / "log"
    engines.keep_private(logs)
    script = logs / "submission_file_1.sh"
    script.write_text("export HF_TOKEN=abc")
    script.chmod(0o644)
    (tmp_path / "mine").write_text("")
    mode = (tmp_path / "mine").stat().st_mode
    (logs / "link").symlink_to(tmp_path / "mine")
    engines.keep_private(logs)
    assert (logs.stat().st_mode & 0o777, script.stat().st_mode & 0o777) == (0o700, 0o600)
    assert (tmp_path / "mine").stat().st_mode == mode
