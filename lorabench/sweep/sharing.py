"""Several launchers on one sweep: who trains which pack, and which runs another launcher has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lorabench.config.runs import Pack
from lorabench.store.records import Record, Store
from lorabench.sweep.progress import ProgressDisplay


class FinishedRuns:
    """Which runs need no training: those that had ended when this launcher looked first, and what has ended since.

    finished: their records at that first look. stamps: `Store.stamp` of each run before it. A failed run that is to be
    trained again has a stamp, too.
    """

    def __init__(self, store: Store, finished: Mapping[str, Record], stamps: Mapping[str, Any]) -> None:
        self.store, self.finished, self.stamps = store, finished, stamps

    def of(self, pack: Pack) -> set[str]:
        """Return the run_ids of a pack that need no training now."""
        new = {i for i in set(pack.run_ids) - self.finished.keys() if self.store.stamp(i) != self.stamps.get(i)}
        return {i for i in pack.run_ids if i in self.finished or (i in new and self.store.read(i))}


def waiting_lease(pack: Pack) -> str:
    """Return the lease of a launcher that waits for a pack's job. The job itself holds the pack's own lease."""
    return f"{pack.id}.job"


def wait_for_packs(store: Store, held: list[Pack], progress: ProgressDisplay, *, jobs: bool = False) -> list[Pack]:
    """Wait until another launcher, or a job of one, has let go of some of the packs or died. Return them.

    held: the packs waited for; those that are returned are taken off the list. jobs: whether packs are jobs here.
    """
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
