"""Which runs a launcher has begun at W&B and has not seen arrive: a file a run, so that one that is killed leaves word of them.

The next launcher of the sweep sends those that have ended meanwhile, from their records; of others it hears when they train.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lorabench.runtime.files import atomic_write
from lorabench.runtime.leases import Holder
from lorabench.store.identifiers import RUN_ID
from lorabench.store.records import Record, Store

BEGUN = ".wandb/begun"  # in the sweep's directory


SENDING = "wandb"  # the lease of a mirror's process that goes on after its sweep's; `lorabench.sync` waits for it


def begun(store: Store, run_id: str) -> None:
    """By this process. Not synced to disk: it is heard where training waits."""
    path = _path(store, run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(Holder.here())), encoding="utf-8")


def arrived(store: Store, run_id: str) -> None:
    _path(store, run_id).unlink(missing_ok=True)


def left_behind(store: Store) -> Iterator[Record]:
    """Records of runs that launchers which are no more have begun and not seen arrive. Of one that may still be there, on
    another machine, nothing is taken over: `lorabench.sync` sends what it leaves."""
    for path in sorted((store.root / BEGUN).glob("*")):
        try:
            gone = Holder(**json.loads(path.read_text(encoding="utf-8"))).gone
        except (OSError, ValueError, TypeError):
            continue
        if gone and RUN_ID.fullmatch(path.name) and (record := store.read(path.name)) is not None:
            yield record


def _path(store: Store, run_id: str) -> Path:
    return store.root / BEGUN / run_id


AGENTS = ".wandb/agents"  # in the sweep's directory: what agents call its runs, a file a run


@dataclass(frozen=True)
class Agent:
    """The agent that started this process for a run: its sweep at W&B, what it calls the run, and where that is."""

    sweep: str
    run: str
    project: str | None = None
    entity: str | None = None

    @classmethod
    def here(cls) -> Agent | None:
        sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
        if not (sweep and run):
            return None
        return cls(sweep, run, os.environ.get("WANDB_PROJECT"), os.environ.get("WANDB_ENTITY"))


def note_agent(store: Store, run_id: str, agent: Agent) -> None:
    """From here on the run is the agent's at W&B."""
    atomic_write(store.root / AGENTS / run_id, agent.run)


def agents_name(store: Store, run_id: str) -> str | None:
    try:
        found = (store.root / AGENTS / run_id).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return found if re.fullmatch(r"[\w-]{1,64}", found, re.ASCII) else None
