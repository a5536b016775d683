"""Sweeps through a real Slurm on this machine: the same records, whatever happens to jobs and launchers.

`tests/slurm/start` makes it: munged, slurmctld and slurmd on 127.0.0.1, one for this file.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures.runs import make_base, make_data
from lorabench.clusters import job
from lorabench.store import checkpoints
from lorabench.store.records import Store

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'lorabench[slurm]'")
HERE = Path(__file__).resolve().parent
JOBS = ["hydra.launcher.executor=slurm", "hydra.launcher.poll_seconds=0.5", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2"]  # fmt: skip
OFTEN = "trainer.checkpoint_interval=20"
GRID = ["-m", "method.r=1,4", "optimizer.lr=1e-3,2e-2", "sweep.max_pack=2"]


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    root = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([HERE / "start", root], capture_output=True, text=True, timeout=120, check=False)
    if started.returncode:
        pytest.skip(started.stderr.strip() or "tests/slurm/start failed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(root / "slurm.conf"))
        # jobs start in the sweep's folder: what they import is what this test imports
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]))
        yield
    subprocess.run([HERE / "stop", root], timeout=60, check=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    base, data = make_base(root / "bert", "bert"), make_data(root / "data.csv")
    return [
        "model=hf", f"model.source={base}", "model.name=tiny", "task=text_file", f"task.file={data}", "task.max_length=32",
        "trainer.batch_size=4", "trainer.precision=64", "trainer.accelerator=cpu",
        "report.enabled=false", "sweep.measure_solo=false",
    ]  # fmt: skip


@pytest.fixture
def sweep(cli, tiny):
    def run(name, *argv, steps=6):
        return cli(*GRID, *tiny, f"sweep.name={name}", f"trainer.max_steps={steps}", *argv)

    return run


@pytest.fixture
def launcher(tmp_path, tiny, monkeypatch):
    """The same as a process of its own, which a test may kill. It ends with the test."""
    started = []
    monkeypatch.chdir(tmp_path)

    def run(name, *argv, steps=6):
        command = [sys.executable, "-m", "lorabench", *GRID, *tiny, f"sweep.name={name}", f"trainer.max_steps={steps}"]
        # a shell that runs its jobs in the background leaves SIGINT ignored to what it starts
        heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        made = subprocess.Popen(
            [*command, *argv], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **heeds
        )
        started.append(made)
        return made

    yield run
    for made in started:
        made.kill()
        made.communicate()


def metrics(name):
    return {r.run_id: (r.status, r.metrics) for r in Store(f"sweeps/{name}").records()}


def wait_for(what, seconds=300.0):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
    return found


def noted(name, pack="p0"):
    return job.job_entry(Store(f"sweeps/{name}"), pack).get("job")


def history_rows(name):
    return sum(len(Store(f"sweeps/{name}").history(i)) for i in Store(f"sweeps/{name}").run_ids())


def processes_of(made, program=b"\0submitit.core._submit\0"):
    """The Python processes of a job's tasks, by what Slurm put into their environment."""
    names = ["SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"] if "_" in made else ["SLURM_JOB_ID"]
    wanted = [f"{k}={v}".encode() for k, v in zip(names, made.split("_"), strict=True)]
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if program in command and b"srun" not in command and all(w in environment for w in wanted):
            found.append(int(path.name))
    assert found, f"no process of job {made}"
    return found


def slurm_says(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_jobs_leave_the_records_of_the_inline_sweep(sweep):
    code, out = sweep(
        "s", *JOBS, "hydra.launcher.timeout_min=7", "hydra.launcher.partition=debug", "hydra.launcher.nice=5"
    )
    assert code == 0, out
    assert sweep("inline")[0] == 0
    assert metrics("s") == metrics("inline") and len(metrics("s")) == 4
    array = noted("s").split("_")[0]
    assert {noted("s", p) for p in ("p0", "p1")} == {f"{array}_0", f"{array}_1"}, "one job array"
    asked = slurm_says("scontrol", "show", "job", f"{array}_0")
    for words in ("TimeLimit=00:07:00", "Partition=debug", "mem=2G", "NumCPUs=1", "Nice=5", "JobName=lorabench-s"):
        assert words in asked
    assert "2 packs submitted, slurm job" in out and "p1: tune LoRA r=4 x 2: 6 steps" in out
    before = {p: p.stat().st_mtime_ns for p in Path("sweeps/s/runs").glob("*/run.json")}
    code, out = sweep("s", *JOBS)
    assert code == 0 and "nothing to train" in out
    assert before == {p: p.stat().st_mtime_ns for p in Path("sweeps/s/runs").glob("*/run.json")}


@pytest.mark.slow
def test_a_launcher_that_is_a_job_itself(sweep, tiny, tmp_path, monkeypatch):
    """sweeps/slurm.sbatch, from the folder that `sweeps/` shall be in."""
    monkeypatch.setenv("PYTHON", sys.executable)
    file = HERE.parents[1] / "sweeps" / "slurm.sbatch"
    made = subprocess.run(
        ["sbatch", "--parsable", "--wait", "--mem=2G", "--time=10", file, *GRID, *tiny, "sweep.name=s", "trainer.max_steps=6", *JOBS],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = (tmp_path / f"lorabench-{made.stdout.split()[0]}.log").read_text(encoding="utf-8")
    assert made.returncode == 0, made.stderr + said
    assert "2 packs submitted, slurm job" in said and noted("s") != made.stdout.strip()
    assert sweep("inline")[0] == 0
    assert metrics("s") == metrics("inline") and len(metrics("s")) == 4


@pytest.mark.slow
def test_a_killed_launcher_finds_its_jobs_again(sweep, launcher):
    first = launcher("s", *JOBS, steps=400)
    jobs = wait_for(lambda: noted("s") and noted("s", "p1") and [noted("s", "p0"), noted("s", "p1")])
    first.kill()
    first.wait()
    code, out = sweep("s", *JOBS, steps=400)
    assert code == 0, out
    assert "2 packs have jobs already" in out and "submitted" not in out
    assert [noted("s", "p0"), noted("s", "p1")] == jobs
    assert len(list(Path("sweeps/s/locks/jobs/log").glob("*_submitted.pkl"))) == 2
    assert {s for s, _ in metrics("s").values()} == {"completed"} and len(metrics("s")) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "several",
    [
        ["trainer.devices=2", "hydra.launcher.cpus_per_task=2"],
        ["trainer.num_nodes=2", "hydra.launcher.nodes=2"],
        ["trainer.num_nodes=2", "trainer.devices=2", "hydra.launcher.nodes=2"],
    ],
    ids=["devices", "nodes", "both"],
)
def test_one_pack_in_several_processes(sweep, several):
    """Two processes of one task, two nodes, both: one job, the numbers of one process, and no second multirun."""
    code, out = sweep("s", *JOBS, *several, "method.r=4")
    assert code == 0, out
    assert sweep("inline", "method.r=4")[0] == 0
    found, alone = metrics("s"), metrics("inline")
    assert len(found) == 2 and found.keys() == alone.keys()
    for run_id, (status, one) in found.items():
        expected = {
            k: pytest.approx(v, rel=1e-9, abs=1e-12) if isinstance(v, float) else v for k, v in alone[run_id][1].items()
        }
        assert (status, one) == ("completed", expected)
    world = 4 if len(several) > 2 else 2
    assert {r.provenance["devices"] for r in Store("sweeps/s").records()} == {world}
    assert len(list(Path("sweeps/s/locks/jobs/log").glob("*_submitted.pkl"))) == 1 and not Path("multirun").exists()
    nodes = int(slurm_says("scontrol", "show", "job", noted("s")).split("NumNodes=")[1].split()[0])
    assert nodes == (1 if "devices" in several[0] else 2)


def test_nodes_of_a_pack_are_tasks_of_its_job(sweep):
    for argv in (["trainer.num_nodes=2"], [*JOBS, "trainer.num_nodes=2"], [*JOBS, "hydra.launcher.nodes=2"]):
        code, out = sweep("s", *argv)
        assert code == 2 and "trainer.num_nodes=" in out and "hydra.launcher.nodes" in out, out
    assert not Path("sweeps").exists()


def test_jobs_that_fail_leave_failed_records_with_the_reason(sweep):
    code, out = sweep("s", *JOBS, "hydra.launcher.setup=['echo no such module >&2; exit 3']")
    assert code == 1, out
    records = Store("sweeps/s").records()
    assert len(records) == 4 and {r.status for r in records} == {"failed"}
    assert all("Slurm job" in r.error and "ended: FAILED (exit code 3:0)" in r.error for r in records), records[0].error
    assert "p0: Slurm job" in out and "submitted again" in out
    assert "4 of 4 runs failed" in out


def test_what_sbatch_refuses_is_one_line(sweep):
    code, out = sweep("s", *JOBS, "hydra.launcher.partition=nowhere")
    assert code == 2 and "invalid partition" in out and "Traceback" not in out, out
    assert not Store("sweeps/s").records()


@pytest.mark.slow
def test_stopped_launchers_leave_their_jobs_and_cancelled_jobs_fail(launcher):
    """Ctrl-C ends the launcher alone. The jobs are cancelled under the next one: nobody submits them again."""
    waits = "hydra.launcher.setup=['sleep 60']"
    first = launcher("s", *JOBS, waits)
    ids = wait_for(lambda: noted("s") and noted("s", "p1") and [noted("s", "p0"), noted("s", "p1")])
    first.send_signal(signal.SIGINT)
    out = first.communicate(timeout=60)[0].decode()
    assert first.returncode == 130 and "the same command goes on from here" in out, out
    assert set(slurm_says("squeue", "--noheader", "--array", "--format=%i").split()) >= set(ids)
    second = launcher("s", *JOBS, waits)
    while line := second.stdout.readline():
        if b"2 packs have jobs already" in line:
            break
    subprocess.run(["scancel", *ids], check=True)
    out = second.communicate(timeout=120)[0].decode()
    assert second.returncode == 1, out
    records = Store("sweeps/s").records()
    assert len(records) == 4 and all("ended: CANCELLED" in r.error for r in records), out


def resumed(name):
    """The steps at which packs went on from a checkpoint, over all runs."""
    return [step for r in Store(f"sweeps/{name}").records() for step in r.provenance.get("resumed", [])]


def restarts(made):
    return int(slurm_says("scontrol", "show", "job", made).split("Restarts=")[1].split()[0])


def held(pack, *program, once=None):
    """The processes of a pack's job, stopped once it trains, so that it is not done before what a test has in mind."""
    wait_for(once or (lambda: checkpoints.last_step(Path("sweeps/s"), pack)))
    found = processes_of(noted("s", pack), *program)
    for process in found:
        os.kill(process, signal.SIGSTOP)
    return found


def preempt():
    """A job of a partition with more priority takes all nodes for a moment."""
    wants = ["--partition=urgent", "--nodes=2", "--exclusive", "--mem=100"]
    slurm_says("sbatch", *wants, "--output=/dev/null", "--wrap=sleep 1")


@pytest.mark.slow
def test_a_requeued_job_leaves_the_same_records(sweep, launcher):
    """`scontrol requeue` in the middle of training."""
    running = launcher("s", *JOBS, OFTEN, steps=400)
    for pack in ("p0", "p1"):
        held(pack)
        slurm_says("scontrol", "requeue", noted("s", pack))
    out = running.communicate(timeout=900)[0].decode()
    assert running.returncode == 0, out
    assert restarts(noted("s")) == 1
    assert sweep("inline", OFTEN, steps=400)[0] == 0
    assert metrics("s") == metrics("inline") and resumed("s")


@pytest.mark.slow
@pytest.mark.parametrize(("partition", "requeued"), [("debug", True), ("cheap", False)], ids=["requeue", "cancel"])
def test_a_preempted_job_leaves_the_same_records(sweep, launcher, partition, requeued):
    """In the grace time a pack's job writes a checkpoint and asks for its requeue; a partition that cancels what it preempts, and gives no time, forgets the job, and the
    launcher submits the pack again, whatever `resubmit` says."""
    running = launcher(
        "s", *JOBS, OFTEN, "hydra.launcher.resubmit=0", f"hydra.launcher.partition={partition}", steps=400
    )
    jobs = [held(pack) and noted("s", pack) for pack in ("p0", "p1")]
    preempt()
    out = running.communicate(timeout=900)[0].decode()
    assert running.returncode == 0, out
    if requeued:
        assert [noted("s", "p0"), noted("s", "p1")] == jobs and [restarts(job) for job in jobs] == [1, 1], out
    else:
        assert all(f"Slurm job {job} ended: PREEMPTED" in " ".join(out.split()) for job in jobs), out
        assert not set(jobs) & {noted("s", "p0"), noted("s", "p1")} and "submitted again" in out, out
    assert resumed("s") and all(resumed("s"))
    assert sweep("inline", OFTEN, steps=400)[0] == 0
    assert metrics("s") == metrics("inline")


@pytest.mark.slow
@pytest.mark.parametrize(
    "several",
    [["trainer.devices=2", "hydra.launcher.cpus_per_task=2"], ["trainer.num_nodes=2", "hydra.launcher.nodes=2"]],
    ids=["devices", "nodes"],
)
def test_a_preempted_job_of_several_processes_leaves_the_same_records(sweep, launcher, several):
    """They leave at one step, with a checkpoint: there is no other."""
    alike = ["trainer.checkpoint_interval=1000", "method.r=4"]
    running = launcher("s", *JOBS, *alike, *several, "hydra.launcher.resubmit=0", steps=200)
    assert len(held("p0", b"spawn_main", once=lambda: history_rows("s"))) == 2
    preempt()
    out = running.communicate(timeout=900)[0].decode()
    assert running.returncode == 0, out
    assert restarts(noted("s")) == 1 and "submitted again" not in out, out
    assert len(set(resumed("s"))) == 1 and all(step >= 40 for step in resumed("s")), resumed("s")
    assert sweep("inline", *alike, "trainer.devices=2", steps=200)[0] == 0
    assert metrics("s") == metrics("inline")


def back(node):
    """Whether a node that was down is there again; asks for it, which Slurm refuses as long as the node is being cleared."""
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], capture_output=True, timeout=30)
    return "DOWN" not in slurm_says("scontrol", "show", "node", node).split("State=")[1].split()[0]


@pytest.mark.slow
def test_a_pack_whose_node_is_lost_goes_on(sweep, launcher):
    """One of its two nodes goes down, and Slurm may not requeue the job: the launcher submits it again, whatever `resubmit` says."""
    several = [
        "trainer.num_nodes=2",
        "hydra.launcher.nodes=2",
        "+hydra.launcher.additional_parameters={no-requeue: true}",
    ]
    running = launcher("s", *JOBS, OFTEN, *several, "hydra.launcher.resubmit=0", "method.r=4", steps=200)
    held("p0", b"spawn_main")
    first = noted("s")
    slurm_says("scontrol", "update", "NodeName=second", "State=DOWN", "Reason=lost")
    try:
        wait_for(lambda: "JobState=NODE_FAIL" in slurm_says("scontrol", "show", "job", first))
    finally:
        wait_for(lambda: back("second"))
    out = running.communicate(timeout=900)[0].decode()
    assert running.returncode == 0, out
    assert noted("s") != first and "ended: NODE_FAIL" in " ".join(out.split()) and "submitted again" in out, out
    assert resumed("s") and all(step >= 20 for step in resumed("s")), "the process on the other node may leave in order"
    assert sweep("inline", OFTEN, "trainer.devices=2", "method.r=4", steps=200)[0] == 0
    assert metrics("s") == metrics("inline")


@pytest.mark.slow
def test_a_job_that_reaches_its_time_limit_leaves_the_same_records(sweep, launcher):
    """The limit is set to the next full minute, which is how Slurm counts. Its signal wakes the job."""
    options = ["hydra.launcher.resubmit=0", "hydra.launcher.signal_delay_s=20", "method.r=4", "optimizer.lr=1e-3"]
    running = launcher("s", *JOBS, OFTEN, *options, steps=400)
    held("p0")
    made = noted("s")
    minutes = int(slurm_says("squeue", "--noheader", f"--jobs={made}", "--format=%M").split(":")[-2])
    slurm_says("scontrol", "update", f"JobId={made}", f"TimeLimit={minutes + 1}")
    wait_for(lambda: "JobState=PENDING" in slurm_says("scontrol", "show", "job", made))
    slurm_says("scontrol", "update", f"JobId={made}", "TimeLimit=60")
    out = running.communicate(timeout=900)[0].decode()
    assert running.returncode == 0, out
    assert (noted("s"), restarts(made)) == (made, 1) and "submitted again" not in out, out
    assert resumed("s") and all(resumed("s"))
    assert sweep("inline", OFTEN, *options[2:], steps=400)[0] == 0
    assert metrics("s") == metrics("inline")


@pytest.mark.slow
def test_a_time_out_before_the_first_checkpoint_fails_with_the_limit(sweep):
    code, out = sweep("s", *JOBS, "hydra.launcher.resubmit=0", "hydra.launcher.timeout_min=1", "hydra.launcher.setup=[sleep 600]")  # fmt: skip
    assert code == 1, out
    why = "ended: TIMEOUT (exit code 0:15)"
    assert all(why in r.error and "timeout_min is its limit, it went from step 0 to 0" in r.error for r in Store("sweeps/s").records()), out  # fmt: skip


@pytest.mark.slow
def test_a_lost_job_is_submitted_again(sweep, launcher):
    """The job's process is killed as the kernel would; a second job trains the pack."""
    running = launcher("s", *JOBS, steps=1500)
    wait_for(lambda: history_rows("s"))
    first = noted("s")
    os.kill(processes_of(first)[0], signal.SIGKILL)
    out = running.communicate(timeout=300)[0].decode()
    assert running.returncode == 0, out
    assert noted("s") != first and "submitted again" in out
    assert sweep("inline", steps=1500)[0] == 0
    assert metrics("s") == metrics("inline")


@pytest.mark.slow
@pytest.mark.parametrize("stock", ["submitit_slurm", "submitit_local"])
def test_the_stock_launcher_runs_one_run_a_job(sweep, stock):
    code, out = sweep("s", f"hydra/launcher={stock}", "method.r=4", "hydra.launcher.timeout_min=5")
    assert code == 0, out
    assert sweep("inline", "method.r=4", "sweep.max_pack=1")[0] == 0
    assert metrics("s") == metrics("inline") and len(metrics("s")) == 2
    shutil.rmtree(".submitit", ignore_errors=True)
