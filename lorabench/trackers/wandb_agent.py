"""Runs that an agent of W&B Sweeps starts: what it calls them at W&B is their id there, now and when they are synced later."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lorabench.durable import atomic_write
from lorabench.records import Store

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
