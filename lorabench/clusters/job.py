"""What runs inside a cluster's job: one pack, rebuilt from the manifest, trained as this process would train it.

<sweep dir>/locks/jobs/<pack>.json        the pack's job: engine, id, how often it was submitted, from which step
<sweep dir>/locks/jobs/<pack>.end.json    what became of that job's training, written by the job as its last act
<sweep dir>/locks/jobs/<pack>.left.json   why it left before that, if it was told to
<sweep dir>/locks/jobs/<pack>.meet.json   where the tasks of that job meet, if it has several
<sweep dir>/locks/jobs/log/               the engine's files: standard output and error, sbatch scripts

Only the job that the first file names trains the pack. So a job whose launcher died before it could note its id
trains nothing, and the next launcher may submit the pack again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabench.clusters.notice import PREEMPTED, TIME_LIMIT, Notice, requeue
from lorabench.config.errors import ConfigError
from lorabench.runtime.files import atomic_write
from lorabench.runtime.terminal import say
from lorabench.store import checkpoints
from lorabench.store.records import Store, dump_json

SECONDS_UNTIL_NOTED = (
    120.0  # seconds that a job waits for the launcher to note its id; a network file system may hide it for 60
)
PACK_ID = re.compile(r"p\d+(\.\d+)*")


def jobs_folder(store: Store) -> Path:
    """Return where jobs are noted and leave word of their end."""
    return store.root / "locks" / "jobs"


def job_entry(store: Store, pack_id: str) -> dict[str, Any]:
    """Return a pack's job as noted: `engine`, `job`, `tries`, `step`; {} where there is none."""
    return _read(_path(store, pack_id, ".json"))


def unended_jobs(store: Store) -> dict[str, dict[str, Any]]:
    """Return the entries whose job has left no word yet, by pack."""
    found = {p.stem: _read(p) for p in sorted(jobs_folder(store).glob("p*.json")) if PACK_ID.fullmatch(p.stem)}
    return {i: e for i, e in found.items() if e.get("job") and not job_end(store, i, e["job"])}


def note_job(store: Store, pack_id: str, **values: Any) -> None:
    """Note the job that may train a pack. What an earlier job left is no longer the pack's end."""
    for word in (".end.json", ".left.json"):
        _path(store, pack_id, word).unlink(missing_ok=True)
    atomic_write(_path(store, pack_id, ".json"), dump_json(values))


def job_end(store: Store, pack_id: str, job: str) -> dict[str, Any]:
    """Return what a job says became of its training: `kind` done, mix, memory or refused; {} before its end."""
    return _last_word(store, pack_id, job, ".end.json")


def leave_reason(store: Store, pack_id: str, job: str) -> str | None:
    """Return why a job left before its end, if it was told to and said so."""
    return _last_word(store, pack_id, job, ".left.json").get("why")


def _last_word(store: Store, pack_id: str, job: str, suffix: str) -> dict[str, Any]:
    found = _read(_path(store, pack_id, suffix))
    return found if found.get("job") == job else {}


def _path(store: Store, pack_id: str, suffix: str) -> Path:
    assert PACK_ID.fullmatch(pack_id), f"{pack_id!r} is no pack's id"
    return jobs_folder(store) / f"{pack_id}{suffix}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class PackJob:
    """A pack to train, small enough to send: the manifest holds the rest.

    again: run_ids with a record that is to be replaced; every other run with a record keeps it. options: what else
    `train` is told. cpus: threads, where the engine does not say.
    """

    root: str
    pack_id: str
    prune: bool = False
    again: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    cpus: int | None = None

    def __call__(self) -> None:
        """Train the pack; submitit calls this once for each start of the job and each task of it."""
        import submitit

        env = submitit.JobEnvironment()
        store, me = Store(self.root), env.job_id
        begun = checkpoints.last_step(store.root, self.pack_id) or 0
        with Notice() as notice:
            try:
                if not self._is_mine(store, me):
                    say(f"{self.pack_id}: job {me} is not the one its launcher noted; it trains nothing")
                elif not job_end(store, self.pack_id, me):  # requeued after its end, it has nothing left to do
                    self.run(me, env)
            except SystemExit:
                if notice.heard is None:
                    raise
                if env.global_rank == 0:
                    self._leave(store, env, notice.why(me, on_slurm=env.name() == "slurm"), begun)
                else:  # where one task leaves Slurm may end all: the first has something to do yet
                    time.sleep(SECONDS_UNTIL_NOTED)
                raise

    def _leave(self, store: Store, env: Any, why: str, begun: int) -> None:
        """Say why the job leaves, and ask for its next start.

        It asks always after a preemption, and after a time-out if the job got further than before.
        """
        if job_entry(store, self.pack_id).get("job") == env.job_id:
            atomic_write(_path(store, self.pack_id, ".left.json"), dump_json({"job": env.job_id, "why": why}))
        further = (checkpoints.last_step(store.root, self.pack_id) or 0) > begun
        if why == PREEMPTED or (why == TIME_LIMIT and further):
            requeue(env)

    def run(self, me: str, env: Any = None) -> None:
        """Train, and leave word of how it ended. Errors of the runs are in their records.

        env: submitit's, for a job that may have several tasks. The first of them holds the pack meanwhile, and waits
        for whoever trains it: a start of this very job on a node that is cut off, a launcher without jobs.
        """
        self._threads()
        store, tasks = Store(self.root), env.num_tasks if env else 1
        first = tasks == 1 or env.global_rank == 0
        if not first:
            ended = self._train(store, me, env, tasks)
        else:
            if (holder := store.leases.holder(self.pack_id)) is not None:
                say(f"{self.pack_id}: waits for {holder}, which trains it")
            with store.leases.wait(self.pack_id) as lease:
                ended = self._train(store.under(lease), me, env, tasks)
        if (first or ended["kind"] != "done") and not job_end(store, self.pack_id, me):
            atomic_write(_path(store, self.pack_id, ".end.json"), dump_json({**ended, "job": me}))

    def _train(self, store: Store, me: str, env: Any, tasks: int) -> dict[str, Any]:
        """Train, and return what the word of the end says."""
        from lorabench.sweep.packs import pack_from_manifest
        from lorabench.sweep.ranks import train
        from lorabench.training import precision
        from lorabench.training.precision import check_nodes
        from lorabench.training.train import Listener, OutOfMemory, SlicesMix

        pack = pack_from_manifest(store, self.pack_id, prune=self.prune)
        keep = [i for i in pack.run_ids if i not in self.again and store.read(i) is not None]
        try:
            check_nodes(pack.runs[0].trainer.num_nodes, tasks)
            if len(keep) < len(pack.runs):
                with store.locked():
                    precision.note_device(store, pack.runs[0])
                if said := precision.check_device(
                    store, pack.runs, accept_drift=bool(self.options.get("accept_drift"))
                ):
                    say(said)
                node = self._node(store, me, env) if tasks > 1 else None
                train(pack, store, Listener(), keep=keep, node=node, **self.options)
        except SlicesMix as e:
            return {"kind": "mix", "layer": e.layer, "reason": e.reason}
        except OutOfMemory as e:
            return {"kind": "memory", "reason": str(e)}
        except ConfigError as e:  # what the job finds is not what the launcher checked, or not what was trained before
            return {"kind": "refused", "key": e.key, "value": str(e.value), "allowed": e.allowed}
        return {"kind": "done"}

    def _node(self, store: Store, me: str, env: Any) -> Any:
        """Return this task's place among those of its job. The first says in <pack>.meet.json where it waits."""
        from lorabench.sweep.ranks import Node, free_port
        from lorabench.training.distributed import meeting_address

        start = {"job": me, "start": os.environ.get("SLURM_RESTART_COUNT", "0")}
        path = _path(store, self.pack_id, ".meet.json")
        if env.global_rank == 0:
            here = meeting_address(env.hostname) if env.num_nodes > 1 else "127.0.0.1"
            atomic_write(path, dump_json({**start, "address": here, "port": free_port()}))
        while not (found := _read(path)).items() >= start.items():
            time.sleep(0.2)  # for as long as Slurm lets it
        return Node(env.global_rank, found["address"], found["port"], lambda: bool(job_end(store, self.pack_id, me)))

    def _is_mine(self, store: Store, me: str) -> bool:
        until = time.monotonic() + SECONDS_UNTIL_NOTED
        while (job := job_entry(store, self.pack_id).get("job")) != me and time.monotonic() < until:
            time.sleep(0.2)
        return job == me

    def _threads(self) -> None:
        """Use as many threads as CPUs were asked for. Where OMP_NUM_THREADS is set, it has said so already."""
        cpus = os.environ.get("SLURM_CPUS_PER_TASK") or self.cpus
        if cpus and "OMP_NUM_THREADS" not in os.environ:
            import torch

            torch.set_num_threads(int(cpus))
