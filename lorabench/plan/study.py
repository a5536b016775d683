"""A study before it runs, counted: its cells, comparisons and runs, and the hours they take on this machine."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lorabench.config.cells import cell_id
from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig, Settings
from lorabench.plan.pilot import Pace, evaluations, pace_of
from lorabench.results import formatting
from lorabench.results.formatting import Metric
from lorabench.results.reference import default_reference
from lorabench.results.sweep import cells_of
from lorabench.stats.power import MIN_SEEDS
from lorabench.store.records import Store
from lorabench.sweep.packs import Job, plan_packs
from lorabench.training import precision, preparation
from lorabench.training.batches import steps_per_epoch

FORWARD_SHARE = (
    0.5  # of a training step's time, with a frozen base: the backward pass of its activations is the other half
)
FORWARD_SHARE_OF_FULL = 1 / 3  # where the whole base trains, and the gradients of its weights are another pass


@dataclass(frozen=True)
class CellPlan:
    """One cell: a tuning run of it, the run_ids of all of them, and what it trains."""

    id: str
    run: RunConfig
    runs: frozenset[str]
    label: Mapping[str, Any]
    trainable: int

    @property
    def r(self) -> int | None:
        """The rank; None without an adapter."""
        rank: int | None = self.label.get("r")
        return rank


@dataclass(frozen=True)
class StudyPlan:
    """What an experiment asks for. Lengths are in the unit that reports show: points of accuracy, nats of a
    classifier's loss."""

    settings: Settings
    metric: Metric
    cells: tuple[CellPlan, ...]
    tuning: tuple[RunConfig, ...]  # each once, whatever the number of its cells

    @property
    def margin(self) -> float:
        return self.settings.study.margin * self.metric.scale

    @property
    def seeds(self) -> int:
        """Confirmation seeds as declared."""
        return len(self.settings.sweep.confirm_seeds)

    @property
    def comparisons(self) -> int:
        """The family: the declared cells, else every other one, with the one reference. What lists the same runs is no
        other."""
        family = self.settings.study.family
        return len(self.distinct) - 1 if family is None else len(family)

    @property
    def distinct(self) -> list[CellPlan]:
        """One cell for each set of runs: at r = 8, alpha = 16 and alpha = 2r are confirmed by the same run."""
        return list({cell.runs: cell for cell in reversed(self.cells)}.values())

    @property
    def adapters(self) -> list[CellPlan]:
        return [c for c in self.cells if c.r is not None]

    @property
    def reference(self) -> CellPlan:
        """The cell that others are compared with, as the report chooses it."""
        entries = [{"id": c.id, "label": {**c.label, "trainable": c.trainable}, "runs": {}} for c in self.cells]
        chosen = self.settings.study.reference or default_reference(cells_of({"cells": entries}, {})).id
        return next(c for c in self.cells if c.id == chosen)

    @cached_property
    def examples(self) -> dict[str, int]:
        """By split; of the run with most training data, where they differ."""
        return {
            name: len(rows) for name, rows in preparation.prepare(max(self.tuning, key=_data)).encoded.splits.items()
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of a run; of the longest, where they differ."""
        return max(
            preparation.total_steps(run, len(preparation.prepare(run).encoded.splits["train"])) for run in self.tuning
        )

    def runs(self, seeds: int) -> int:
        """Runs in all with so many confirmation seeds."""
        return len(self.tuning) + seeds * len(self.distinct)


@dataclass(frozen=True)
class Hours:
    """Training and evaluation, packs one after another."""

    tuning: float
    seed: float  # of all cells with one confirmation seed
    source: str

    def at(self, seeds: int) -> float:
        return self.tuning + seeds * self.seed


def count_study(jobs: Sequence[Job]) -> StudyPlan:
    """Raises `ConfigError` for an experiment that compares nothing or has no tuning."""
    settings = jobs[0].settings
    if settings.sweep.role != "tune":
        raise ConfigError("sweep.role", settings.sweep.role, "tune: a study tunes, then confirms")
    by_cell: dict[str, list[Job]] = {}
    for job in jobs:
        by_cell.setdefault(cell_id(job.label), []).append(job)
    runs = {frozenset(job.run.run_id for job in own) for own in by_cell.values()}
    if len(runs) < 2:
        raise ConfigError("experiment", settings.sweep.experiment, f"at least two cells to compare; it has {len(runs)}")
    task = jobs[0].run.task
    name = settings.study.metric or task.metric
    formatting.check_margin("study.margin", name, settings.study.margin)
    lower = name in task.lower_is_better
    unit = task.units.get(name, "")
    unique = {job.run.run_id: job.run for job in jobs}
    cells = tuple(_cell(name, own) for name, own in by_cell.items())
    return StudyPlan(settings, formatting.metric(name, lower_is_better=lower, unit=unit), cells, tuple(unique.values()))


def _data(run: RunConfig) -> float:
    """Training examples as asked for; null: all there are."""
    asked = run.task.train_examples
    return math.inf if asked is None else float(asked)


def _cell(name: str, jobs: Sequence[Job]) -> CellPlan:
    run, info = jobs[0].run, preparation.base_info(jobs[0].run)
    trainable = preparation.slice_plan(run, info).trainable(info)
    return CellPlan(name, run, frozenset(j.run.run_id for j in jobs), jobs[0].label, trainable)


def hours(study: StudyPlan, paces: Sequence[Pace], source: str, once: float = 0.0) -> Hours | None:
    """None where the pace of some method is not known. once: seconds that the study pays once, in its tuning."""
    if methods_without_pace(study, paces):
        return None
    sizes = {run_id: cell.trainable for cell in study.cells for run_id in cell.runs}
    tuning = sum(_seconds(run, sizes[run.run_id], paces, test=False) for run in study.tuning)
    seed = sum(_seconds(cell.run, cell.trainable, paces, test=True) for cell in study.distinct)
    fresh = [
        replace(c.run, seed=s, role="confirm")
        for c in study.distinct
        for s in study.settings.sweep.confirm_seeds or [0]
    ]
    side_by_side = [3600 * _devices(study, runs) for runs in (study.tuning, fresh)]
    return Hours(tuning / side_by_side[0] + once / 3600, seed / side_by_side[1], source)


def methods_without_pace(study: StudyPlan, paces: Sequence[Pace]) -> list[str]:
    """Methods whose pace is not known."""
    return sorted({c.run.method.name for c in study.cells if pace_of(paces, c.run.method.name, c.trainable) is None})


def _seconds(run: RunConfig, trainable: int, paces: Sequence[Pace], *, test: bool) -> float:
    pace = pace_of(paces, run.method.name, trainable)
    assert pace is not None
    lengths, t = preparation.prepare(run).encoded.lengths, run.trainer
    size = {name: sum(n) if pace.unit == "tokens" else len(n) for name, n in lengths.items()}
    steps = preparation.total_steps(run, len(lengths["train"]))
    epochs = steps / steps_per_epoch(len(lengths["train"]), t.batch_size, t.accumulate_grad_batches)
    seen = evaluations(steps, t.eval_interval) * size["val"] + (size["test"] if test else 0)
    more = pace.beside if test and has_auxiliary_measures(run.to_dict()) else 0.0
    return epochs * size["train"] * pace.train + seen * pace.evaluate + more


def has_auxiliary_measures(config: Mapping[str, Any]) -> bool:
    """Whether a run of this config, once confirmed, measures forgetting or tone, which takes time of its own."""
    task = config.get("task", {})
    return bool(task.get("probe") or task.get("style_prompts"))


def _devices(study: StudyPlan, runs: Sequence[RunConfig]) -> int:
    """Packs of these runs that train side by side on devices of their own, never more than there are packs. Workers on
    one CPU share its cores: no gain is counted."""
    from lorabench.sweep.workers import worker_count

    sweep, device = study.settings.sweep, precision.resolve(study.tuning[0]).device
    if device != "cuda":
        return 1
    prune = sweep.prune and runs[0].role == "tune"
    return worker_count(sweep.workers, device, len(plan_packs(runs, sweep.max_pack, prune=prune)))


def measure_paces(study: StudyPlan) -> tuple[list[Pace], float]:
    """A few training steps of the cells that train the least and the most, alone, of every kind of method (those that
    share a pack); evaluation by its share of a step. And the seconds of what is computed once: the frozen trunk's pass
    over the data.

    One kind's pace says nothing of another's, however alike they are in parameters: a head needs no backward pass
    through the base, and with the trunk kept hardly a forward one; DoRA computes norms that LoRA does not.
    """
    from lorabench.training.train import measure_alone

    kinds: dict[str | None, list[CellPlan]] = {}
    for cell in sorted(study.cells, key=lambda c: c.trainable):
        kinds.setdefault(cell.run.method.pack_group, []).append(cell)
    paces: list[Pace] = []
    trunk = 0.0
    for cells in kinds.values():
        names = sorted({c.run.method.name for c in cells})
        for cell in {c.id: c for c in (cells[0], cells[-1])}.values():
            with tempfile.TemporaryDirectory() as folder:  # what training writes is of no use here
                found: dict[str, Any] = measure_alone(cell.run, Store(folder))
            t, tokens = cell.run.trainer, found["tokens"]
            # a task without an attention mask counts no tokens: examples stand for them
            train = found["seconds"] / (tokens or found["steps"] * t.batch_size * t.accumulate_grad_batches)
            unit = "tokens" if tokens else "examples"
            forward = FORWARD_SHARE_OF_FULL if cell.run.method.pack_group is None else FORWARD_SHARE
            paces += [Pace(name, cell.trainable, train, train * forward, unit) for name in names]
            trunk = max(trunk, found["trunk_seconds"])
    sizes = study.examples
    return paces, trunk * sum(sizes.values()) / sizes["train"] if trunk else 0.0


def cautions(study: StudyPlan) -> Iterator[str]:
    """What stands in the way of a verdict, or changes the hours."""
    sweep = study.settings.sweep
    if not sweep.confirm_seeds:
        yield "The study declares no confirmation seeds: it tunes, and compares nothing."
    elif study.seeds < MIN_SEEDS:
        yield f"{formatting.plural(study.seeds, 'confirmation seed')}: no verdict, that takes {MIN_SEEDS}."
    if sweep.extend_lr:
        yield "sweep.extend_lr may add rates where the best lies at an end of the grid; runs and hours are without them."
    if sweep.prune:
        yield "sweep.prune shortens the tuning; hours are without it."


def facts(study: StudyPlan) -> dict[str, Any]:
    """Counts of the study as declared."""
    declared, metric = study.settings.study, study.metric
    return {
        "question": declared.question,
        "metric": metric.name,
        "unit": metric.points or metric.unit,
        "margin": study.margin,
        "cells": [c.id for c in study.cells],
        "reference": study.reference.id,
        "comparisons": study.comparisons,
        "examples": study.examples,
        "steps": study.steps,
        "rates": sorted({run.optimizer.lr for run in study.tuning}),
        "tuning_runs": len(study.tuning),
        "tuning_seeds": sorted({run.seed for run in study.tuning}),
        "confirmation_seeds": list(study.settings.sweep.confirm_seeds),
        "runs_a_confirmation_seed": len(study.distinct),
        "runs": study.runs(study.seeds),
    }
