"""What a command would do (`sweep.dry_run=true`): the runs it would train, in which packs, and those that are there
already."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lorabench.config.contracts.method import SlicePlan
from lorabench.config.runs import Pack, Settings
from lorabench.results.formatting import plural
from lorabench.runtime.terminal import plain
from lorabench.store.integrity import damaged_files
from lorabench.store.records import Store
from lorabench.sweep import declaration
from lorabench.sweep.memory import estimate_pack, shortages
from lorabench.sweep.packs import Job, known_and_new_packs, new_manifest
from lorabench.sweep.resume import finished_records
from lorabench.sweep.reuse import preview_copy
from lorabench.training import precision, preparation
from lorabench.training.pruning import cell_key


def dry_run(store: Store, jobs: Sequence[Job], plans: Mapping[str, SlicePlan], console: Console) -> None:
    """Print what a command would do. No weights are loaded and nothing is written. Raises what the command itself
    would."""
    jobs, settings = list({j.run.run_id: j for j in jobs}.values()), jobs[0].settings
    declaration.check_standing(store, jobs)
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
        sizes = [estimate_pack(pack.runs, [plans[i] for i in pack.run_ids], auto) for pack in packs]
        console.print(table(packs, sizes, jobs, plans, title=title))
        for line in shortages(packs, sizes, precision.resolve(packs[0].runs[0], auto).device):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    else:
        console.print(f"dry run: {store.root}: nothing to train; nothing was written", soft_wrap=True)
    lines = [plural(len(finished), "run") + f" finished in {store.root}"] if finished else []
    for line in (*lines, *brought.lines):
        console.print(line, soft_wrap=True)


def confirmation_line(jobs: Sequence[Job], settings: Settings, words: Sequence[str]) -> str:
    """Return what follows the tuning runs of a sweep: its confirmation runs, which no rate has been chosen for yet.

    jobs: all tuning runs. words: of the command line, for `plan`.
    """
    seeds, tuning = len(settings.sweep.confirm_seeds), len({job.run.run_id for job in jobs})
    cells = len({cell_key(job.run) for job in jobs})  # a run that two cells share is confirmed once
    then = (
        f"then {plural(seeds * cells, 'confirmation run')} at the rates that tuning chooses "
        f"({plural(cells, 'cell')} x {plural(seeds, 'seed')}): {plural(tuning + seeds * cells, 'run')} in all"
    )
    store = Store(settings.sweep.dir)
    listed = {i for cell in store.manifest().get("cells", ()) for i in cell["runs"].get("confirm", ())}
    done = sum((store.run_dir(i) / "run.json").is_file() for i in listed)
    then += f", {done} of these have ended" if done else ""
    kept = [word for word in words if word != "-m" and word.partition("=")[0] != "sweep.dry_run"]
    return f"{then if seeds else plural(tuning, 'run') + ' in all, none to confirm'}; hours: " + shlex.join(
        ["python", "-m", "lorabench.plan", *kept]
    )


def table(
    packs: Sequence[Pack], sizes: Sequence[int], jobs: Sequence[Job], plans: Mapping[str, SlicePlan], *, title: str
) -> Table:
    """Return a table of runs, packs, trainable parameters and memory. sizes: bytes that each pack is estimated to
    need."""
    made = Table(title=title, caption="memory: an estimate, at the longest examples; nothing was written")
    for name in ("run", "cell", "lr", "seed", "trainable"):
        made.add_column(name, justify="left" if name in ("run", "cell") else "right", no_wrap=name != "cell")
    labels = {j.run.run_id: j.label for j in jobs}
    for pack, size in zip(packs, sizes, strict=True):
        first, info = pack.runs[0], preparation.base_info(pack.runs[0])
        steps = preparation.total_steps(first, len(preparation.prepare(first).encoded.splits["train"]))
        told = f"{first.role}, {plural(steps, 'step')}, {size / 2**30:.1f} GiB"
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


def _cell_name(label: Mapping[str, Any]) -> str:
    parts = [str(label["method"])] + [
        f"{k}={label[v]}" for k, v in (("r", "r"), ("alpha", "alpha_rule")) if label.get(v)
    ]
    parts += [str(label["targets"])] * bool(label.get("r"))
    return " ".join(parts + [f"{key.rpartition('.')[2]}={value}" for key, value in sorted(label["extra"].items())])
