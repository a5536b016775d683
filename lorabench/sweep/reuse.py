"""Runs that another sweep has trained already (`sweep.reuse`): the same run_id, so the same run; its files are
copied."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabench.config.errors import ConfigError, ExistingWork, Unwritable
from lorabench.config.runs import RunConfig
from lorabench.runtime.files import atomic_folder, atomic_write, name_unwritable, remove_temporaries
from lorabench.store.arrays import SHARED_FILE, pack_columns
from lorabench.store.integrity import damaged_files
from lorabench.store.records import MANIFEST, Record, Store, dump_json, record_text
from lorabench.sweep.resume import check_drift

COPYABLE_STATUSES = ("completed", "diverged")  # a pruned run was held against rates that this sweep may not have


def open_sources(sources: Sequence[str]) -> list[Store]:
    """Return the sweeps at these paths. Raises `ConfigError` for one that is no sweep's directory."""
    for path in sources:
        if not (Path(path) / MANIFEST).is_file():
            raise ConfigError("sweep.reuse", path, f"directories of sweeps; there is no {MANIFEST} in this one")
        Store(path).check_foreign()
    return [Store(path) for path in sources]


def copy_runs(store: Store, runs: Sequence[RunConfig], sources: Sequence[str]) -> Iterator[str]:
    """Copy into `store` the runs it has not begun and that a source has trained to the end; yields a line a source.

    One made on another device or precision than this sweep's is left, as one made of data, base or Python files that
    are not here. To be called under `Store.locked`, before the sweep settles.
    """
    here = _noted_device(store) if sources else {}
    if sources and not store.run_ids():
        manifest = store.manifest()
        # what is copied decides, also for a launcher that goes on where this one is killed
        if manifest.pop("settled", None):
            store.write_manifest(manifest)
    for other, found, left in _offers(store, runs, sources, here):
        taken = sum(_copy(other, store, record) for record in found)
        if said := _copy_message(taken, other, left):
            yield f"{store.root}: {said}"


@dataclass(frozen=True)
class CopyPreview:
    """What `copy_runs` would copy: its lines, the runs, and what `trainer.precision=auto` then means; None: no
    change."""

    lines: tuple[str, ...]
    run_ids: frozenset[str]
    precision: str | None


def preview_copy(store: Store, runs: Sequence[RunConfig], sources: Sequence[str]) -> CopyPreview:
    """Return what `copy_runs` would copy, and write nothing."""
    here = _noted_device(store) if sources else {}
    lines, run_ids = list[str](), set[str]()
    for other, found, left in _offers(store, runs, sources, here):
        lines += [said] if (said := _copy_message(len(found), other, left)) else []
        run_ids |= {record.run_id for record in found}
    return CopyPreview(tuple(lines), frozenset(run_ids), here.get("precision"))


def _copy_message(taken: int, other: Store, left: int) -> str:
    why = f"; {left} of other data, base, device or precision than this sweep's are not" if left else ""
    return f"{taken} runs taken from {other.root}{why}" if taken or left else ""


def _offers(
    store: Store, runs: Sequence[RunConfig], sources: Sequence[str], here: dict[str, str]
) -> Iterator[tuple[Store, list[Record], int]]:
    """Give for each source what it has trained to the end and `store` has not begun, and how many were made otherwise.
    here: {"device": "cpu", ...} of this sweep; the first run says what it does not."""
    taken: set[str] = set()
    for other in open_sources(sources):
        new = {r.run_id: r for r in runs if r.run_id not in taken and not store.run_dir(r.run_id).exists()}
        torn = damaged_files(other, new)
        found, left = list[Record](), 0
        for record in map(other.read, sorted(new.keys() - torn.keys())):
            if record is None or record.status not in COPYABLE_STATUSES:
                continue
            if _is_comparable(record, here, new[record.run_id]):
                found.append(record)
            else:
                left += 1
        yield other, found, left
        taken |= {record.run_id for record in found}


def _noted_device(store: Store) -> dict[str, str]:
    """Return {"device": "cpu", ...} of the runs that are there. A note from before any of them counts for nothing."""
    here = dict[str, str]()
    if store.run_ids():
        here |= store.manifest().get("settled") or {}
        for record in () if here else store.records():
            _matches_device(record, here)
    return here


def _is_comparable(record: Record, here: dict[str, str], run: RunConfig) -> bool:
    """Whether a record was made as this sweep's are. here: {"device": "cpu", ...}; the first run fills it in where it
    is empty."""
    try:
        check_drift(record, run)
    except ExistingWork:
        return False
    return _matches_device(record, here)


def _matches_device(record: Record, here: dict[str, str]) -> bool:
    automatic = record.config.get("trainer", {}).get("precision") == "auto"  # else the precision is part of the run_id
    for name in ("device", "precision") if automatic else ("device",):
        if (value := str(record.provenance.get(name))) != here.setdefault(name, value):
            return False
    return True


def _copy(other: Store, store: Store, record: Record) -> bool:
    """Copy all of a run or nothing of it. False where another launcher has begun it just now."""
    target = store.run_dir(record.run_id)
    remove_temporaries(target)
    try:
        with name_unwritable(target), atomic_folder(target, replace=False) as made:
            _fill_copy(other, record, made)
    except Unwritable as e:
        if e.errno != errno.EEXIST:
            raise
        return False
    return True


def _fill_copy(other: Store, record: Record, made: Path) -> None:
    """Copy a run's folder into `made`; its record says where it comes from."""
    shutil.copytree(other.run_dir(record.run_id), made, ignore=_names_to_skip, dirs_exist_ok=True)
    data = json.loads((made / "run.json").read_text(encoding="utf-8"))
    data["provenance"]["reused_from"] = other.root.name
    atomic_write(made / "run.json", dump_json(data) if record.run_id in other.edited else record_text(data))
    slim = (other.root / SHARED_FILE).is_file()  # a part of its results stands there
    if slim and (arrays := other.arrays(record.run_id, "test")):
        atomic_write(made / "test.npz", pack_columns(arrays))


def _names_to_skip(folder: str, names: list[str]) -> list[str]:
    """Return what is not copied: symbolic links, which would lead elsewhere, and what a kill left half-written."""
    return [n for n in names if (Path(folder) / n).is_symlink() or n.endswith(".tmp")]
