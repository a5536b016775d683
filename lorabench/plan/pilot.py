"""What a finished sweep says about the next one: how far seeds scatter, and how long a token takes. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np

from lorabench.config.errors import ConfigError
from lorabench.results import scores
from lorabench.results.cells import cell_results, unique_results
from lorabench.results.scores import Sample
from lorabench.results.sweep import Sweep
from lorabench.stats import estimates
from lorabench.store.records import Record

MIN_BARTLETT_P = 0.01  # p of equal seed variances below which one SD for all cells is read with care


@dataclass(frozen=True)
class Noise:
    """Scatter of a difference of two cells, in the metric's own unit (accuracy: a share, not points)."""

    sd: float  # of one seed's difference
    df: float  # of that estimate
    example_sd: float  # of one test example's difference, its mean over seeds; 0 where nothing is known of examples
    cells: int
    seeds: int
    alike: bool  # whether the cells' seed variances may be one (Bartlett at 1 %)


@dataclass(frozen=True)
class Pace:
    """Seconds a token (or an example, of tasks without tokens) of one cell. trainable: its trained parameters."""

    method: str  # the config's method.name
    trainable: int
    train: float
    evaluate: float
    unit: str = "tokens"
    beside: float = 0.0  # seconds of a confirmation run for what is measured beside the test: probe, replies, samples


def noise(sweep: Sweep, *, examples: int) -> Noise:
    """Seed and example scatter of a sweep's confirmed adapters, as it would be over so many test examples.

    One seed's score varies through the seed and through its own luck with the N examples, sd^2 = seed + interaction /
    N: the second part is carried over to the new N. Raises `ConfigError` where fewer than two adapters share two seeds.
    """
    samples = _samples_with_one_set_of_seeds(sweep)
    seeds = samples[0].seeds if samples else ()
    if len(samples) < 2 or len(seeds) < 2:
        raise ConfigError(
            "--pilot",
            str(sweep.store.root),
            "a sweep with two adapters or more, confirmed with the same two seeds or more",
        )
    pooled = estimates.pool(np.stack([s.scores for s in samples]))
    variance, example, interaction, own = pooled.difference, 0.0, 0.0, None
    tables = [d for a, b in combinations(samples, 2) if (d := scores.difference(a, b)) and d.examples is not None]
    if tables and tables[0].examples is not None:
        own = len(tables[0].examples)
        parts = [d.estimate() for d in tables]
        example = max(0.0, median(e.example - e.interaction for e in parts)) * own
        interaction = median(e.interaction for e in parts) * own * len(seeds)
        variance = max(0.0, variance - interaction / own) + interaction / examples
    if not variance:
        raise ConfigError("--pilot", str(sweep.store.root), "a sweep whose seeds differ; all of these score the same")
    alike = pooled.p >= MIN_BARTLETT_P
    return Noise(math.sqrt(variance), pooled.df, math.sqrt(example), len(samples), len(seeds), alike)


def _samples_with_one_set_of_seeds(sweep: Sweep) -> list[Sample]:
    """Test results of the adapters that were confirmed with the commonest set of seeds, a set of runs once."""
    adapters = unique_results([r for r in cell_results(sweep).by_cell.values() if r.cell.adapter])
    samples = [r.sample for r in adapters if r.sample]
    sets = [s.seeds for s in samples]
    most = max(sorted(set(sets)), key=sets.count, default=())
    return [s for s in samples if s.seeds == most]


def paces(sweep: Sweep) -> list[Pace]:
    """One pace a cell: the median over its completed runs, each run's share of its pack's seconds."""
    made = []
    for cell in sweep.cells:
        runs = sweep.completed_records((*cell.tune, *cell.confirm))
        found = [p for r in runs if (p := _pace(r)) is not None]
        if found:
            train, evaluate = median(p.train for p in found), median(p.evaluate for p in found)
            took = [r.resources["beside_seconds"] for r in runs if r.resources.get("beside_seconds") is not None]
            beside = median(took) if took else 0.0
            made.append(Pace(found[0].method, found[0].trainable, train, evaluate, found[0].unit, beside))
    return made


def _pace(record: Record) -> Pace | None:
    r = record.resources
    unit = "tokens" if r.get("tokens") else "examples"
    if not all(r.get(key) for key in (unit, "examples", "train_seconds", "steps")):
        return None
    interval = record.config.get("trainer", {}).get("eval_interval")
    seen = evaluations(int(r["steps"]), interval) * (r.get("val_examples") or 0)
    seen += (r.get("test_examples") or 0) if record.role == "confirm" else 0
    units = seen * r[unit] / r["examples"]  # examples of evaluation are as long as those of training
    evaluate = (r.get("eval_seconds") or 0.0) / units if units else 0.0
    trainable = int(r.get("trainable_parameters") or 1)
    return Pace(str(record.config["method"]["name"]), trainable, r["train_seconds"] / r[unit], evaluate, unit)


def evaluations(steps: int, interval: int | None) -> int:
    """Evaluations of a run: every `interval` steps (None: five a run) and at its end."""
    return math.ceil(steps / (interval or max(1, math.ceil(steps / 5))))


def pace_of(known: Sequence[Pace], method: str, trainable: int) -> Pace | None:
    """The pace of a cell: between those of its method by the logarithm of trained parameters, the nearest beyond them.

    None where no pace of its method is known.
    """
    own = sorted((p for p in known if p.method == method), key=lambda p: p.trainable)
    if not own:
        return None
    sizes, at = [math.log(max(1, p.trainable)) for p in own], math.log(max(1, trainable))
    train, evaluate, beside = (
        float(np.interp(at, sizes, values))
        for values in zip(*((p.train, p.evaluate, p.beside) for p in own), strict=True)
    )
    return Pace(method, trainable, train, evaluate, own[0].unit, beside)
