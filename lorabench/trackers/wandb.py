"""Weights & Biases: one W&B run a slice, grouped by sweep. Offline unless there is a key to be online with."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lorabench.config import TrackerConfig, digest
from lorabench.records import Record, Store
from lorabench.trackers.contract import Row

if TYPE_CHECKING:
    import wandb

TIMEOUT = 20  # seconds to wait for a server when a run starts


def build(settings: TrackerConfig, *, sweep: str, sweep_dir: Path) -> WandbTracker:
    return WandbTracker(settings, sweep, Store(sweep_dir))


class WandbTracker:
    """W&B's files lie in `<run dir>/wandb`; `wandb sync` sends offline ones later."""

    def __init__(self, settings: TrackerConfig, sweep: str, store: Store) -> None:
        self.settings, self.sweep, self.store = settings, sweep, store
        self.mode = mode(settings.mode)
        self.runs: dict[str, wandb.Run] = {}

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        try:
            self.runs[run_id] = self._init(run_id, config, method, tags)
        except Exception as e:
            if self.mode != "online":
                raise
            self.mode = "offline"  # one wait for a server that is not there is enough
            raise ConnectionError(f"{type(e).__name__}: {e}; runs that start later are mirrored offline") from e

    def _init(self, run_id: str, config: Mapping[str, Any], method: str, tags: list[str]) -> wandb.Run:
        import wandb

        folder = self.store.run_dir(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            id=wandb_id(self.sweep, run_id), name=name(run_id, config), project=self.settings.project,
            entity=self.settings.entity, group=self.sweep, job_type=method, tags=tags, config=dict(config),
            dir=str(folder), mode=self.mode, reinit="create_new", settings=quiet(),
        )  # fmt: skip

    def log(self, run_id: str, row: Row) -> None:
        values = {key: value for key, value in row.items() if key != "step"}
        self.runs[run_id].log(values, step=int(row["step"]))

    def finish(self, run_id: str, record: Record) -> None:
        run = self.runs.pop(run_id)
        found = {"status": record.status, "role": record.role, "run_id": record.run_id, "error": record.error}
        resources = {f"resources/{key}": value for key, value in record.resources.items()}
        run.log({}, commit=True)  # the last row would else be written after the summary, and over it
        run.summary.update(
            {key: value for key, value in (found | record.metrics | resources).items() if value is not None}
        )
        run.finish(exit_code=1 if record.status == "failed" else 0)

    def close(self) -> None:
        """Runs still open were stopped: they end as failed, as far as W&B is told."""
        while self.runs:
            self.runs.popitem()[1].finish(exit_code=1)


def quiet() -> wandb.Settings:
    """Nothing on the terminal, and nothing sent but what the record holds: no console, source, machine or its load."""
    import wandb

    return wandb.Settings(
        console="off", silent=True, disable_code=True, disable_git=True, save_code=False, x_disable_stats=True,
        x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False, init_timeout=TIMEOUT,
    )  # fmt: skip


def wandb_id(sweep: str, run_id: str) -> str:
    """Stable over restarts, unique over sweeps: W&B allows 64 characters and no punctuation of paths."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", sweep)[:40]
    return f"{plain}-{run_id}" if plain == sweep else f"{plain}-{digest(sweep)[:8]}-{run_id}"


def name(run_id: str, config: Mapping[str, Any]) -> str:
    """What W&B's run list shows: `lora r=8 lr=0.001 seed=0`."""
    method, optimizer = config.get("method", {}), config.get("optimizer", {})
    parts = {"r": method.get("r"), "alpha": method.get("alpha"), "lr": optimizer.get("lr"), "seed": config.get("seed")}
    return " ".join([str(method.get("name", run_id)), *(f"{k}={v}" for k, v in parts.items() if v is not None)])


def mode(asked: str) -> Any:
    """W&B's mode: as asked; for `auto` what WANDB_MODE says, else online when there is a key, else offline."""
    if asked != "auto":
        return asked
    return os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    """A key in the environment, or in the netrc file where `wandb login` puts it: W&B would ask on the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    server = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return urlsplit(server).hostname in netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return False
