"""What would pruning have cost? Replays the rule of `sweep.prune` on the records of sweeps that trained every rate to its end.

    python benchmarks/pruning.py sweeps/prune_grid [more sweeps] [--by cell|seed|both] [--json FILE]

A slice's numbers do not depend on its pack-mates, so a rate that goes on ends where the exhaustive sweep says: a replay
is exact. Two kinds of trial: a cell over all its tuning seeds (what a sweep with these seeds does), and a cell with each
tuning seed alone (more trials, of sweeps with one seed). Cells that are never pruned (fewer than four rates, full
fine-tuning, no eligible rate) are left out: they agree by construction.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

from lorabench.config.runs import RunConfig
from lorabench.results.selection import Choice, choose
from lorabench.runtime.files import atomic_write
from lorabench.store.records import Record, Store, dump_json
from lorabench.training.pruning import MIN_RATES, cell_key, is_prunable, slices_to_prune


@dataclass(frozen=True)
class Run:
    """A tuning run of an exhaustive sweep, with its whole history of validation losses (NaN: not finite)."""

    record: Record
    losses: Mapping[int, float]  # by step
    steps: int  # it took

    @property
    def lr(self) -> float:
        return float(self.record.config["optimizer"]["lr"])

    def kept(self, step: int) -> float:
        """The loss its record would carry if training had ended at `step`."""
        seen = [x for s, x in sorted(self.losses.items()) if s <= step]
        if not seen or not math.isfinite(seen[-1]):
            return math.nan
        return seen[-1] if self.record.config["trainer"]["keep"] == "last" else min(seen)

    def alive(self, step: int) -> bool:
        """Whether it is in the race: a run that stopped early is, one without a loss at `step` had diverged."""
        return self.record.status == "completed" or math.isfinite(self.losses.get(step, math.nan))


@dataclass(frozen=True)
class Trial:
    """One cell with some of its seeds, searched exhaustively and with pruning."""

    sweep: str
    cell: str
    seeds: tuple[int, ...]
    rates: int
    exhaustive: float  # the rate chosen
    chosen: float | None  # with pruning; None: no rate is left to choose
    regret: float | None  # final mean validation loss at `chosen` minus that at `exhaustive`
    uncovered: bool  # the chosen rate has nothing but pruned rates on one side: the report warns
    steps: int  # of all runs, exhaustively
    spared: int
    pruned_at: Mapping[str, int]  # rate -> step

    @property
    def agrees(self) -> bool:
        return self.chosen == self.exhaustive


def replay(runs: Sequence[Run], total: int) -> dict[str, int]:
    """The runs of one cell that pruning would have dropped, and the step of each, by run_id."""
    gone: dict[str, int] = {}
    for step in sorted({s for r in runs for s in r.losses}):
        found = slices_to_prune(
            [r.lr for r in runs], [r.kept(step) for r in runs],
            [r.record.run_id not in gone and r.alive(step) for r in runs], step=step, total=total, groups=[""] * len(runs),
        )  # fmt: skip
        gone |= {runs[k].record.run_id: step for k in found if runs[k].steps > step}
    return gone


def trial(sweep: str, cell: str, runs: Sequence[Run]) -> Trial | None:
    """None where exhaustive search finds no eligible rate."""
    steps = max(int(r.record.resources.get("steps") or 0) for r in runs)
    gone = replay(runs, runs[0].record.config["trainer"]["max_steps"] or steps)
    full, short = _choice([r.record for r in runs]), _choice([_as_pruned(r.record, gone) for r in runs])
    if full.lr is None:
        return None
    at = next((r.mean for r in full.rates if r.lr == short.lr), None)
    return Trial(
        sweep, cell, tuple(sorted({int(r.record.config["seed"]) for r in runs})), len(full.rates), full.lr, short.lr,
        None if at is None else at - full.loss, bool(short.beyond), sum(r.steps for r in runs),
        sum(r.steps - gone[r.record.run_id] for r in runs if r.record.run_id in gone),
        {f"{r.lr:g}": gone[r.record.run_id] for r in runs if r.record.run_id in gone},
    )  # fmt: skip


def _choice(records: Sequence[Record]) -> Choice:
    cell = {"id": "", "runs": {"tune": [r.run_id for r in records]}}
    return choose({"cells": [cell]}, {r.run_id: r for r in records})[""]


def _as_pruned(record: Record, gone: Mapping[str, int]) -> Record:
    step = gone.get(record.run_id)
    if step is None:
        return record
    return replace(record, status="pruned", metrics=record.metrics | {"pruned_step": step})


def cells(store: Store) -> Iterator[tuple[str, list[Run]]]:
    """The cells of a sweep that pruning can touch, by the name the manifest has for them. Raises `ValueError`."""
    manifest = store.manifest()
    groups: dict[str, list[Run]] = {}
    names: dict[str, str] = {}
    for entry in manifest.get("cells", ()):
        for run_id in entry["runs"]["tune"]:
            record = store.read(run_id)
            if record is None or record.status == "pruned":
                raise ValueError(
                    f"{store.root}: run {run_id} has not been trained to its end; an exhaustive sweep is needed"
                )
            key = cell_key(RunConfig.from_dict(record.config))
            names.setdefault(key, entry["id"])
            held = groups.setdefault(key, [])
            if all(r.record.run_id != run_id for r in held):  # a run may stand in two cells
                held.append(_run(store, record))
    for key, runs in groups.items():
        configs = [RunConfig.from_dict(r.record.config) for r in runs]
        if is_prunable(configs) and configs[0].method.pack_group is not None:
            yield names[key], runs


def _run(store: Store, record: Record) -> Run:
    history = store.history(record.run_id)
    losses = {
        row["step"]: math.nan if row["val/loss"] is None else row["val/loss"] for row in history if "val/loss" in row
    }
    run = Run(record, losses, max((row["step"] for row in history), default=0))
    if record.status == "completed" and not math.isclose(run.kept(run.steps), record.metrics["val/loss"], rel_tol=1e-9):
        raise ValueError(
            f"{store.root}: the history of run {record.run_id} does not lead to its recorded validation loss"
        )
    return run


def trials(sweep_dirs: Sequence[Path], *, by: str) -> list[Trial]:
    """by: `cell`, all tuning seeds of a cell at once, or `seed`, each of them alone."""
    found = []
    for folder in sweep_dirs:
        store = Store(folder)
        name = str(store.manifest().get("name") or folder.resolve().name)
        for cell, runs in cells(store):
            seeds = sorted({r.record.config["seed"] for r in runs})
            parts = [runs] if by == "cell" else [[r for r in runs if r.record.config["seed"] == s] for s in seeds]
            found += [t for part in parts if len({r.lr for r in part}) >= MIN_RATES and (t := trial(name, cell, part))]
    return found


def summary(found: Sequence[Trial]) -> dict[str, Any]:
    """Agreement with its Wilson 95 % interval (E. B. Wilson 1927), regret where the rates differ, steps spared."""
    agree = sum(t.agrees for t in found)
    ci = binomtest(agree, len(found)).proportion_ci(0.95, method="wilson")
    regrets = [t.regret for t in found if not t.agrees and t.regret is not None]
    return {
        "trials": len(found), "agree": agree, "agreement": agree / len(found), "wilson_95": [float(ci.low), float(ci.high)],
        "regret_mean": fmean(regrets) if regrets else None, "regret_max": max(regrets, default=None),
        "none_left": sum(t.chosen is None for t in found), "uncovered": sum(t.uncovered for t in found),
        "steps": sum(t.steps for t in found), "spared": sum(t.spared for t in found) / sum(t.steps for t in found),
    }  # fmt: skip


WHAT = {"cell": "a cell with all its tuning seeds", "seed": "a cell with one tuning seed"}


def text(by: str, found: Sequence[Trial]) -> str:
    s = summary(found)
    low, high = s["wilson_95"]
    sizes = ", ".join(f"{n} with {rates} rates" for rates, n in sorted(Counter(t.rates for t in found).items()))
    lines = [
        f"{WHAT[by]}: {s['trials']} trials ({sizes})",
        f"  chosen rate as in exhaustive search: {s['agree']} of {s['trials']} = {s['agreement']:.1%}, Wilson 95 % {low:.1%} to {high:.1%}",
        f"  steps spared: {s['spared']:.1%} of {s['steps']:,}; chosen rate with only pruned rates on one side (the report warns): {s['uncovered']}",
    ]
    if s["regret_mean"] is not None:
        lines.append(
            f"  where the rates differ, validation loss is higher by {s['regret_mean']:.4f} (mean), {s['regret_max']:.4f} (most)"
        )
    for t in found:
        if not t.agrees:
            seeds = ", ".join(map(str, t.seeds))
            lost = "" if t.regret is None else f", loss +{t.regret:.4f}"
            lines.append(f"    {t.sweep} {t.cell} (seeds {seeds}): {t.chosen} for {t.exhaustive}{lost}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="benchmarks/pruning.py")
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="sweep_dir")
    parser.add_argument("--by", choices=("cell", "seed", "both"), default="both", help="what one trial is")
    parser.add_argument("--json", type=Path, help="write summaries and trials here too")
    args = parser.parse_args(argv)
    try:
        made = {by: trials(args.sweeps, by=by) for by in (("cell", "seed") if args.by == "both" else (args.by,))}
        if not all(made.values()):
            raise ValueError(f"no cell of {MIN_RATES} rates or more that pruning could touch")
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e
    for by, found in made.items():
        print(text(by, found))
    print("Trials share data (and, by seed, cells): the interval takes them as independent and is too narrow for that.")
    if args.json:
        out = {
            by: {**summary(found), "list": [asdict(t) | {"agrees": t.agrees} for t in found]}
            for by, found in made.items()
        }
        atomic_write(args.json, dump_json(out))


if __name__ == "__main__":
    main()
