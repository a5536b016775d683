"""The sweep's report as one W&B run, with table, figures and page; and each run's verdict in its summary."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.trackers.wandb.runs import ARRIVAL_PAUSES, Target, client_settings, missing_values, wandb_id
from lorabench.trackers.wandb.server import ServerUnavailable
from lorabench.trackers.wandb.state import REPORT

if TYPE_CHECKING:
    import wandb

REQUESTS_AT_ONCE = 8


def send(target: Target, folder: Path, tables: Mapping[str, Any]) -> bool:
    """Send a rendered report and the runs' verdicts. Return False where the server has this report already.

    tables: what `lorabench.report.summary.tracker_summary` returns. Raises `ServerUnavailable`.
    """
    write_verdicts(target, tables["verdicts"])
    its_id, content = wandb_id(target.sweep, REPORT), folder_digest(folder)
    remote = target.server.run(its_id) if target.server else None
    if remote is not None and remote.summary.get("report/digest") == content and remote.is_over(failed=False):
        return False
    run = _open(target, its_id)
    run.log(_media(folder, tables), step=remote.last_step + 1 if remote else 0, commit=True)
    run.summary.update({**tables["summary"], "report/digest": content})
    run.finish()
    if target.server is not None:
        _check_arrived(target, its_id, content)
    return True


def write_verdicts(target: Target, verdicts: Mapping[str, Mapping[str, Any]]) -> int:
    """Write each run's verdict into its summary where the server has the run. Return how many were written.

    Offline runs are closed files by then. Their verdicts are in the report's table and in what `lorabench.sync` sends.
    """
    server = target.server
    if server is None:
        return 0

    def write(run_id: str) -> bool:
        remote = server.run(target.wandb_id(run_id))
        values = missing_values(verdicts[run_id], remote.summary) if remote else {}
        if remote and values:
            server.write_summary(remote, values)
        return bool(values)

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
        return sum(threads.map(write, verdicts))


def folder_digest(folder: Path) -> str:
    """Return a hash of the names and bytes of all files in a folder."""
    sums = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sums.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return sums.hexdigest()[:16]


def _open(target: Target, its_id: str) -> wandb.Run:
    import wandb

    folder = target.store.root / ".wandb"
    folder.mkdir(parents=True, exist_ok=True)
    if target.mode == "offline":
        shutil.rmtree(folder / "wandb", ignore_errors=True)  # one report a sweep: the last
    how: dict[str, Any] = {"resume": "allow"} if target.server else {}
    return wandb.init(
        id=its_id,
        name=f"{target.sweep}: report",
        project=target.project,
        entity=target.entity,
        group=target.sweep,
        job_type=REPORT,
        tags=["report"],
        dir=str(folder.resolve()),
        mode=target.mode,
        reinit="create_new",
        settings=client_settings(target.server),
        **how,
    )


def _media(folder: Path, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that is shown, by key."""
    import wandb

    shown = tables["comparison"]
    media: dict[str, Any] = {"comparison": wandb.Table(columns=shown["columns"], data=shown["rows"])}
    if (page := folder / "report.html").is_file():
        media["report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
    for path in sorted(folder.glob("figures/*.png")):
        media[f"figures/{path.stem}"] = wandb.Image(str(path))
    return media


def _check_arrived(target: Target, its_id: str, content: str) -> None:
    assert target.server is not None
    for pause in ARRIVAL_PAUSES:
        time.sleep(pause)
        remote = target.server.run(its_id)
        if remote is not None and remote.summary.get("report/digest") == content:
            return
    raise ServerUnavailable(f"{target.server.url} has not got the report")
