"""From listed runs to records: check all, plan packs, skip what is finished, train the rest, say what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from lorabench import __version__
from lorabench import prepare as prep
from lorabench.config import RunConfig, Settings, digest
from lorabench.plan import SlicePlan
from lorabench.records import Record, Store
from lorabench.schema import ConfigError, ExistingWork
from lorabench.terminal import Progress, dry_run_table
from lorabench.train import Listener, Pack, SlicesMix, train

Executor = Callable[[Callable[[Pack], list[Record]], Sequence[Pack]], Iterable[list[Record]]]


class SweepFailed(Exception):
    """Some runs of a sweep failed; the others are done and recorded. Exit code 1."""


@dataclass(frozen=True)
class Job:
    """One listed run: the run, everything else of its config, and what it is called in comparisons."""

    run: RunConfig
    settings: Settings
    label: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What an execution did: the records of the jobs, in their order, and how many were trained now."""

    records: list[Record | None]
    trained: int
    planned: int

    @property
    def failed(self) -> list[Record]:
        return [r for r in self.records if r is not None and r.status == "failed"]


def label_of(run: RunConfig, *, alpha_rule: str | None = None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run's cell is called: method, r, alpha and its rule, targets, other axes."""
    label = dict(run.method.label())
    alpha = label.get("alpha")
    rule = alpha_rule if alpha is not None and alpha_rule else None if alpha is None else f"{alpha:g}"
    return {**label, "alpha_rule": rule, "extra": dict(extra or {})}


def cell_id(label: Mapping[str, Any]) -> str:
    """A readable, stable name of a cell."""
    parts = [str(label["method"]).lower().replace(" ", "")]
    for letter, key in (("r", "r"), ("a", "alpha_rule"), ("", "targets")):
        if label.get(key) is not None:
            parts.append(f"{letter}{label[key]}")
    parts += [f"{k}={v}" for k, v in sorted(label["extra"].items())]
    return "-".join(part.replace(" ", "") for part in parts)


def check_all(jobs: Sequence[Job]) -> dict[str, SlicePlan]:
    """Check every listed run before anything is written. Raises `ConfigError` for the first bad one."""
    return {job.run.run_id: prep.check(job.run) for job in jobs}


def plan_packs(runs: Sequence[RunConfig], max_pack: int, start: int = 0) -> list[Pack]:
    """Group runs that can share a base, most alike first: equal rank (unused rows cost time), then equal seed."""
    groups: dict[str, list[RunConfig]] = {}
    for run in runs:
        groups.setdefault(run.pack_key, []).append(run)
    packs: list[Pack] = []
    for group in groups.values():
        group.sort(key=lambda r: (getattr(r.method, "r", 0), r.seed, r.optimizer.lr, r.run_id))
        count = math.ceil(len(group) / max_pack)
        size = math.ceil(len(group) / count)
        for i in range(0, len(group), size):
            packs.append(Pack(f"p{start + len(packs)}", tuple(group[i : i + size])))
    return packs


def execute(jobs: Sequence[Job], *, executor: Executor = map, console: Console | None = None) -> Outcome:
    """Train the listed runs that have no record yet and return the records of all of them."""
    settings = jobs[0].settings
    console = console or Console(stderr=True)
    store = Store(settings.sweep.dir)
    store.check_foreign()
    plans = check_all(jobs)
    if settings.sweep.dry_run:
        unique = list({j.run.run_id: j for j in jobs}.values())
        console.print(dry_run_table(plan_packs([j.run for j in unique], settings.sweep.max_pack), unique, plans))
        return Outcome([None] * len(jobs), 0, len(unique))
    _write_cells(store, jobs, plans, only_new=True)
    with store.locked():
        packs = _planned(store, jobs)
    finished = _finished(store, jobs)
    todo = [p for p in packs if any(i not in finished for i in p.run_ids)]
    if not todo and settings.sweep.progress:
        console.print(f"{store.root}: all {len(plans)} runs are finished, nothing to train", highlight=False)
    with Progress(console, todo, enabled=settings.sweep.progress) as progress:
        _run(todo, store, settings, finished, executor, progress)
    records = [store.read(j.run.run_id) for j in jobs]
    missing = sum(i not in finished for p in todo for i in p.run_ids)
    return Outcome(records, missing, len({j.run.run_id for j in jobs}))


def _run(
    todo: Sequence[Pack], store: Store, settings: Settings, finished: set[str], executor: Executor, progress: Progress
) -> None:
    from lorabench.trackers import make_tracker

    tracker = make_tracker(settings.tracker, sweep=store.root.name, sweep_dir=store.root)

    def one(pack: Pack) -> list[Record]:
        listener = _listener(progress, pack, tracker)
        try:
            return train(pack, store, listener, keep=finished)
        except SlicesMix as e:
            progress.say(f"{e}; its runs train one by one")
            alone = [Pack(f"{pack.id}.{k}", (run,)) for k, run in enumerate(pack.runs)]
            _replan(store, pack, alone)
            return [r for p in alone for r in train(p, store, _listener(progress, p, tracker), keep=finished)]

    try:
        for records in executor(one, todo):
            progress.done(records)
    finally:
        if tracker is not None:
            tracker.close()


def _listener(progress: Progress, pack: Pack, tracker: Any) -> Listener:
    if tracker is None:
        return Listener(step=progress.step(pack))

    def start(run: RunConfig) -> None:
        tracker.start(run.run_id, run.to_dict(), method=run.method.name, tags=[run.model.name, run.task.name, run.role])

    def rows(run_id: str, new: list[dict[str, Any]]) -> None:
        for row in new:
            tracker.log(run_id, row)

    return Listener(step=progress.step(pack), start=start, rows=rows, finish=lambda r: tracker.finish(r.run_id, r))


def _finished(store: Store, jobs: Sequence[Job]) -> set[str]:
    """Runs that need no training, after checking that what they were trained on is what is here."""
    settings = jobs[0].settings
    done: set[str] = set()
    for job in {j.run.run_id: j for j in jobs}.values():
        record = store.read(job.run.run_id)
        if record is None or (record.status == "failed" and settings.sweep.retry_failed):
            continue
        if record.status != "failed" and not settings.sweep.accept_drift:
            _check_drift(record, job.run)
        done.add(job.run.run_id)
    return done


def _check_drift(record: Record, run: RunConfig) -> None:
    """Refuse to reuse a record whose data or model files are not those that are here now."""
    now = {"data_fingerprint": prep.load_data(run.task).fingerprint, "model_fingerprint": prep.model_fingerprint(run)}
    for name, value in now.items():
        then = record.provenance.get(name)
        if then != value:
            what = name.split("_")[0]
            raise ExistingWork(
                f"{'task' if what == 'data' else 'model'}", run.task.name if what == "data" else run.model.name,
                f"the {what} files are not those that run {record.run_id} was trained on ({then} then, {value} now); "
                "use another sweep.name, or sweep.accept_drift=true to keep the old records",
            )  # fmt: skip


def declare(jobs: Sequence[Job]) -> None:
    """Check all jobs, then write the cells they belong to into the manifest. A dry run writes nothing."""
    plans = check_all(jobs)
    store = Store(jobs[0].settings.sweep.dir)
    store.check_foreign()
    if not jobs[0].settings.sweep.dry_run:
        _write_cells(store, jobs, plans, only_new=False)


def _write_cells(store: Store, jobs: Sequence[Job], plans: Mapping[str, SlicePlan], *, only_new: bool) -> None:
    """Put jobs and the cells they belong to into the manifest. only_new: leave alone what a sweeper declared before."""
    with store.locked():
        manifest = store.manifest() or new_manifest(jobs[0].settings)
        cells, known = {c["id"]: c for c in manifest["cells"]}, set(manifest["runs"])
        for job in jobs:
            run, name = job.run, cell_id(job.label)
            if only_new and run.run_id in known:
                continue
            trainable = plans[run.run_id].trainable(prep.layers(run))
            fresh = {"id": name, "label": {**job.label, "trainable": trainable}, "runs": {"tune": [], "confirm": []}}
            cell = cells.setdefault(name, fresh)
            if run.run_id not in cell["runs"][run.role]:
                cell["runs"][run.role].append(run.run_id)
            entry = {"role": run.role, "lr": run.optimizer.lr, "seed": run.seed, "config": run.to_dict()}
            manifest["runs"].setdefault(run.run_id, entry)
        manifest["cells"] = list(cells.values())
        store.write_manifest(manifest)


def chosen_rates(settings: Settings) -> dict[str, float]:
    """The rate that tuning chose, by cell id; a cell none of whose rates is eligible is left out."""
    from lorabench.report.select import choose

    store = Store(settings.sweep.dir)
    choices = choose(store.manifest(), {r.run_id: r for r in store.records()})
    return {name: c.lr for name, c in choices.items() if c.lr is not None}


def new_manifest(settings: Settings) -> dict[str, Any]:
    return {
        "schema": 1, "name": settings.sweep.name, "lorabench": __version__, "study": asdict(settings.study),
        "study_hash": digest(asdict(settings.study))[:12], "cells": [], "runs": {}, "packs": [],
    }  # fmt: skip


def _planned(store: Store, jobs: Sequence[Job]) -> list[Pack]:
    """The packs that hold the jobs: those of the manifest where they stand, new ones for what is new."""
    manifest = store.manifest()
    runs = {j.run.run_id: j.run for j in jobs}
    current = _current_packs(manifest)
    known: list[Pack] = []
    for entry in current:
        if not any(i in runs for i in entry["runs"]):
            continue
        if any(i not in runs for i in entry["runs"]):  # asked for less than was planned: its members train together all the same
            runs_of = [runs.get(i) or _run_from_manifest(manifest, i) for i in entry["runs"]]
        else:
            runs_of = [runs[i] for i in entry["runs"]]
        known.append(Pack(entry["id"], tuple(r for r in runs_of if r is not None)))
    planned = {i for p in known for i in p.run_ids}
    fresh = plan_packs([r for i, r in runs.items() if i not in planned], jobs[0].settings.sweep.max_pack, len(manifest["packs"]))
    for pack in fresh:
        resolved = asdict(prep.resolve(pack.runs[0]))
        manifest["packs"].append({"id": pack.id, "version": 1, "role": pack.runs[0].role, "runs": pack.run_ids, "resolved": resolved})
    store.write_manifest(manifest)
    return known + fresh


def _current_packs(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plan in force: a pack that was split stands no more, its parts do."""
    return [p for p in manifest["packs"] if not p.get("replaced")]


def _run_from_manifest(manifest: Mapping[str, Any], run_id: str) -> RunConfig:
    run = RunConfig.from_dict(manifest["runs"][run_id]["config"])
    assert run.run_id == run_id, "a manifest's config no longer gives its run_id"
    return run


def _replan(store: Store, pack: Pack, parts: Sequence[Pack]) -> None:
    """Append a new version of the plan in which `parts` stand for `pack`."""
    with store.locked():
        manifest = store.manifest()
        for entry in manifest["packs"]:
            if entry["id"] == pack.id:
                entry["replaced"] = [p.id for p in parts]
        for part in parts:
            resolved = asdict(prep.resolve(part.runs[0]))
            manifest["packs"].append({"id": part.id, "version": 2, "role": part.runs[0].role, "runs": part.run_ids, "resolved": resolved})
        store.write_manifest(manifest)


def finish(settings: Settings, *, console: Console | None = None) -> None:
    """Render the report and show the comparison on the terminal."""
    console = console or Console()
    if settings.sweep.dry_run:
        return
    from lorabench.report import render, terminal_table

    store = Store(settings.sweep.dir)
    records = store.records()
    if any(r.status == "completed" for r in records):
        console.print(terminal_table(settings.sweep.dir))
        if settings.report.enabled:
            render(settings.sweep.dir, settings.report.dir, title=settings.report.title)
            console.print(f"report: {settings.report.dir}/report.html", soft_wrap=True, highlight=False)
    failed = [r for r in records if r.status == "failed"]
    if failed:
        for r in failed[:10]:
            console.print(f"failed {r.run_id}: {r.error}", highlight=False, markup=False)
        raise SweepFailed(f"{len(failed)} of {len(records)} runs failed; start again with sweep.retry_failed=true")


def require_fresh(settings: Settings) -> None:
    """Confirmation seeds must not have chosen the rate."""
    shared = sorted(set(settings.sweep.tune_seeds) & set(settings.sweep.confirm_seeds))
    if shared:
        raise ConfigError("sweep.confirm_seeds", settings.sweep.confirm_seeds, f"fresh seeds: {shared} are tuning seeds too")
