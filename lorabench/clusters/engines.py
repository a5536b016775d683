"""Where jobs are submitted: Slurm and local processes through submitit, and Ray. Each engine knows `PackJob`s and
ids."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorabench.clusters import slurm
from lorabench.clusters.job import PackJob, jobs_folder, unended_jobs
from lorabench.clusters.notice import PREEMPTED, TIME_LIMIT
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.runtime.leases import refuse_link
from lorabench.store.records import Store

EXECUTORS = ("inline", "local", "slurm", "ray")
EXTRAS = {"slurm": ("slurm", "submitit"), "local": ("slurm", "submitit"), "ray": ("ray", "ray")}
# What submitit's AutoExecutor takes under the same name; the rest is Slurm's own there.
SUBMITIT_SETTINGS = {
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "nodes",
    "mem_gb",
    "stderr_to_stdout",
}
JOBS_PER_ARRAY = 1000  # jobs an array at most: Slurm's own default
DEFAULT_LOCAL_CORES = 8  # a local job's share where none was asked for
BUSY_MESSAGE = re.compile(
    r"unable to contact|timed out|time-?out|connection refused|not responding|temporar|try again", re.IGNORECASE
)


class Busy(Exception):
    """What an engine raises that takes no jobs at the moment; the text is its own."""


@dataclass(frozen=True)
class Death:
    """Why a job is gone without a word.

    again: whether it may do better a second time. memory: whether its pack was too large. cause: `PREEMPTED`, which a
    lost node counts as, or `TIME_LIMIT`, where it was one of these.
    """

    reason: str
    again: bool = True
    memory: bool = False
    cause: str | None = None


class Engine(Protocol):
    """What submits jobs and says which are still there. room: jobs at once, where it has no queue of its own."""

    name: str
    room: int | None

    def submit(self, jobs: Sequence[PackJob]) -> list[str]: ...
    def alive(self, ids: Iterable[str]) -> set[str] | None:
        """Return the jobs still queued, running or about to be requeued; None where nobody can say at the moment."""

    def death(self, job: str) -> Death: ...
    def close(self) -> None: ...


def check_executor(executor: str | None) -> str:
    """Return the executor asked for. Raises `ConfigError` for a name that is none and one that cannot be used here."""
    name = executor or "inline"
    if name not in EXECUTORS:
        raise ConfigError("hydra.launcher.executor", executor, f"allowed: null, {', '.join(EXECUTORS)}")
    extra, module = EXTRAS.get(name, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise ConfigError(
            "hydra.launcher.executor", executor, f"{module} is not installed: pip install 'lorabench[{extra}]'"
        )
    if name == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(
            "hydra.launcher.executor", executor, "a machine that can submit to Slurm: no sbatch, srun here"
        )
    return name


def make_engine(name: str, settings: Mapping[str, Any], logs: Path, sweep: str) -> Engine:
    return Ray(settings) if name == "ray" else Submitit(name, settings, logs, sweep)


def keep_private(folder: Path) -> None:
    """Make a folder, if need be, and hide it and its files from other users: scripts hold the launcher's `setup`."""
    refuse_link(folder, "sweep.dir")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink() and path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode & 0o700)


class Submitit:
    """Slurm, or processes of this machine, through submitit. Their jobs outlive the launcher."""

    def __init__(self, name: str, settings: Mapping[str, Any], logs: Path, sweep: str) -> None:
        import submitit

        self.name, self.logs = name, logs
        keep_private(logs)
        asked = {k: v for k, v in settings.items() if v is not None}
        more = dict(asked.pop("additional_parameters", {}))
        if not more.keys() & {"no-requeue", "no_requeue"}:
            more = {"requeue": True} | more  # whatever the cluster's own default is
        if nice := asked.pop("nice", None):
            more = {"nice": nice} | more
        asked["additional_parameters"] = more
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // asked.get("cpus_per_task", DEFAULT_LOCAL_CORES))
        self.room = min(share, asked.get("array_parallelism", share)) if name == "local" else None
        self._executor = submitit.AutoExecutor(folder=logs, cluster=name)
        if name == "local":
            asked = {k: v for k, v in asked.items() if k in SUBMITIT_SETTINGS - {"nodes", "tasks_per_node"} | {"setup"}}
        own = {k if k in SUBMITIT_SETTINGS else f"{name}_{k}": v for k, v in asked.items()}
        if name == "slurm":
            own["slurm_srun_args"] = ["--kill-on-bad-exit=1"]  # a task alone waits for ever
        self._executor.update_parameters(name=f"lorabench-{sweep}", **own)
        self._started: dict[str, Any] = {}

    def submit(self, jobs: Sequence[PackJob]) -> list[str]:
        """Submit jobs and return their ids.

        Raises `ConfigError` with the engine's own words when it takes no such job, and `Busy` when it takes none now.
        """
        import submitit

        made: list[Any] = []
        try:
            for i in range(0, len(jobs), JOBS_PER_ARRAY):
                with self._executor.batch():
                    made += [self._executor.submit(job) for job in jobs[i : i + JOBS_PER_ARRAY]]
        except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as e:
            words = [line for line in str(e).splitlines() if "error" in line.lower()] or str(e).splitlines()
            said = " ".join(words[-1].split())
            if BUSY_MESSAGE.search(said):
                raise Busy(said) from e
            raise ConfigError("hydra.launcher", self.name, said) from e
        keep_private(self.logs)
        self._started.update((job.job_id, job) for job in made)
        return [job.job_id for job in made]

    def alive(self, ids: Iterable[str]) -> set[str] | None:
        if self.name == "slurm":
            return alive_jobs(self.name, ids, self.logs)
        own = {i for i in ids if i in self._started}
        return {i for i in own if self._started[i].state == "RUNNING"} | (
            alive_jobs("local", set(ids) - own, self.logs) or set()
        )

    def death(self, job: str) -> Death:
        last = self._last_words(job)
        if self.name == "local":
            return Death(f"local job {job} died{last}")
        state, code = slurm.job_state(job)
        memory = state == "OUT_OF_MEMORY" or re.search(r"\boom[-_ ]?kill", last, re.IGNORECASE) is not None
        again = not state.startswith(("CANCELLED", "DEADLINE"))
        ended = f"{state} (exit code {code})" if state else "it left the queue"
        cause = {"TIMEOUT": TIME_LIMIT, **dict.fromkeys(("PREEMPTED", "NODE_FAIL", "BOOT_FAIL"), PREEMPTED)}.get(state)
        return Death(f"Slurm job {job} ended: {ended}{last}", again, memory, cause)

    def _last_words(self, job: str) -> str:
        try:
            lines = (self.logs / f"{job}_0_log.err").read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return ""
        said = [line.strip() for line in lines if line.strip() and not line.startswith("submitit ")]
        return f": {said[-1][:300]}" if said else ""

    def close(self) -> None:
        """Leave: jobs go on without the launcher."""


def alive_jobs(name: str, ids: Iterable[str], logs: Path) -> set[str] | None:
    """Return which jobs are still there, whoever submitted them; None where nobody can say."""
    if name == "slurm":
        out = slurm.command_output("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i")
        return None if out is None else set(out.split()) & set(ids)
    return {i for i in ids if _is_job_process(i, logs)}


def _is_job_process(pid: str, logs: Path) -> bool:
    """Whether a local job still runs: its id is that of a process, if it is that process still."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in command and str(logs).encode() in command


def refuse_others(store: Store, name: str) -> None:
    """Raise `ExistingWork` while packs of the sweep are jobs of another engine: they would be trained twice."""
    noted = unended_jobs(store)
    for other in {"slurm", "local"} - {name}:
        ids = {e["job"]: pack for pack, e in noted.items() if e.get("engine") == other}
        if ids and (left := alive_jobs(other, ids, jobs_folder(store).resolve() / "log")):
            raise ExistingWork(
                "hydra.launcher.executor",
                name,
                f"{', '.join(ids[i] for i in sorted(left))}: {other} jobs still ({', '.join(sorted(left))}); "
                f"start with hydra.launcher.executor={other}, which waits for them, or end them",
            )


class Ray:
    """Ray's own tasks. They end with the launcher; the same command then trains what has no record."""

    name: str = "ray"
    room: int | None = None

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import ray

        self._ray, self._refs = ray, dict[str, Any]()
        if not ray.is_initialized():
            ray.init(address=settings.get("address"), log_to_driver=False, include_dashboard=False)
        # the same attempt again is this engine's: a resubmission is noted, Ray's own would not be
        options = {"num_cpus": settings.get("cpus_per_task") or 1, "num_gpus": settings.get("gpus_per_node") or 0}
        self._run = ray.remote(_run_in_ray).options(max_retries=0, **options)

    def submit(self, jobs: Sequence[PackJob]) -> list[str]:
        ids = [f"ray-{secrets.token_hex(4)}" for _ in jobs]
        self._refs |= {i: self._run.remote(job, i, os.getcwd()) for i, job in zip(ids, jobs, strict=True)}
        return ids

    def alive(self, ids: Iterable[str]) -> set[str] | None:
        refs = {i: self._refs[i] for i in ids if i in self._refs}
        if not refs:
            return set()
        _, waiting = self._ray.wait(list(refs.values()), num_returns=len(refs), timeout=0)
        return {i for i, ref in refs.items() if ref in set(waiting)}

    def death(self, job: str) -> Death:
        try:
            self._ray.get(self._refs[job])
        except Exception as e:
            return Death(
                f"Ray task {job}: {type(e).__name__}: {str(e).strip().splitlines()[-1]}",
                memory=type(e).__name__ == "OutOfMemoryError",
            )
        return Death(f"Ray task {job} ended without a word")

    def close(self) -> None:
        self._ray.shutdown()


def _run_in_ray(job: PackJob, me: str, folder: str) -> None:
    os.chdir(folder)  # relative paths of a config are the launcher's
    job.run(me)
