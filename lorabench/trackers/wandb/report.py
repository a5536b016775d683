"""One W&B run a sweep: the comparison table, the figures and the HTML report; and each run's verdict in its summary."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.trackers.wandb.api import Away
from lorabench.trackers.wandb.runs import Target, lacking, quiet, wandb_id

if TYPE_CHECKING:
    import wandb

REPORT = "report"  # takes a run_id's place in the W&B id
AT_ONCE = 8  # summaries written side by side


def bring(target: Target, given: Mapping[str, Any]) -> bool:
    """Show a report; returns whether it was sent (one that the server has is not). given: {"dir", "tables"}.

    tables: what `report.mirrored` makes. Raises `Away` where the server is silent.
    """
    folder, tables = Path(given["dir"]), given["tables"]
    verdicts(target, tables["verdicts"])
    known, mark = wandb_id(target.sweep, REPORT), digest(folder)
    has = target.server.run(known) if target.server else None
    if has is not None and has.summary.get("report/digest") == mark and has.ended():
        return False
    run = _open(target, known)
    media = _media(folder, tables)
    run.log(media, step=has.last_step + 1 if has else 0, commit=True)
    run.summary.update({**tables["summary"], "report/digest": mark})
    run.finish()
    if target.server is not None:
        _arrived(target, known, mark)
    return True


def verdicts(target: Target, found: Mapping[str, Mapping[str, Any]]) -> int:
    """Write each run's verdict into its summary, where the server has the run; returns how many were written.

    Offline runs are closed files by then: theirs are in the report's table, and in what `lorabench.sync` sends.
    """
    server = target.server
    if server is None:
        return 0

    def write(run_id: str) -> bool:
        has = server.run(target.known(run_id))
        new = lacking(found[run_id], has.summary) if has else {}
        if has and new:
            server.write_summary(has, new)
        return bool(new)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return sum(threads.map(write, found))


def digest(folder: Path) -> str:
    """Of the report's files: equal records give equal bytes, and an equal report is not sent again."""
    sums = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sums.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return sums.hexdigest()[:16]


def _open(target: Target, known: str) -> wandb.Run:
    import wandb

    folder = target.store.root / ".wandb"
    folder.mkdir(parents=True, exist_ok=True)
    if target.mode == "offline":
        shutil.rmtree(folder / "wandb", ignore_errors=True)  # one report a sweep: the last
    how: dict[str, Any] = {"resume": "allow"} if target.server else {}
    return wandb.init(
        id=known, name=f"{target.sweep}: report", project=target.project, entity=target.entity, group=target.sweep,
        job_type=REPORT, tags=["report"], dir=str(folder.resolve()), mode=target.mode, reinit="create_new",
        settings=quiet(target.server), **how,
    )  # fmt: skip


def _media(folder: Path, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is shown, by key."""
    import wandb

    shown = tables["comparison"]
    media: dict[str, Any] = {"comparison": wandb.Table(columns=shown["columns"], data=shown["rows"])}
    if (page := folder / "report.html").is_file():
        media["report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
    for path in sorted(folder.glob("figures/*.png")):
        media[f"figures/{path.stem}"] = wandb.Image(str(path))
    return media


def _arrived(target: Target, known: str, mark: str) -> None:
    assert target.server is not None
    for pause in (0.0, 0.3, 1.0, 2.0):
        time.sleep(pause)
        has = target.server.run(known)
        if has is not None and has.summary.get("report/digest") == mark:
            return
    raise Away(f"{target.server.url} has not got the report")
