"""`python -m lorabench.sync <sweep dir>`: send W&B what it lacks of a sweep, from the sweep's records alone.

What the server has is not sent again. W&B's own local files are not needed: offline runs, and runs that an outage cut off,
are read from `run.json` and `history.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.store.records import Record, Store
from lorabench.trackers.wandb import report as wandb_report
from lorabench.trackers.wandb import runs as wb
from lorabench.trackers.wandb.api import Server, api_key, base_url
from lorabench.trackers.wandb.state import SENDING
from lorabench.trackers.wandb.tracker import TARGET

AT_ONCE = 8  # questions to the server side by side
PROJECT = "lorabench"


@dataclass(frozen=True)
class Lack:
    """What the server lacks of one run. rows: of its history; values: of its summary; end: it is not over there."""

    record: Record
    new: bool
    rows: int
    values: int
    end: bool = False

    @property
    def nothing(self) -> bool:
        return not (self.new or self.rows or self.values or self.end)


def target(sweep_dir: Path, *, project: str | None, entity: str | None, artifacts: bool) -> wb.Target:
    """Where a sweep's runs go: as asked, else where its tracker sent them. Raises `ConfigError` for no sweep, for no key."""
    store = Store(sweep_dir)
    if not (sweep_dir.is_dir() and (store.manifest() or store.run_ids())):
        raise ConfigError("sweep", str(sweep_dir), "a directory that `python -m lorabench` wrote, with runs/ in it")
    try:
        before = json.loads((sweep_dir / TARGET).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    key = api_key()
    if key is None:
        raise ConfigError("WANDB_API_KEY", None, "no W&B key: set WANDB_API_KEY, or run `wandb login` once")
    project = project or before.get("project") or PROJECT
    entity = entity or before.get("entity")
    server = Server(base_url(), key, project, entity)
    return wb.Target(store, sweep_dir.resolve().name, project, entity, server, artifacts=artifacts)


def lacks(to: wb.Target, records: Sequence[Record], verdicts: Mapping[str, Mapping[str, Any]]) -> list[Lack]:
    """Ask the server about each run. Raises `Away`."""
    server = to.server
    assert server is not None

    def one(record: Record) -> Lack:
        known, want = to.known(record.run_id), wb.steps(to.store.history(record.run_id))
        has = server.run(known)
        values = wb.lacking(to.summary(record, verdicts.get(record.run_id)), has.summary if has else {})
        if has is None:
            return Lack(record, True, len(want), len(values))
        if wb.complete(has, want):
            return Lack(record, False, 0, len(values), end=not has.ended(failed=record.status == "failed"))
        back_to = wb.gap(server, known, has, want)
        last = has.last_step if back_to is None else back_to
        return Lack(record, False, max(1, sum(step > last for step, _ in want)), len(values))

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(one, records))


def send(to: wb.Target, todo: Sequence[Lack], verdicts: Mapping[str, Mapping[str, Any]]) -> tuple[int, list[str]]:
    """Send what is lacking; returns the history rows sent, and a line for each run that did not arrive."""
    rows, left = 0, []
    with _bar(len(todo)) as step:
        for lack in todo:
            run_id = lack.record.run_id
            try:
                rows += wb.bring(to, lack.record, verdicts.get(run_id))
            except Exception as e:
                left.append(f"{run_id}: {' '.join(f'{type(e).__name__}: {e}'.split())}")
            step()
    return rows, left


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("sending runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=total)
        yield lambda: bars.advance(task)


@command
def main(argv: Sequence[str] | None = None) -> int | None:
    """Exit code 0: all is at W&B; 1: something did not arrive; 2: bad input, no key, or a server that does not answer."""
    args = parser().parse_args(argv)
    for key, value in wb.QUIET.items():
        os.environ.setdefault(key, value)
    to = target(args.sweep, project=args.project, entity=args.entity, artifacts=args.artifacts)
    assert to.server is not None
    if not args.dry_run:
        _wait_for_mirror(to)
    where = f"{to.server.url}, {to.server.entity()}/{to.project}"
    records = to.store.records()
    tables = _tables(args.sweep)
    found = lacks(to, records, tables["verdicts"])
    todo = [lack for lack in found if not lack.nothing]
    report = args.report or Path("reports", to.sweep)
    print(f"{to.sweep} at {where}: {_counted(found)}")
    if args.dry_run:
        print("nothing was sent (--dry-run)")
        return 0
    rows, left = send(to, todo, tables["verdicts"])
    done = len(todo) - len(left)
    said = _report(to, report, tables, left)
    print(f"sent {rows} history rows; {done} runs brought up to date; {said}")
    for line in left:
        print(f"not sent: {line}", file=sys.stderr)
    return 1 if left else 0


def _wait_for_mirror(to: wb.Target) -> None:
    """What the sweep's own process still sends in the background is not sent twice."""
    if (holder := to.store.leases.holder(SENDING)) is not None:
        print(f"waiting for {holder}, which still sends", file=sys.stderr)
        while to.store.leases.holder(SENDING) is not None:
            time.sleep(0.2)


def _tables(sweep_dir: Path) -> dict[str, Any]:
    """Of the sweep's report; empty where no run has completed."""
    from lorabench.report.summary import mirrored

    try:
        return mirrored(sweep_dir)
    except ConfigError:
        return {"verdicts": {}}


def _report(to: wb.Target, folder: Path, tables: Mapping[str, Any], left: list[str]) -> str:
    """The sweep-level run; a failure goes to `left`."""
    if not (folder / "report.html").is_file() or "comparison" not in tables:
        return f"no report at {folder} (python -m lorabench.report {to.store.root} renders one)"
    try:
        return (
            "report sent" if wandb_report.bring(to, {"dir": str(folder), "tables": tables}) else "report there already"
        )
    except Exception as e:
        left.append(f"report: {' '.join(f'{type(e).__name__}: {e}'.split())}")
        return "report not sent"


def _counted(found: Sequence[Lack]) -> str:
    new = [x for x in found if x.new]
    cut = [x for x in found if x.rows and not x.new]
    bare = [x for x in found if x.values and not x.rows and not x.new]
    open_ = [x for x in found if x.end]
    parts = [f"{sum(x.nothing for x in found)} of {len(found)} ended runs are there"]
    parts += [f"{len(new)} are not"] if new else []
    parts += [f"{len(cut)} lack part of their history"] if cut else []
    parts += [f"{len(bare)} lack values of their summary"] if bare else []
    parts += [f"{len(open_)} are not over"] if open_ else []
    return f"{', '.join(parts)}; {sum(x.rows for x in found)} history rows to send"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.sync",
        description="Send W&B what it lacks of a sweep, from the sweep's records: runs, histories, summaries, the report.",
    )
    p.add_argument("sweep", type=Path, help="a sweep's directory, such as sweeps/rank_sweep")
    p.add_argument("--project", help=f"W&B project (default: where the sweep's tracker sent to, else {PROJECT})")
    p.add_argument("--entity", help="W&B entity (default: likewise, else the key's own)")
    p.add_argument("--artifacts", action="store_true", help="send each run's adapter, too")
    p.add_argument(
        "--report", type=Path, metavar="DIR", help="the rendered report (default: reports/<name of the sweep>)"
    )
    p.add_argument("--dry-run", action="store_true", help="ask the server, say what would be sent, send nothing")
    return p


if __name__ == "__main__":
    sys.exit(main())
