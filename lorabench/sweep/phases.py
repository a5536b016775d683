"""Between the phases of a sweep: what is declared, which rates were chosen, cells timed alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorabench.config.cells import cell_id
from lorabench.config.errors import ConfigError
from lorabench.config.runs import Settings
from lorabench.results.selection import Choice, choose
from lorabench.runtime.files import name_unwritable
from lorabench.store.records import Store
from lorabench.sweep import declaration
from lorabench.sweep.packs import Job, write_cells

MEASURED_AT_ONCE = 16  # cells between two writes of the manifest, which is long where cells are many


def declare(jobs: Sequence[Job], command: Sequence[str] = ()) -> None:
    """Check all jobs, then write the cells they belong to into the manifest, and the command that launched them. A dry
    run writes nothing."""
    from lorabench.sweep.execute import check_all

    plans = check_all(jobs)
    store = Store(jobs[0].settings.sweep.dir)
    store.check_foreign()
    if not jobs[0].settings.sweep.dry_run:
        declaration.check_standing(store, jobs)
        write_cells(store, jobs, plans, only_new=False, command=command)


def chosen_rates(settings: Settings) -> dict[str, float]:
    """The rate that tuning chose, by cell id; a cell none of whose rates is eligible is left out."""
    return {name: c.lr for name, c in _choices(settings).items() if c.lr is not None}


def outward_rates(
    settings: Settings, tried: Mapping[str, Collection[float]], most: Mapping[str, int]
) -> dict[str, float]:
    """The next rate to train, by cell id, after those tried here: those that were added before and have not ended (by a
    launcher that was killed, or by another one), or failed and are to be tried again; where there are none one beyond,
    in cells whose best lies at an end: a round that was cut is ended first, so that rates share packs as they would
    have. most: rates of a cell."""
    begun, beyond = dict[str, float](), dict[str, float]()
    for name, choice in _choices(settings, retry=settings.sweep.retry_failed).items():
        if name not in tried:
            continue
        left = [rate.lr for rate in choice.rates if rate.missing > len(rate.pruned) and rate.lr not in tried[name]]
        if left:
            begun[name] = left[0]
        elif choice.outward is not None and len(choice.rates) < most.get(name, 0):
            beyond[name] = choice.outward
    return begun or beyond


def _choices(settings: Settings, *, retry: bool = False) -> dict[str, Choice]:
    """retry: failed runs count as not ended."""
    store = Store(settings.sweep.dir)
    return choose(store.manifest(), {r.run_id: r for r in store.records() if not (retry and r.status == "failed")})


def measure_cells(settings: Settings, jobs: Sequence[Job]) -> None:
    """A few steps of each cell alone, for the seconds and the memory that tables show; once a cell; none whose base is
    cut."""
    from lorabench.training.train import measure_alone

    if not settings.sweep.measure_solo or settings.sweep.dry_run:
        return
    from lorabench.results.cells import cells_with_timing

    store = Store(settings.sweep.dir)
    done = {r.run_id: r for r in store.records() if r.status == "completed"}
    alone = [job for job in jobs if job.run.run_id in done and job.run.trainer.strategy != "fsdp"]
    first = {cell_id(job.label): job for job in reversed(alone)}
    if first.keys() <= cells_with_timing(store.manifest(), done):
        store.leases.tidy("solo")  # one who died as all were measured is put out
        return
    with name_unwritable(store.leases.folder):
        lease = store.leases.wait("solo")
    with lease:  # two that measure at a time would measure each other
        timed = cells_with_timing(store.manifest(), done)
        found: dict[str, Any] = {}
        try:
            for name in [name for name in first if name not in timed]:
                found[name] = measure_alone(first[name].run, store)
                if len(found) == MEASURED_AT_ONCE:
                    _note_solo(store, found)
                    found = {}
        finally:
            _note_solo(store, found)


def _note_solo(store: Store, found: Mapping[str, Any]) -> None:
    """Put what was measured of cells alone into the manifest, by cell id."""
    if not found:
        return
    with store.locked():
        manifest = store.manifest()
        for cell in manifest["cells"]:
            if cell["id"] in found:
                cell["solo"] = found[cell["id"]]
        store.write_manifest(manifest)


def require_fresh(settings: Settings, swept: Collection[int] = ()) -> None:
    """Confirmation seeds must not have chosen the rate. swept: seeds of tuning runs, where an axis says them."""
    fresh = settings.sweep.confirm_seeds
    if shared := sorted({*settings.sweep.tune_seeds, *swept} & set(fresh)):
        raise ConfigError("sweep.confirm_seeds", fresh, f"fresh seeds: {shared} are tuning seeds too")
