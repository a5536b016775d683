"""What a command would do (`sweep.dry_run=true`): the runs it would train, in which packs, and those that are there
already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lorabench.config.contracts.method import SlicePlan
from lorabench.config.runs import Pack
from lorabench.results.formatting import plural
from lorabench.runtime.terminal import plain
from lorabench.store.integrity import damaged_files
from lorabench.store.records import Store
from lorabench.sweep import declaration
from lorabench.sweep.memory import estimate_peak
from lorabench.sweep.packs import Job, known_and_new_packs, new_manifest
from lorabench.sweep.resume import finished_records
from lorabench.sweep.reuse import preview_copy
from lorabench.training import precision, preparation


def dry_run(store: Store, jobs: Sequence[Job], plans: Mapping[str, SlicePlan], console: Console) -> None:
    """Print what a command would do. No weights are loaded and nothing is written. Raises what the command itself
    would."""
    jobs, settings = list({j.run.run_id: j for j in jobs}.values()), jobs[0].settings
    declaration.check_unchanged(store.manifest(), settings.study, store.root)
    runs = [job.run for job in jobs]
    torn = damaged_files(store, [run.run_id for run in runs])
    finished = finished_records(store, settings, [run for run in runs if run.run_id not in torn])
    brought = preview_copy(store, runs, settings.sweep.reuse)
    auto = brought.precision or precision.noted_precision(store)
    known, fresh = known_and_new_packs(
        new_manifest(jobs[0]) | store.manifest(), jobs, auto, lambda run: run.run_id in brought.run_ids
    )
    todo = {run.run_id for run in runs} - finished.keys() - brought.run_ids
    left = [Pack(p.id, tuple(r for r in p.runs if r.run_id in todo)) for p in (*known, *fresh)]
    packs = [pack for pack in left if pack.runs]
    count = f"{len(todo)} of {len(runs)} runs to train," if len(todo) < len(runs) else plural(len(runs), "run")
    if packs:
        title = f"dry run: {count} in {plural(len(packs), 'pack')}"
        console.print(table(packs, jobs, plans, auto, title=title))
    else:
        console.print(f"dry run: {store.root}: nothing to train; nothing was written", soft_wrap=True)
    lines = [plural(len(finished), "run") + f" finished in {store.root}"] if finished else []
    for line in (*lines, *brought.lines):
        console.print(line, soft_wrap=True)


def table(
    packs: Sequence[Pack], jobs: Sequence[Job], plans: Mapping[str, SlicePlan], auto: str | None, *, title: str
) -> Table:
    """Return a table of runs, packs, trainable parameters and estimated memory. auto: as in `precision.resolve`."""
    made = Table(title=title, caption="memory: an estimate, at full-length batches; nothing was written")
    for name in ("run", "cell", "lr", "seed", "trainable"):
        made.add_column(name, justify="left" if name in ("run", "cell") else "right", no_wrap=name != "cell")
    labels = {j.run.run_id: j.label for j in jobs}
    for pack in packs:
        first, info = pack.runs[0], preparation.base_info(pack.runs[0])
        size = _estimate(pack, plans, auto)
        steps = preparation.total_steps(first, len(preparation.prepare(first).encoded.splits["train"]))
        told = f"{first.role}, {steps} steps, {size / 2**30:.1f} GiB"
        made.add_row(plain(pack.id, "bold"), plain(told, "bold"))
        for run in pack.runs:
            name = _cell_name(labels[run.run_id])
            made.add_row(
                run.run_id,
                plain(name),
                f"{run.optimizer.lr:g}",
                str(run.seed),
                f"{plans[run.run_id].trainable(info):,}",
            )
        made.add_section()
    return made


def _estimate(pack: Pack, plans: Mapping[str, SlicePlan], auto: str | None) -> int:
    first = pack.runs[0]
    resolved, chosen = precision.resolve(first, auto), [plans[i] for i in pack.run_ids]
    return estimate_peak(
        preparation.base_info(first),
        chosen,
        first,
        dtype=resolved.base_dtype,
        device=resolved.device,
        part_tokens=resolved.part_tokens,
    )


def _cell_name(label: Mapping[str, Any]) -> str:
    parts = [str(label["method"])] + [
        f"{k}={label[v]}" for k, v in (("r", "r"), ("alpha", "alpha_rule")) if label.get(v)
    ]
    parts += [str(label["targets"])] * bool(label.get("r"))
    return " ".join(parts + [f"{key.rpartition('.')[2]}={value}" for key, value in sorted(label["extra"].items())])
