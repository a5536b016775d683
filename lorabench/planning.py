"""What a sweep is asked to do, as data: jobs, cells, packs, and the manifest that holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorabench import __version__
from lorabench import prepare as prep
from lorabench.config import RunConfig, Settings, digest
from lorabench.plan import SlicePlan
from lorabench.prepare import Pack
from lorabench.records import Store


@dataclass(frozen=True)
class Job:
    """One listed run: the run, everything else of its config, and what it is called in comparisons."""

    run: RunConfig
    settings: Settings
    label: Mapping[str, Any]


def label_of(
    run: RunConfig, *, alpha_rule: str | None = None, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
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


def write_cells(store: Store, jobs: Sequence[Job], plans: Mapping[str, SlicePlan], *, only_new: bool) -> None:
    """Put jobs and the cells they belong to into the manifest. only_new: leave alone what a sweeper declared before."""
    with store.locked():
        manifest = store.manifest() or new_manifest(jobs[0].settings)
        manifest["experiment"] = jobs[0].settings.sweep.experiment or manifest.get("experiment")
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


def new_manifest(settings: Settings) -> dict[str, Any]:
    return {
        "schema": 1, "name": settings.sweep.name, "experiment": settings.sweep.experiment, "lorabench": __version__, "study": asdict(settings.study),
        "study_hash": digest(asdict(settings.study))[:12], "cells": [], "runs": {}, "packs": [],
    }  # fmt: skip


def planned_packs(store: Store, jobs: Sequence[Job]) -> list[Pack]:
    """The packs that hold the jobs: those of the manifest where they stand, new ones for what is new."""
    manifest = store.manifest()
    runs = {j.run.run_id: j.run for j in jobs}
    known = [
        # a pack trains with the members it was planned with, whether or not all of them are asked for now
        Pack(entry["id"], tuple(runs.get(i) or _run_from_manifest(manifest, i) for i in entry["runs"]))
        for entry in manifest["packs"]
        if not entry.get("replaced") and any(i in runs for i in entry["runs"])
    ]
    planned = {i for p in known for i in p.run_ids}
    fresh = plan_packs(
        [r for i, r in runs.items() if i not in planned], jobs[0].settings.sweep.max_pack, len(manifest["packs"])
    )
    manifest["packs"] += [_entry(pack, version=1) for pack in fresh]
    store.write_manifest(manifest)
    return known + fresh


def _run_from_manifest(manifest: Mapping[str, Any], run_id: str) -> RunConfig:
    run = RunConfig.from_dict(manifest["runs"][run_id]["config"])
    assert run.run_id == run_id, "a manifest's config no longer gives its run_id"
    return run


def replan(store: Store, pack: Pack, parts: Sequence[Pack]) -> None:
    """Append a new version of the plan in which `parts` stand for `pack`."""
    with store.locked():
        manifest = store.manifest()
        for entry in manifest["packs"]:
            if entry["id"] == pack.id:
                entry["replaced"] = [p.id for p in parts]
        manifest["packs"] += [_entry(part, version=2) for part in parts]
        store.write_manifest(manifest)


def _entry(pack: Pack, *, version: int) -> dict[str, Any]:
    """A pack in the manifest, with what `auto` means for it here."""
    first = pack.runs[0]
    return {
        "id": pack.id,
        "version": version,
        "role": first.role,
        "runs": pack.run_ids,
        "resolved": asdict(prep.resolve(first)),
    }
