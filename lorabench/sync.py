"""`python -m lorabench.sync <sweep dir>`: send W&B what it lacks of a sweep, from the sweep's records alone.

What the server has is not sent again. W&B's own local files are not needed: offline runs, and runs that an outage cut
off, are read from `run.json` and `history.jsonl`.
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
from pathlib import Path
from typing import Any

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.runtime.terminal import make_console, say
from lorabench.store.records import Record, Store
from lorabench.trackers.wandb import report as wandb_report
from lorabench.trackers.wandb import runs
from lorabench.trackers.wandb.server import Server, api_key, base_url
from lorabench.trackers.wandb.state import SENDING
from lorabench.trackers.wandb.tracker import TARGET_FILE

Verdicts = Mapping[str, Mapping[str, Any]]  # by run_id

REQUESTS_AT_ONCE = 8
PROJECT = "lorabench"


def target(sweep_dir: Path, *, project: str | None, entity: str | None, artifacts: bool) -> runs.Target:
    """Return where a sweep's runs go: as asked, else where its tracker sent them.

    Raises `ConfigError` where there is no sweep or no key.
    """
    store = Store(sweep_dir)
    if not (sweep_dir.is_dir() and (store.manifest() or store.run_ids())):
        raise ConfigError("sweep", str(sweep_dir), "a directory that `python -m lorabench` wrote, with runs/ in it")
    try:
        earlier = json.loads((sweep_dir / TARGET_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = {}
    key = api_key()
    if key is None:
        raise ConfigError("WANDB_API_KEY", None, "no W&B key: set WANDB_API_KEY, or run `wandb login` once")
    project = project or earlier.get("project") or PROJECT
    entity = entity or earlier.get("entity")
    server = Server(base_url(), key, project, entity)
    return runs.Target(store, sweep_dir.resolve().name, project, entity, server, artifacts=artifacts)


def missing(to: runs.Target, records: Sequence[Record], verdicts: Verdicts) -> list[runs.Missing]:
    """Ask the server what it lacks of each run. Raises `ServerUnavailable`."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
        return list(threads.map(lambda record: runs.missing(to, record, verdicts.get(record.run_id)), records))


def send(to: runs.Target, todo: Sequence[runs.Missing]) -> tuple[int, list[str]]:
    """Send what is missing. Return the number of history rows sent, and a line for each run that did not arrive."""
    rows, failures = 0, []
    with _progress_bar(len(todo)) as advance:
        for lack in todo:
            try:
                now = runs.missing(to, lack.record, lack.verdict)  # a mirror may have sent some of it meanwhile
                runs.send(to, now)
                rows += len(now.rows)
            except Exception as e:
                failures.append(f"{lack.record.run_id}: {' '.join(f'{type(e).__name__}: {e}'.split())}")
            advance()
    return rows, failures


@contextmanager
def _progress_bar(total: int) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True)
    columns = (TextColumn("sending runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=total)
        yield lambda: bars.advance(task)


@command
def main(argv: Sequence[str] | None = None) -> int | None:
    """Send what is missing.

    Exit code 0: all is at W&B; 1: something did not arrive; 2: bad input, no key, or a server that does not answer.
    """
    args = parser().parse_args(argv)
    for key, value in runs.QUIET.items():
        os.environ.setdefault(key, value)
    to = target(args.sweep, project=args.project, entity=args.entity, artifacts=args.artifacts)
    assert to.server is not None
    if not args.dry_run:
        _wait_for_mirror(to)
    where = f"{to.server.url}, {to.server.entity()}/{to.project}"
    records = to.store.records()
    tables = _tables(args.sweep)
    lacks = missing(to, records, tables["verdicts"])
    todo = [lack for lack in lacks if not lack.is_nothing]
    report = args.report or Path("reports", to.sweep)
    say(f"{to.sweep} at {where}: {_counts(lacks)}")
    if args.dry_run:
        say("nothing was sent (--dry-run)")
        return 0
    rows, failures = send(to, todo)
    done = len(todo) - len(failures)
    report_status = _send_report(to, report, tables, failures)
    say(f"sent {rows} history rows; {done} runs brought up to date; {report_status}")
    for line in failures:
        say(f"not sent: {line}", error=True)
    return 1 if failures else 0


def _wait_for_mirror(to: runs.Target) -> None:
    """Wait while the sweep's mirror still sends in the background, so that nothing is sent twice."""
    if (holder := to.store.leases.holder(SENDING)) is not None:
        say(f"waiting for {holder}, which still sends", error=True)
        while to.store.leases.holder(SENDING) is not None:
            time.sleep(0.2)


def _tables(sweep_dir: Path) -> dict[str, Any]:
    """Return the tables of the sweep's report, without any where no run has completed."""
    from lorabench.report.summary import tracker_summary

    try:
        return tracker_summary(sweep_dir)
    except ConfigError:
        return {"verdicts": {}}


def _send_report(to: runs.Target, folder: Path, tables: Mapping[str, Any], failures: list[str]) -> str:
    """Send the rendered report and return a line about it. A failure is added to `failures`."""
    if not (folder / "report.html").is_file() or "comparison" not in tables:
        return f"no report at {folder} (python -m lorabench.report {to.store.root} renders one)"
    try:
        return "report sent" if wandb_report.send(to, folder, tables) else "report there already"
    except Exception as e:
        failures.append(f"report: {' '.join(f'{type(e).__name__}: {e}'.split())}")
        return "report not sent"


def _counts(lacks: Sequence[runs.Missing]) -> str:
    """Return how many runs the server has, and how many lack what."""
    new = [x for x in lacks if x.remote is None]
    cut = [x for x in lacks if x.is_history_cut]
    whole = [x for x in lacks if x.remote is not None and not x.is_history_cut]
    bare = [x for x in whole if x.values]
    not_over = [x for x in whole if not x.is_over]
    parts = [f"{sum(x.is_nothing for x in lacks)} of {len(lacks)} ended runs are there"]
    parts += [f"{len(new)} are not"] if new else []
    parts += [f"{len(cut)} lack part of their history"] if cut else []
    parts += [f"{len(bare)} lack values of their summary"] if bare else []
    parts += [f"{len(not_over)} are not over"] if not_over else []
    return f"{', '.join(parts)}; {sum(len(x.rows) for x in lacks)} history rows to send"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.sync",
        description="Send W&B what it lacks of a sweep, from the sweep's records: "
        "runs, histories, summaries, the report.",
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
