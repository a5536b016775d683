"""What a sweep is asked to do, as data: jobs, cells, packs, and the manifest that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorabench import __version__
from lorabench.config.cells import cell_id
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.errors import ExistingWork
from lorabench.config.runs import Pack, RunConfig, Settings, digest
from lorabench.results.reference import default_reference
from lorabench.results.sweep import cells_of
from lorabench.runtime.memory import available_memory
from lorabench.store.records import MANIFEST, MANIFEST_WAY_OUT, Store
from lorabench.sweep.memory import estimate_pack
from lorabench.training import precision, preparation
from lorabench.training.pruning import cell_key, is_prunable


@dataclass(frozen=True)
class Job:
    """One listed run: the run, everything else of its config, and what it is called in comparisons.

    asked: the command line's words for it without rate, seed and place, as `launch.command_line.run_words` gives them.
    """

    run: RunConfig
    settings: Settings
    label: Mapping[str, Any]
    asked: tuple[str, ...] = ()


def cell_label(
    run: RunConfig, *, alpha_rule: str | None = None, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a run's cell is called: method, r, alpha and its rule, targets, other axes."""
    label = dict(run.method.label())
    alpha = label.get("alpha")
    rule = alpha_rule if alpha is not None and alpha_rule else None if alpha is None else f"{alpha:g}"
    return {**label, "alpha_rule": rule, "extra": dict(extra or {})}


MAX_SLICES_PER_PACK = 16  # where memory would allow more: a pack is what a kill costs
PLANNED_MEMORY_SHARE = 0.7  # of free memory that a pack may be planned to take: its estimate is good to about a third


def plan_packs(
    runs: Sequence[RunConfig], max_pack: int | None, start: int = 0, *, prune: bool = False, auto: str | None = None
) -> list[Pack]:
    """Group runs that can share a base into packs.

    Runs that are most alike come together: equal method, then equal rank, since unused rows cost time, then equal seed.
    max_pack: slices a pack at most; None: as many as fit into memory. start: number of the first pack. prune: keep the
    tuning runs of a cell in one pack whatever its size, so that the pruning rule sees all its rates. auto: what
    `trainer.precision=auto` means, as in `precision.resolve`.
    """
    groups: dict[str, list[RunConfig]] = {}
    for run in runs:
        groups.setdefault(run.pack_key, []).append(run)
    packs: list[Pack] = []
    for group in groups.values():
        group.sort(key=lambda r: (r.method.name, r.method.r, r.seed, r.optimizer.lr, r.run_id))
        most = max_pack or _max_fitting(group, auto)
        for units in _fill(_whole_cells(group) if prune else [[run] for run in group], most):
            cells = any(len(unit) > 1 for unit in units)
            packs.append(Pack(f"p{start + len(packs)}", tuple(r for unit in units for r in unit), prune=cells))
    return packs


def _max_fitting(runs: Sequence[RunConfig], auto: str | None) -> int:
    """Return how many of these runs fit into the memory that is free now; at least 1. The largest runs come last."""
    largest, resolved = list(runs[-MAX_SLICES_PER_PACK:]), precision.resolve(runs[0], auto)
    free, info = PLANNED_MEMORY_SHARE * available_memory(resolved.device), preparation.base_info(runs[0])
    plans = [preparation.slice_plan(run, info) for run in largest]
    while len(plans) > 1 and free < estimate_pack(runs, plans, auto):
        plans = plans[1:]
    return len(plans)


def _whole_cells(runs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Return units of runs: a cell with rates to prune, at the place of its first run, or any other run alone."""
    cells: dict[str, list[RunConfig]] = {}
    for run in runs:
        cells.setdefault(cell_key(run), []).append(run)
    whole = {run.run_id: cell for cell in cells.values() if is_prunable(cell) for run in cell}
    return [whole.get(run.run_id, [run]) for run in runs if whole.get(run.run_id, [run])[0] is run]


def _fill(units: Sequence[list[RunConfig]], most: int) -> list[list[list[RunConfig]]]:
    """Return units in their order as packs of at most `most` runs: as few as possible, and of about one size."""

    def fill(limit: int) -> list[list[list[RunConfig]]]:
        packs: list[list[list[RunConfig]]] = []
        held = limit
        for unit in units:
            if held + len(unit) > limit:
                packs.append([])
                held = 0
            packs[-1].append(unit)
            held += len(unit)
        return packs

    fewest = len(fill(most))
    return next(packs for limit in range(1, most + 1) if len(packs := fill(limit)) == fewest)


def write_cells(
    store: Store, jobs: Sequence[Job], plans: Mapping[str, SlicePlan], *, only_new: bool, command: Sequence[str] = ()
) -> None:
    """Put jobs and the cells they belong to into the manifest.

    only_new: leave alone what a sweeper declared before. command: the words that launch all of it again.
    """
    with store.locked():
        manifest = new_manifest(jobs[0]) | store.manifest()
        manifest["experiment"] = jobs[0].settings.sweep.experiment or manifest.get("experiment")
        manifest |= {"command": list(command)} if command else {}
        cells, known = {c["id"]: c for c in manifest["cells"]}, set(manifest["runs"])
        # what is no part of a run's identity may be asked otherwise now; a cluster reads it here
        for job in reversed(jobs):
            if job.run.run_id in known:
                manifest["runs"][job.run.run_id]["config"] = job.run.to_dict()
        for job in jobs:
            run, name = job.run, cell_id(job.label)
            if only_new and run.run_id in known:
                continue
            trainable = plans[run.run_id].trainable(preparation.base_info(run))
            fresh = {"id": name, "label": {**job.label, "trainable": trainable}, "runs": {"tune": [], "confirm": []}}
            cell = cells.setdefault(name, fresh)
            if run.run_id not in cell["runs"][run.role]:
                cell["runs"][run.role].append(run.run_id)
            entry = {"role": run.role, "lr": run.optimizer.lr, "seed": run.seed, "config": run.to_dict()}
            entry |= {"asked": list(job.asked)} if job.asked else {}
            manifest["runs"].setdefault(run.run_id, entry)
        begins = not manifest["cells"]
        manifest["cells"] = list(cells.values())
        if begins:
            manifest["frozen"] = _freeze(manifest, jobs[0])
        store.write_manifest(manifest)


def _freeze(manifest: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Return what is fixed when a sweep begins although its study need not say it, so that no result can choose it."""
    reference = job.settings.study.reference or default_reference(cells_of(manifest, {})).id
    return {"reference": reference, "confirm_seeds": list(job.settings.sweep.confirm_seeds)}


def new_manifest(job: Job) -> dict[str, Any]:
    """Return the manifest of a sweep that has no cells yet: what its study declares, and the hash of that."""
    settings, task = job.settings, job.run.task
    study = asdict(settings.study)
    return {
        "schema": 1,
        "name": settings.sweep.name,
        "experiment": settings.sweep.experiment,
        "lorabench": __version__,
        "study": study,
        "study_hash": digest(study)[:12],
        "lower_is_better": sorted(task.lower_is_better),
        "units": dict(task.units),
        "cells": [],
        "runs": {},
        "packs": [],
    }


def assign_packs(store: Store, jobs: Sequence[Job]) -> list[Pack]:
    """Return the packs that hold the jobs, and note new ones in the manifest for jobs that are in none."""
    manifest, auto = store.manifest(), precision.noted_precision(store)
    known, fresh = known_and_new_packs(manifest, jobs, auto, lambda run: _is_copied(store, run))
    start = len(manifest["packs"])
    manifest["packs"] += [_manifest_entry(pack, auto, version=1) | {"round": start} for pack in fresh]
    store.write_manifest(manifest)
    return known + fresh


def known_and_new_packs(
    manifest: Mapping[str, Any], jobs: Sequence[Job], auto: str | None, reused: Callable[[RunConfig], bool]
) -> tuple[list[Pack], list[Pack]]:
    """Return the packs of the manifest that hold jobs, and new ones for the jobs in none of them.

    A pack prunes when it was planned to and `sweep.prune` still asks for it. reused: whether a run was copied from
    another sweep, so that nothing is to train beside it.
    """
    sweep, runs = jobs[0].settings.sweep, {j.run.run_id: j.run for j in jobs}
    known = [
        # a pack trains with the members it was planned with, whether or not all of them are asked for now
        Pack(
            entry["id"],
            tuple(runs.get(i) or run_from_manifest(manifest, i) for i in entry["runs"]),
            prune=sweep.prune and entry.get("prune", False),
        )
        for entry in manifest["packs"]
        if not entry.get("replaced") and any(i in runs for i in entry["runs"])
    ]
    planned = {i for p in known for i in p.run_ids}
    new = [r for i, r in runs.items() if i not in planned]
    start = len(manifest["packs"])
    if sweep.prune and new:
        begun = _begun_cells(manifest)
        apart = {r.run_id for r in new if cell_key(r) in begun}
    else:
        apart = {r.run_id for r in new if reused(r)}
    fresh = plan_packs([r for r in new if r.run_id not in apart], sweep.max_pack, start, prune=sweep.prune, auto=auto)
    fresh += plan_packs([r for r in new if r.run_id in apart], sweep.max_pack, start + len(fresh), auto=auto)
    return known, fresh


def planning_round(store: Store, packs: Sequence[Pack]) -> list[Pack]:
    """Return these packs and all others planned in the same rounds.

    Thread counts depend on the size of a round, so it includes packs that have ended.
    """
    manifest, own = store.manifest(), {pack.id.partition(".")[0] for pack in packs}  # halves of a pack are of its round
    rounds = {e["round"] for e in manifest["packs"] if e["id"] in own and "round" in e}
    others = [e for e in manifest["packs"] if e.get("round") in rounds and e["id"] not in own]
    return [*packs, *(Pack(e["id"], (run_from_manifest(manifest, e["runs"][0]),)) for e in others)]


def pack_from_manifest(store: Store, pack_id: str, *, prune: bool) -> Pack:
    """Return a pack as the manifest has it: what a job that is told its id trains."""
    manifest = store.manifest()
    entry = next(e for e in manifest["packs"] if e["id"] == pack_id)
    return Pack(pack_id, tuple(run_from_manifest(manifest, i) for i in entry["runs"]), prune=prune)


def _is_copied(store: Store, run: RunConfig) -> bool:
    record = store.read(run.run_id)
    return record is not None and "reused_from" in record.provenance


def _begun_cells(manifest: Mapping[str, Any]) -> set[str]:
    """Return keys of the cells that packs of the manifest hold runs of. Rates that join one later are not pruned."""
    planned = {i for entry in manifest["packs"] for i in entry["runs"]}
    return {cell_key(run_from_manifest(manifest, i)) for i in planned}


def run_from_manifest(manifest: Mapping[str, Any], run_id: str) -> RunConfig:
    """Return a run from its config in the manifest. Raises `ExistingWork` where that config is another run's, or
    none."""
    listed = manifest["runs"].get(run_id, {})
    if "config" not in listed or (run := RunConfig.from_dict(listed["config"])).run_id != run_id:
        allowed = f"its {MANIFEST} must list each run of its packs with that run's own config; {MANIFEST_WAY_OUT}"
        raise ExistingWork("sweep.dir", f"run {run_id}", allowed)
    return run


def replace_pack(store: Store, pack: Pack, parts: Sequence[Pack]) -> None:
    """Append a new version of the plan in which `parts` stand for `pack`."""
    with store.locked():
        manifest = store.manifest()
        for entry in manifest["packs"]:
            if entry["id"] == pack.id:
                entry["replaced"] = [p.id for p in parts]
        manifest["packs"] += [_manifest_entry(part, precision.noted_precision(store), version=2) for part in parts]
        store.write_manifest(manifest)


def replacing_packs(store: Store, pack: Pack) -> list[Pack]:
    """Return the packs that stand for `pack` since a launcher planned it anew; [] as long as it stands."""
    entries = {entry["id"]: entry for entry in store.manifest().get("packs", ())}
    runs = {run.run_id: run for run in pack.runs}
    replaced = entries.get(pack.id, {}).get("replaced", ())
    return [Pack(i, tuple(runs[run_id] for run_id in entries[i]["runs"])) for i in replaced]


def _manifest_entry(pack: Pack, auto: str | None, *, version: int) -> dict[str, Any]:
    """Return a pack's entry in the manifest, with what `auto` means for it here."""
    first = pack.runs[0]
    resolved = asdict(precision.resolve(first, auto))
    entry = {"id": pack.id, "version": version, "role": first.role, "runs": pack.run_ids, "resolved": resolved}
    return entry | ({"prune": True} if pack.prune else {})
