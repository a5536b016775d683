"""A record as a W&B run: its id, name, history by step and summary, and how it is opened, filled and ended."""

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
from lorabench.trackers.wandb.api import Away, Mirrored, Server
from lorabench.trackers.wandb.state import Agent, agents_name

if TYPE_CHECKING:
    import wandb

INIT, FINISH = 60.0, 120.0  # seconds that W&B's client may take to open a run, and to send the last of it
QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}  # read when W&B's client is imported
Steps = list[tuple[int, dict[str, Any]]]  # (step, what was measured at it), by step


def wandb_id(sweep: str, run_id: str) -> str:
    """Stable over restarts, unique over sweeps: W&B allows 64 characters and no punctuation of paths."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", sweep)[:40]
    return f"{plain}-{run_id}" if plain == sweep else f"{plain}-{digest(sweep)[:8]}-{run_id}"


def name(run_id: str, config: Mapping[str, Any]) -> str:
    """What W&B's run list shows: `lora r=8 lr=0.001 seed=0`."""
    method, optimizer = config.get("method", {}), config.get("optimizer", {})
    parts = {"r": method.get("r"), "alpha": method.get("alpha"), "lr": optimizer.get("lr"), "seed": config.get("seed")}
    return " ".join([str(method.get("name", run_id)), *(f"{k}={v}" for k, v in parts.items() if v is not None)])


def steps(rows: Iterable[Mapping[str, Any]]) -> Steps:
    """History rows as W&B keeps them: one row a step, of finite values; a step without any is left out."""
    out: dict[int, dict[str, Any]] = {}
    for row in rows:
        values = {k: v for k, v in row.items() if k != "step" and _plain(v)}
        if values:
            out.setdefault(int(row["step"]), {}).update(values)
    return sorted(out.items())


def summary(record: Record, verdict: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What W&B's run table shows: status, metrics (test ones where there are any), resources and the cell's verdict."""
    found = {"status": record.status, "role": record.role, "run_id": record.run_id, "error": record.error}
    resources = {f"resources/{key}": value for key, value in record.resources.items()}
    return {k: v for k, v in (found | record.metrics | resources | dict(verdict or {})).items() if _plain(v)}


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def lacking(want: Mapping[str, Any], has: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `want` that `has` does not have; None for what a run that failed once left in it."""
    stale = {k: None for k in ("error", "pruned_step") if k in has and k not in want}
    return {k: v for k, v in want.items() if k not in has or has[k] != v} | stale


@dataclass(frozen=True)
class Target:
    """Where runs of a sweep go. mode: W&B's; only `online` has a server, offline its files lie in `<run dir>/wandb`."""

    store: Store
    sweep: str
    project: str
    entity: str | None
    server: Server | None
    mode: Literal["online", "offline", "disabled"] = "online"
    artifacts: bool = False
    agent: Agent | None = None

    def known(self, run_id: str) -> str:
        """A run's id at W&B: what an agent of W&B Sweeps has called it, else made of its sweep and its own."""
        return agents_name(self.store, run_id) or wandb_id(self.sweep, run_id)

    def open(
        self, run_id: str, config: Mapping[str, Any], *, method: str, tags: Sequence[str], back_to: int | None = None
    ) -> wandb.Run:
        """A run to log to, continued where the server has it already. back_to: drop what it has after this step first."""
        import wandb

        folder = self.store.run_dir(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        known, settings = self.known(run_id), quiet(self.server)
        if self.agent and known == self.agent.run:
            settings.sweep_id = self.agent.sweep
        if self.mode == "offline":
            for old in folder.glob(f"wandb/offline-run-*-{known}"):
                shutil.rmtree(old, ignore_errors=True)  # one folder a run, complete in itself
        how: dict[str, Any] = {}
        if self.server is not None:
            how = {"resume": "allow"} if back_to is None else {"resume_from": f"{known}?_step={back_to}"}
        return wandb.init(
            id=known, name=name(run_id, config), project=self.project, entity=self.entity, group=self.sweep,
            job_type=method, tags=[t[:64] for t in tags if t], config=dict(config), dir=str(folder.resolve()),
            mode=self.mode, reinit="create_new", settings=settings, **how,
        )  # fmt: skip

    def end(self, run: wandb.Run, record: Record, verdict: Mapping[str, Any] | None = None) -> None:
        """The summary, the adapter if asked for, and the end. Online it may return with something still unsent."""
        run.summary.update(self.summary(record, verdict))
        if called := self._adapter(record):
            import wandb

            adapter = wandb.Artifact(called, type="adapter")
            adapter.add_dir(str(self.store.run_dir(record.run_id) / "adapter"))
            run.log_artifact(adapter)
        run.finish(exit_code=1 if record.status == "failed" else 0)

    def summary(self, record: Record, verdict: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`summary`, with the name of the adapter's artifact where there is one."""
        called = self._adapter(record)
        return summary(record, verdict) | ({"adapter": called} if called else {})

    def _adapter(self, record: Record) -> str | None:
        there = self.artifacts and (self.store.run_dir(record.run_id) / "adapter").is_dir()
        return f"adapter-{self.known(record.run_id)}" if there else None


def log(run: wandb.Run, new: Steps) -> None:
    for step, values in new:
        run.log(values, step=step, commit=True)


def gap(server: Server, known: str, has: Mirrored, want: Steps) -> int | None:
    """The step up to which the server's history is that of the records, where the two part; None where they do not."""
    have = [step for step, _ in want if step <= has.last_step]
    if len(have) == has.rows and (not have or have[-1] == has.last_step):
        return None
    same = -1
    for ours, theirs in zip(have, server.steps(known, has.last_step)):
        if ours != theirs:
            break
        same = ours
    return same


def bring(target: Target, record: Record, verdict: Mapping[str, Any] | None = None) -> int:
    """Send what the server lacks of a run that has ended, and look whether it arrived; returns the history rows sent. A run that
    is all there and not over there (its sender was killed) is opened and ended.

    Raises `Away` without a server, and where it has not all of it afterwards.
    """
    server = target.server
    assert server is not None
    known, want = target.known(record.run_id), steps(target.store.history(record.run_id))
    has = server.run(known)
    if has is not None and complete(has, want) and has.ended(failed=record.status == "failed"):
        values = lacking(target.summary(record, verdict), has.summary)
        if "adapter" not in values:
            if values:
                server.write_summary(has, values)
            return 0
    back_to = None if has is None else gap(server, known, has, want)
    if back_to == -1:
        raise ValueError(
            f"{known}: the history at the server begins otherwise than the records'; delete that run there"
        )
    last = -1 if has is None else has.last_step if back_to is None else back_to
    if has is not None and has.summary.get("_step", -1) > last:
        server.write_summary(has, {"_step": last if last >= 0 else None})  # from here W&B's client counts on
    run = target.open(
        record.run_id, record.config, method=method(record.config), tags=tags(record.config), back_to=back_to
    )
    new = [(step, values) for step, values in want if step > last]
    log(run, new)
    target.end(run, record, verdict)
    check(server, known, want, target.summary(record, verdict))
    return len(new)


def complete(has: Mirrored, want: Steps) -> bool:
    """Whether a history is there row for row, by number and end; `summary` tells that the run was ended."""
    return has.rows == len(want) and has.last_step == (want[-1][0] if want else -1) and "status" in has.summary


def check(server: Server, known: str, want: Steps, values: Mapping[str, Any]) -> None:
    """Raises `Away` unless the server has the history that was sent; it may take a moment to count. Mends the summary."""
    for pause in (0.0, 0.3, 1.0, 2.0):
        time.sleep(pause)
        has = server.run(known)
        if has is not None and complete(has, want):
            if new := lacking(values, has.summary):
                server.write_summary(has, new)
            return
    raise Away(f"{server.url} has {has.rows if has else 0} of {len(want)} history rows of {known}")


def method(config: Mapping[str, Any]) -> str:
    return str((config.get("method") or {}).get("name", "run"))


def tags(config: Mapping[str, Any]) -> list[str]:
    """As a sweep gives them: model, task, role."""
    named = [(config.get(key) or {}).get("name") for key in ("model", "task")]
    return [str(x) for x in (*named, config.get("role")) if x]


def quiet(server: Server | None) -> wandb.Settings:
    """Nothing on the terminal, and nothing sent but what the record holds: no console, source, machine or its load."""
    import wandb

    online: dict[str, Any] = {} if server is None else {"base_url": server.url, "api_key": server.key}
    return wandb.Settings(
        console="off", silent=True, disable_code=True, disable_git=True, save_code=False, x_disable_stats=True,
        x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False, init_timeout=INIT,
        finish_timeout=FINISH, x_file_stream_transmit_interval=2.0, x_file_stream_retry_wait_max_seconds=15.0, **online,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """For a process with W&B's client: nothing on the terminal, no error reports, a service process of its own. It is not told of
    an agent: it would take the agent's project and id for every run, whatever it is asked for."""
    return {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_SWEEP_ID", "WANDB_RUN_ID")} | QUIET
