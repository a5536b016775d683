"""Several launchers on one sweep: who trains which pack, and which runs another launcher has ended."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from lorabench.config.runs import Pack
from lorabench.store.records import Store
from lorabench.sweep.progress import ProgressDisplay


class FinishedRuns:
    """Which runs need no training: those that had ended when this launcher looked first, and what has ended since.

    stamps: `Store.stamp` of each run before that first look. A failed run that is to be trained again has a stamp, too.
    """

    def __init__(self, store: Store, finished: Collection[str], stamps: Mapping[str, Any]) -> None:
        self.store, self.finished, self.stamps = store, frozenset(finished), stamps

    def of(self, pack: Pack) -> set[str]:
        new = {i for i in set(pack.run_ids) - self.finished if self.store.stamp(i) != self.stamps.get(i)}
        return {i for i in pack.run_ids if i in self.finished or (i in new and self.store.read(i))}


def waiting_lease(pack: Pack) -> str:
    """The lease of a launcher that waits for a pack's job. The job itself holds the pack's, as everybody who trains it."""
    return f"{pack.id}.job"


def wait_for_packs(store: Store, held: list[Pack], progress: ProgressDisplay, *, jobs: bool = False) -> list[Pack]:
    """Wait until another launcher, or a job of one, has let go of some of the packs it holds, or died; they are taken off the
    list. jobs: whether packs are jobs here."""
    pause = 0.0
    while held:
        holders = {pack.id: store.leases.holder(waiting_lease(pack) if jobs else pack.id) for pack in held}
        free = [pack for pack in held if holders[pack.id] is None]
        if free:
            held[:] = [pack for pack in held if pack not in free]
            return free
        if not pause:
            named = ", ".join(f"{i} ({holder})" for i, holder in holders.items())
            progress.say(f"waiting for packs that other launchers train: {named}")
        pause = min(2.0, 0.1 + 1.5 * pause)
        time.sleep(pause)
    return []
