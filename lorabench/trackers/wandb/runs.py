"""One record as one W&B run: its id, name, history and summary, what the server lacks of it, and how that is sent."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorabench.config.runs import digest
from lorabench.store.records import Record, Store
from lorabench.trackers.wandb.server import RemoteRun, Server, ServerUnavailable
from lorabench.trackers.wandb.state import Agent, agent_id

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT, FINISH_TIMEOUT = 60.0, 120.0  # seconds W&B's client may take to open a run, and to send the last of it
ARRIVAL_PAUSES = (0.0, 0.3, 1.0, 2.0)  # seconds between looks at whether the server has counted what was sent
QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}  # read when W&B's client is imported
Steps = list[tuple[int, dict[str, Any]]]  # (step, what was measured at it), by step


def wandb_id(sweep: str, run_id: str) -> str:
    """Return a run's id at W&B: stable over restarts, unique over sweeps, at most 64 characters legal there."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", sweep)[:40]
    return f"{plain}-{run_id}" if plain == sweep else f"{plain}-{digest(sweep)[:8]}-{run_id}"


def display_name(run_id: str, config: Mapping[str, Any]) -> str:
    """Return what W&B's run list shows, such as `lora r=8 lr=0.001 seed=0`."""
    method, optimizer = config.get("method", {}), config.get("optimizer", {})
    parts = {"r": method.get("r"), "alpha": method.get("alpha"), "lr": optimizer.get("lr"), "seed": config.get("seed")}
    return " ".join([str(method.get("name", run_id)), *(f"{k}={v}" for k, v in parts.items() if v is not None)])


def method_name(config: Mapping[str, Any]) -> str:
    """Return the name of the method of a record's config."""
    return str((config.get("method") or {}).get("name", "run"))


def run_tags(config: Mapping[str, Any]) -> list[str]:
    """Return the tags a sweep gives a run: model, task, role."""
    names = [(config.get(key) or {}).get("name") for key in ("model", "task")]
    return [str(x) for x in (*names, config.get("role")) if x]


def history_steps(rows: Iterable[Mapping[str, Any]]) -> Steps:
    """Merge history rows into one row a step, as W&B keeps them. Values that are not finite are left out."""
    out: dict[int, dict[str, Any]] = {}
    for row in rows:
        values = {k: v for k, v in row.items() if k != "step" and _is_plain(v)}
        if values:
            out.setdefault(int(row["step"]), {}).update(values)
    return sorted(out.items())


def summary(record: Record, verdict: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what W&B's run table shows: status, metrics, resources, and the verdict on the run's cell."""
    identity = {"status": record.status, "role": record.role, "run_id": record.run_id, "error": record.error}
    resources = {f"resources/{key}": value for key, value in record.resources.items()}
    values = identity | record.metrics | resources | dict(verdict or {})
    return {k: v for k, v in values.items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def missing_values(want: Mapping[str, Any], has: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `want` that `has` lacks, and None for those that an earlier failure left in it."""
    stale = {k: None for k in ("error", "pruned_step") if k in has and k not in want}
    return {k: v for k, v in want.items() if k not in has or has[k] != v} | stale


@dataclass(frozen=True)
class Target:
    """Where the runs of a sweep go. Only mode `online` has a server; offline, W&B's files lie in `<run dir>/wandb`."""

    store: Store
    sweep: str
    project: str
    entity: str | None
    server: Server | None
    mode: Literal["online", "offline", "disabled"] = "online"
    artifacts: bool = False
    agent: Agent | None = None

    def wandb_id(self, run_id: str) -> str:
        """Return a run's id at W&B: the one an agent of W&B Sweeps gave it, else one made of its sweep and its own."""
        return agent_id(self.store, run_id) or wandb_id(self.sweep, run_id)

    def open(
        self, run_id: str, config: Mapping[str, Any], *, method: str, tags: Sequence[str], back_to: int | None = None
    ) -> wandb.Run:
        """Open a run to log to, and continue it where the server has it already.

        back_to: the server first drops what it has after this step. Offline, an earlier folder of the run is replaced.
        """
        import wandb

        folder = self.store.run_dir(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        its_id, settings = self.wandb_id(run_id), client_settings(self.server)
        if self.agent and its_id == self.agent.run:
            settings.sweep_id = self.agent.sweep
        if self.mode == "offline":
            for old in folder.glob(f"wandb/offline-run-*-{its_id}"):
                shutil.rmtree(old, ignore_errors=True)  # one folder a run, complete in itself
        how: dict[str, Any] = {}
        if self.server is not None:
            how = {"resume": "allow"} if back_to is None else {"resume_from": f"{its_id}?_step={back_to}"}
        return wandb.init(
            id=its_id,
            name=display_name(run_id, config),
            project=self.project,
            entity=self.entity,
            group=self.sweep,
            job_type=method,
            tags=[t[:64] for t in tags if t],
            config=dict(config),
            dir=str(folder.resolve()),
            mode=self.mode,
            reinit="create_new",
            settings=settings,
            **how,
        )

    def end(self, run: wandb.Run, record: Record, verdict: Mapping[str, Any] | None = None) -> None:
        """Write the summary, log the adapter if asked for, and end the run. Online, something may still be unsent."""
        run.summary.update(self.summary(record, verdict))
        if artifact_name := self._artifact_name(record):
            import wandb

            adapter = wandb.Artifact(artifact_name, type="adapter")
            adapter.add_dir(str(self.store.run_dir(record.run_id) / "adapter"))
            run.log_artifact(adapter)
        run.finish(exit_code=1 if record.status == "failed" else 0)

    def summary(self, record: Record, verdict: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the run's summary, with the name of the adapter's artifact where there is one."""
        artifact_name = self._artifact_name(record)
        return summary(record, verdict) | ({"adapter": artifact_name} if artifact_name else {})

    def _artifact_name(self, record: Record) -> str | None:
        has_adapter = self.artifacts and (self.store.run_dir(record.run_id) / "adapter").is_dir()
        return f"adapter-{self.wandb_id(record.run_id)}" if has_adapter else None


def log(run: wandb.Run, rows: Steps) -> None:
    """Log rows to an open run, one W&B row a step."""
    for step, values in rows:
        run.log(values, step=step, commit=True)


@dataclass(frozen=True)
class Missing:
    """What the server lacks of a run that has ended.

    remote: the run as the server has it. rows: history to be sent. values: of the summary.
    back_to: the step after which the server's history is another than the records'; None where it is the same.
    is_over: the server knows that the run has ended.
    """

    record: Record
    verdict: Mapping[str, Any] | None
    remote: RemoteRun | None
    rows: Steps
    back_to: int | None
    values: dict[str, Any]
    is_over: bool

    @property
    def is_history_cut(self) -> bool:
        """Whether a run that the server knows lacks history rows there, or has others."""
        return self.remote is not None and (bool(self.rows) or self.back_to is not None)

    @property
    def is_nothing(self) -> bool:
        return self.is_over and not (self.is_history_cut or self.values)


def missing(target: Target, record: Record, verdict: Mapping[str, Any] | None = None) -> Missing:
    """Ask the server what it lacks of a run. Raises `ServerUnavailable`."""
    assert target.server is not None
    remote, rows = target.server.run(target.wandb_id(record.run_id)), history_steps(target.store.history(record.run_id))
    want = target.summary(record, verdict)
    if remote is None:
        return Missing(record, verdict, None, rows, None, want, is_over=False)
    back_to = last_common_step(target.server, remote, rows)
    last = remote.last_step if back_to is None else back_to
    is_over = remote.is_over(failed=record.status == "failed")
    unsent = [(step, values) for step, values in rows if step > last]
    return Missing(record, verdict, remote, unsent, back_to, missing_values(want, remote.summary), is_over)


def last_common_step(server: Server, remote: RemoteRun, rows: Steps) -> int | None:
    """Return the step up to which the server's history is that of the records, or None where all of it is."""
    ours = [step for step, _ in rows if step <= remote.last_step]
    if len(ours) == remote.rows and (not ours or ours[-1] == remote.last_step):
        return None
    common = -1
    for our_step, their_step in zip(ours, server.steps(remote)):
        if our_step != their_step:
            break
        common = our_step
    return common


def send(target: Target, lack: Missing) -> None:
    """Send what the server lacks of a run that has ended, and check that it arrived.

    A run that is all there and not over there, since its sender was killed, is opened and ended.
    Raises `ServerUnavailable`, also where the server has not all of it afterwards. Raises `ValueError` where the
    server's history begins otherwise than the records'.
    """
    server, record, remote = target.server, lack.record, lack.remote
    assert server is not None
    if lack.is_nothing:
        return
    if remote is not None and lack.is_over and not lack.is_history_cut and "adapter" not in lack.values:
        server.write_summary(remote, lack.values)
        return
    its_id = target.wandb_id(record.run_id)
    if lack.back_to == -1:
        raise ValueError(
            f"{its_id}: the history at the server begins otherwise than the records'; delete that run there"
        )
    if remote is not None:
        last = remote.last_step if lack.back_to is None else lack.back_to
        if remote.summary.get("_step", -1) > last:  # W&B's client counts on from this value
            server.write_summary(remote, {"_step": last if last >= 0 else None})
    config = record.config
    run = target.open(record.run_id, config, method=method_name(config), tags=run_tags(config), back_to=lack.back_to)
    log(run, lack.rows)
    target.end(run, record, lack.verdict)
    check_arrived(target, record, lack.verdict)


def check_arrived(target: Target, record: Record, verdict: Mapping[str, Any] | None = None) -> None:
    """Check that the server has the whole history of a run, and write the values that its summary lacks.

    The server may take a moment to count. Raises `ServerUnavailable` where it has not all of it.
    """
    assert target.server is not None
    for pause in ARRIVAL_PAUSES:
        time.sleep(pause)
        lack = missing(target, record, verdict)
        remote = lack.remote
        if remote and not lack.is_history_cut and "status" in remote.summary:  # written as the run ended
            if lack.values:
                target.server.write_summary(remote, lack.values)
            return
    rows = len(history_steps(target.store.history(record.run_id)))
    its_id = target.wandb_id(record.run_id)
    raise ServerUnavailable(
        f"{target.server.url} has {remote.rows if remote else 0} of {rows} history rows of {its_id}"
    )


def client_settings(server: Server | None) -> wandb.Settings:
    """Return settings under which W&B's client prints nothing and sends nothing but what the record holds.

    Neither the console nor source code, git, the machine or its load is sent.
    """
    import wandb

    online: dict[str, Any] = {} if server is None else {"base_url": server.url, "api_key": server.key}
    return wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        x_file_stream_transmit_interval=2.0,
        x_file_stream_retry_wait_max_seconds=15.0,
        **online,
    )


def client_environment() -> dict[str, str]:
    """Return the environment of a process with W&B's client: quiet, with a service process of its own.

    It names no agent: W&B's client would take the agent's project and id for every run.
    """
    return {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_SWEEP_ID", "WANDB_RUN_ID")} | QUIET
