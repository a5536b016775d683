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

from lorabench import checkpoints
from lorabench.records import Record, Store
from lorabench.schema import ConfigError

FRESH = 600  # seconds since a run last wrote: longer, and it is taken for one that was cut


@dataclass(frozen=True)
class Begun:
    """A run with a history or a checkpoint and no record. step of steps: the last row's, or the checkpoint's where that is
    later; age: seconds since either was written; kept: the step of its pack's last checkpoint."""

    run_id: str
    step: int
    steps: int | None
    age: float
    kept: int | None = None

    @property
    def running(self) -> bool:
        return self.age < FRESH


@dataclass(frozen=True)
class Status:
    """What has become of the runs that a sweep's manifest lists, each once."""

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
        """Of the listed runs without a record, at the mean pace of those that have one; None before the first.

        A run's seconds are its share of its pack's; what a running one has done already counts.
        """
        spent = [s for r in self.records if (s := _share(r)) is not None]
        if not spent or not self.left:
            return 0.0 if not self.left else None
        done = sum(b.step / b.steps for b in self.begun if b.steps and b.running)
        return sum(spent) / len(spent) * max(0.0, self.left - done)


def read(sweep_dir: str | Path) -> Status:
    """Raises `ConfigError` for a directory that is no sweep's."""
    root = Path(sweep_dir)
    store = Store(root)
    manifest = store.manifest() if root.is_dir() else {}
    if not manifest:
        raise ConfigError(
            "sweep dir", str(sweep_dir), "a directory with the sweep.json that `python -m lorabench` writes"
        )
    listed = manifest["runs"]
    records = tuple(r for i in sorted(listed) if (r := store.read(i)) is not None)
    ended = {r.run_id for r in records}
    at = _checkpoints(root, manifest)
    begun = tuple(b for i in sorted(set(listed) - ended) if (b := _begun(store, i, listed[i], at.get(i))) is not None)
    name = str(manifest.get("name") or root.resolve().name)
    return Status(name, len(listed), records, begun, sum(run["role"] == "confirm" for run in listed.values()))


def _checkpoints(root: Path, manifest: dict[str, Any]) -> dict[str, Path]:
    """The newest checkpoint by run_id, of the packs that have one."""
    packs = [p for p in manifest["packs"] if not p.get("replaced")]
    newest = {p["id"]: checkpoints.listed(checkpoints.folder(root, p["id"]))[:1] for p in packs}
    return {i: newest[p["id"]][0] for p in packs for i in p["runs"] if newest[p["id"]]}


def _begun(store: Store, run_id: str, entry: dict[str, Any], checkpoint: Path | None) -> Begun | None:
    written = [m for p in (store.run_dir(run_id) / "history.jsonl", checkpoint) if p and (m := _written(p)) is not None]
    if not written:
        return None
    kept = checkpoints.step_of(checkpoint) if checkpoint else None
    step = max((int(row.get("step") or 0) for row in store.history(run_id)), default=0)
    steps = (entry.get("config") or {}).get("trainer", {}).get("max_steps")
    return Begun(run_id, max(step, kept or 0), steps, max(0.0, time.time() - max(written)), kept)


def _written(path: Path) -> float | None:
    """When a file was last written; None: it is not there (any more)."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _share(record: Record) -> float | None:
    seconds, size = record.resources.get("pack_seconds"), record.resources.get("pack_size")
    return seconds / size if seconds and size else None


def lines(s: Status) -> list[str]:
    """The same in words, a line each."""
    counts = ", ".join(f"{n} {name}" for name, n in s.counts.items() if n) or "nothing listed"
    phases = f" ({s.listed - s.confirms} tune, {s.confirms} confirm)" if s.confirms else ""
    out = [f"{s.name}: {len(s.records)} of {s.listed} runs have ended{phases}: {counts}"]
    if s.left:
        eta = s.seconds_left
        out.append(
            "time left: not known before the first run has ended" if eta is None else f"time left: about {_span(eta)}"
        )
        out.append("" if s.confirms else "confirmation runs, if any, are listed when tuning has ended and come on top")
    out += _unfinished(s.begun)
    out += [f"  {r.run_id} failed: {(r.error or 'no reason recorded').splitlines()[0]}" for r in s.failed]
    if s.failed:
        out.append("sweep.retry_failed=true, added to the sweep's own command, trains the failed ones again")
    return [line for line in out if line]


def _unfinished(begun: Sequence[Begun]) -> list[str]:
    """A line for all runs of one state and step: the slices of a pack go together."""
    groups: dict[str, list[str]] = {}
    for b in begun:
        at = f"step {b.step}" + (f" of {b.steps}" if b.steps else "")
        again = "the sweep's own command " + ("trains it again" if b.kept is None else f"goes on from step {b.kept}")
        groups.setdefault(f"running, {at}" if b.running else f"cut at {at}, {_span(b.age)} ago: {again}", []).append(
            b.run_id
        )
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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where runs failed; 2 for bad input."""
    args = parser().parse_args(argv)
    try:
        found = _watch(args.sweep) if args.live else read(args.sweep)
    except (ConfigError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not args.live:
        print("\n".join(lines(found)))
    return 1 if found.failed else 0


def _watch(sweep_dir: Path) -> Status:
    from rich.live import Live
    from rich.text import Text

    found = read(sweep_dir)
    with Live(Text("\n".join(lines(found))), auto_refresh=False) as live:
        while found.left:
            time.sleep(2)
            found = read(sweep_dir)
            live.update(Text("\n".join(lines(found))), refresh=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
