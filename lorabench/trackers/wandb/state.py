"""Files in a sweep's directory that say which runs are not at W&B yet, and what agents of W&B Sweeps call runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from lorabench.runtime.files import atomic_write
from lorabench.runtime.leases import Holder
from lorabench.store.identifiers import RUN_ID
from lorabench.store.records import Record, Store

REPORT = "report"  # takes a run_id's place for the sweep's report
PENDING_DIR = ".wandb/begun"  # a file for each run that has begun and not arrived; it names the process that sends it
AGENTS_DIR = ".wandb/agents"  # a file for each run that an agent of W&B Sweeps started; it holds the agent's id of it
SENDING = "wandb"  # the lease of a mirror that goes on after its sweep's process; `lorabench.sync` waits for it


def mark_pending(store: Store, run_id: str) -> None:
    """Note that this process sends a run. Not synced to disk, since training waits for it."""
    path = store.root / PENDING_DIR / run_id
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(Holder.here())), encoding="utf-8")


def mark_arrived(store: Store, run_id: str) -> None:
    """Note that the server has all of a run."""
    (store.root / PENDING_DIR / run_id).unlink(missing_ok=True)


def is_pending(store: Store, run_id: str) -> bool:
    """Return whether a run has begun and not arrived."""
    return (store.root / PENDING_DIR / run_id).is_file()


def abandoned_runs(store: Store) -> Iterator[Record]:
    """Yield the records of pending runs whose process is gone.

    A process on another machine may still be there. Its runs are left to it, and to `lorabench.sync`.
    """
    for path in sorted((store.root / PENDING_DIR).glob("*")):
        try:
            gone = Holder(**json.loads(path.read_text(encoding="utf-8"))).gone
        except (OSError, ValueError, TypeError, RecursionError):
            continue
        if gone and RUN_ID.fullmatch(path.name) and (record := store.read(path.name)) is not None:
            yield record


@dataclass(frozen=True)
class Agent:
    """The agent of W&B Sweeps that started this process: its sweep, the id it gave the run, and where that is."""

    sweep: str
    run: str
    project: str | None = None
    entity: str | None = None

    @classmethod
    def from_environment(cls) -> Agent | None:
        """Return the agent of this process, or None where no agent started it."""
        sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
        if not (sweep and run):
            return None
        return cls(sweep, run, os.environ.get("WANDB_PROJECT"), os.environ.get("WANDB_ENTITY"))


def write_agent_id(store: Store, run_id: str, agent: Agent) -> None:
    """Note that a run has an agent's id at W&B."""
    atomic_write(store.root / AGENTS_DIR / run_id, agent.run)


def agent_id(store: Store, run_id: str) -> str | None:
    """Return the id that an agent gave a run, or None where there is none or it is not legal at W&B."""
    try:
        text = (store.root / AGENTS_DIR / run_id).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return text if re.fullmatch(r"[\w-]{1,64}", text, re.ASCII) else None
