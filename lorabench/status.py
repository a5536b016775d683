"""`python -m lorabench.status <sweep dir>`: where a sweep is, from its files alone, while it runs or afterwards."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.clusters.job import unended_jobs
from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.runtime.leases import Held
from lorabench.runtime.terminal import plain, say
from lorabench.store import checkpoints
from lorabench.store.records import Record, Store

# Who cannot be seen from here (on another machine, a cluster's job) counts as gone when silent for longer.
GONE_SECONDS = 600


@dataclass(frozen=True)
class Begun:
    """A run without a record whose pack is held, or that has a history or a checkpoint.

    step, steps: the last row's step, or the checkpoint's where that is later, of how many; None where nothing is
    written yet. age: seconds since something was written. running: whether who trains it is there. by: who that is or
    was. kept: the step of its pack's last checkpoint. job: whether a cluster's job trains it.
    """

    run_id: str
    step: int | None
    steps: int | None
    age: float
    running: bool
    by: str = ""
    kept: int | None = None
    pack: str = ""
    job: bool = False


@dataclass(frozen=True)
class PackState:
    """A pack's newest checkpoint, its lease and its job on a cluster, as far as there are any."""

    pack: str = ""
    checkpoint: Path | None = None
    held: Held | None = None
    job: str | None = None  # "slurm job 17"

    @property
    def alive(self) -> bool:
        """Whether the lease's holder is there: seen, or heard of not long ago."""
        held = self.held
        return held is not None and not held.dead and (held.who.gone is False or _age(held.heard) < GONE_SECONDS)

    @property
    def by(self) -> str:
        if self.job or not self.held:
            return self.job or ""
        return f"{self.held.who}" + (f" for {_span(_age(self.held.since))}" if self.alive else "")


@dataclass(frozen=True)
class Status:
    """What has become of the runs that a sweep's manifest lists, each counted once."""

    name: str
    listed: int
    records: tuple[Record, ...]
    begun: tuple[Begun, ...]
    confirms: int  # confirmation runs among those listed

    @property
    def counts(self) -> dict[str, int]:
        """Runs by state, in the order of a table; every listed run is in exactly one."""
        ended = Counter(r.status for r in self.records)
        running = sum(b.running for b in self.begun)
        found = {name: ended[name] for name in ("completed", "diverged", "pruned", "failed")}
        found |= {"running": running, "cut": len(self.begun) - running}
        return found | {"waiting": self.listed - len(self.records) - len(self.begun)}

    @property
    def failed(self) -> list[Record]:
        return [r for r in self.records if r.status == "failed"]

    @property
    def left(self) -> int:
        return self.listed - len(self.records)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the listed runs have ended, at the mean pace of those that have; None before the first has.

        As many packs are counted at once as train now. A run's seconds are its share of its pack's, and what a running
        one has done already counts.
        """
        spent = [s for r in self.records if (s := _share(r)) is not None]
        if not spent or not self.left:
            return 0.0 if not self.left else None
        done = sum((b.step or 0) / b.steps for b in self.begun if b.steps and b.running)
        at_once = len({b.pack for b in self.begun if b.running})
        return sum(spent) / len(spent) * max(0.0, self.left - done) / max(1, at_once)


def read(sweep_dir: str | Path, store: Store | None = None) -> Status:
    """Return what a sweep's files and leases say of its runs.

    store: the directory's own, for a caller who looks again and again. Raises `ConfigError` for a directory that is no
    sweep's.
    """
    root = Path(sweep_dir)
    store = store or Store(root)
    manifest = store.manifest() if root.is_dir() else {}
    if not manifest and root.is_dir() and (adopted := store.records()):  # nothing was planned, all has ended
        manifest = {"runs": {r.run_id: {"role": r.role} for r in adopted}, "packs": []}
    if not manifest:
        allowed = "a directory with the sweep.json that `python -m lorabench` writes, or with adopted runs"
        raise ConfigError("sweep dir", str(sweep_dir), allowed)
    listed = manifest["runs"]
    found = [r for i in sorted(listed) if (r := store.read(i)) is not None]
    states = _pack_states(store, manifest, {r.run_id for r in found if r.status not in ("failed", "pruned")})
    records = tuple(r for r in found if not _again(store, r.run_id, states.get(r.run_id)))
    left = sorted(states.keys() - {r.run_id for r in records})
    begun = tuple(b for i in left if (b := _begun_run(store, i, listed.get(i, {}), states[i])) is not None)
    name = str(manifest.get("name") or root.resolve().name)
    return Status(name, len(listed), records, begun, sum(run["role"] == "confirm" for run in listed.values()))


def _pack_states(store: Store, manifest: dict[str, Any], ended: set[str]) -> dict[str, PackState]:
    """Return what is known of the packs of runs that are not among `ended`, by run_id."""
    found = {i: PackState() for i in manifest["runs"] if i not in ended}
    working = {i: _plain(f"{e.get('engine')} job {e['job']}") for i, e in unended_jobs(store).items()}
    for pack in manifest["packs"]:
        left = [i for i in pack["runs"] if i in found]
        if left and not pack.get("replaced"):
            newest = checkpoints.list_checkpoints(checkpoints.pack_folder(store.root, pack["id"]))[:1]
            held, job = store.leases.look(pack["id"]), working.get(pack["id"])
            state = PackState(pack["id"], newest[0] if newest else None, held, job)
            found |= dict.fromkeys(left, state)
    return found


def _again(store: Store, run_id: str, state: PackState | None) -> bool:
    """Whether a run that failed or was pruned is training again: its pack is held, and its history newer than its
    record."""
    history, record = (_written_at(store.run_dir(run_id) / name) for name in ("history.jsonl", "run.json"))
    return state is not None and state.alive and history is not None and record is not None and history > record


def _begun_run(store: Store, run_id: str, entry: dict[str, Any], state: PackState) -> Begun | None:
    history, checkpoint = store.run_dir(run_id) / "history.jsonl", state.checkpoint
    steps = (entry.get("config") or {}).get("trainer", {}).get("max_steps")
    written = [m for p in (history, checkpoint) if p and (m := _written_at(p)) is not None]
    if not written:
        return Begun(run_id, None, steps, 0.0, True, state.by, None, state.pack) if state.alive else None
    age = _age(max(written))
    kept = checkpoints.step_of(checkpoint) if checkpoint else None
    step = max((int(row.get("step") or 0) for row in store.history_rows(run_id)), default=0)
    running = state.alive or (state.job is not None and age < GONE_SECONDS)
    return Begun(run_id, max(step, kept or 0), steps, age, running, state.by, kept, state.pack, bool(state.job))


def _plain(text: str) -> str:
    """Return another program's text without control characters, 64 characters at most."""
    return "".join(c for c in text[:64] if c.isprintable())


def _age(moment: float) -> float:
    """Seconds since a moment. Two clocks may differ, so it is never below 0."""
    return max(0.0, time.time() - moment)


def _written_at(path: Path) -> float | None:
    """When a file was last written; None where it is not there, or not any more."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _share(record: Record) -> float | None:
    seconds, size = record.resources.get("pack_seconds"), record.resources.get("pack_size")
    return seconds / size if seconds and size else None


def lines(s: Status) -> list[str]:
    """Return a status in words, line by line."""
    counts = ", ".join(f"{n} {name}" for name, n in s.counts.items() if n) or "nothing listed"
    phases = f" ({s.listed - s.confirms} tune, {s.confirms} confirm)" if s.confirms else ""
    out = [f"{s.name}: {len(s.records)} of {s.listed} runs have ended{phases}: {counts}"]
    if s.left:
        eta = s.seconds_left
        out.append(
            "time left: not known before the first run has ended" if eta is None else f"time left: about {_span(eta)}"
        )
        out.append("" if s.confirms else "confirmation runs, if any, are listed when tuning has ended and come on top")
    out += _unfinished_lines(s.begun)
    out += [f"  {r.run_id} failed: {(r.error or 'no reason recorded').splitlines()[0]}" for r in s.failed]
    if s.failed:
        out.append("sweep.retry_failed=true, added to the sweep's own command, trains the failed ones again")
    return [line for line in out if line]


def _unfinished_lines(begun: Sequence[Begun]) -> list[str]:
    """Return a line for all runs of one state and step: the slices of a pack go together."""
    groups: dict[str, list[str]] = {}
    for b in begun:
        at = "being prepared" if b.step is None else f"step {b.step}" + (f" of {b.steps}" if b.steps else "")
        again = "the sweep's own command " + ("trains it again" if b.kept is None else f"goes on from step {b.kept}")
        gone = f" ({b.by} is gone{', or waits in its queue' if b.job else ''})" if b.by else ""
        by = f", by {b.by}" if b.by else ""
        state = f"running, {at}{by}" if b.running else f"cut at {at}, {_span(b.age)} ago{gone}: {again}"
        groups.setdefault(state, []).append(b.run_id)
    return [
        f"  {', '.join(ids[:3])}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''} {state}"
        for state, ids in groups.items()
    ]


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.status",
        description="Where a sweep is: ended, running, cut, waiting, failed and why, time left.",
    )
    p.add_argument("sweep", type=Path, help="a sweep's directory, such as sweeps/rank_sweep")
    p.add_argument(
        "--live", action="store_true", help="look again every two seconds until nothing runs or waits; Ctrl-C ends it"
    )
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where runs failed; 2 for bad input."""
    args = parser().parse_args(argv)
    found = _watch(args.sweep) if args.live else read(args.sweep)
    if not args.live:
        say("\n".join(lines(found)))
    return 1 if found.failed else 0


def _watch(sweep_dir: Path) -> Status:
    from rich.live import Live

    store = Store(sweep_dir)
    found = read(sweep_dir, store)
    with Live(plain("\n".join(lines(found))), auto_refresh=False) as live:
        while found.left:
            time.sleep(2)
            found = read(sweep_dir, store)
            live.update(plain("\n".join(lines(found))), refresh=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
