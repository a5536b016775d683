"""What training cost the base on other data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from lorabench.config.method_names import FULL
from lorabench.results import formatting, units
from lorabench.results.cells import Result
from lorabench.results.evidence import Evidence
from lorabench.results.findings import Findings
from lorabench.results.formatting import Metric
from lorabench.stats import estimates
from lorabench.stats.estimates import Estimate, welch
from lorabench.store.records import Record

NOT_OF_TRAINED_MODEL = ("before", "examples")  # last parts of names that hold no number of the trained model


BEFORE, AFTER = "probe/before/", "probe/after/"  # the base's own value: no run's forgetting


LOSS_NAMES = ("loss", "perplexity", "forgetting")  # probes for which less is better, by the last part of their name


def probe_key(e: Evidence) -> str | None:
    """The probe most runs have; of several a loss, then the first by name."""
    found = [
        k
        for r in e.cells
        for x in r.runs
        for k, v in x.metrics.items()
        if k.startswith("probe/") and isinstance(v, (int, float)) and not _is_not_of_trained_model(k)
    ]
    return min(set(found), key=lambda k: (-found.count(k), not less_is_better(k), k), default=None)


def _is_not_of_trained_model(key: str) -> bool:
    return key.startswith(BEFORE) or key.rpartition("/")[2] in NOT_OF_TRAINED_MODEL


def less_is_better(probe: str) -> bool:
    return probe.rsplit("/", 1)[-1] in LOSS_NAMES


def before_key(probe: str) -> str:
    """The name of the base's own value. Each run has its own: full fine-tuning computes in other types than adapters
    do."""
    return BEFORE + probe.removeprefix(AFTER) if probe.startswith(AFTER) else f"{probe.rpartition('/')[0]}/before"


def changes(cells: Sequence[Result], probe: str) -> tuple[dict[str, float], bool]:
    """By run_id the probe after minus before training, and True; where some run lacks the value before, after alone."""
    before = before_key(probe)
    runs = {x.run_id: x.metrics for r in cells for x in r.runs if x.metrics.get(probe) is not None}
    known = all(m.get(before) is not None for m in runs.values())
    return {i: float(m[probe]) - (float(m[before]) if known else 0.0) for i, m in runs.items()}, known


def probe_metric(cells: Iterable[Result], probe: str) -> Metric:
    """The way to show a probe: by the last part of its name, in the unit that its task names."""
    measure = probe.rpartition("/")[2]
    said = {units.task_units(x.config.get("task", {}).get("probe")).get(measure, "") for r in cells for x in r.runs}
    return formatting.metric(measure, lower_is_better=less_is_better(probe), unit=said.pop() if len(said) == 1 else "")


How = Literal["rates", "evaluations"]


Path = tuple[tuple[float, float], ...]  # (target on validation, change of the probe), from little training to much


@dataclass(frozen=True)
class Probe:
    """One probed metric. Without a value before training its value after it stands in for the change."""

    key: str  # of the value after training
    name: str
    less: bool  # less is better
    metric: Metric
    before: str | None

    @property
    def what(self) -> str:
        return f"change of {self.said}" if self.before else f"{self.said} after training"

    @property
    def said(self) -> str:
        return f"{self.name} {self.metric.title}"

    def change(self, values: Mapping[str, Any]) -> float | None:
        """After − before, in the metric's own unit; None where either is missing."""
        after = values.get(self.key)
        before = values.get(self.before) if self.before else 0.0
        return None if after is None or before is None else float(after) - float(before)


@dataclass(frozen=True)
class CellForgetting:
    """One cell: its probe before and after (means over runs), the change, and the paths of its seeds."""

    result: Result
    before: float | None
    after: float
    change: Estimate
    paths: tuple[Path, ...]
    matched: Estimate | None  # the change where the target metric passes the matched value


@dataclass(frozen=True)
class Forgetting:
    probe: Probe
    cells: tuple[CellForgetting, ...]
    how: How | None  # along what cells are matched; None where their runs do not allow it
    value: float | None  # of the target metric on validation


def find_forgetting(f: Findings, e: Evidence) -> Forgetting | None:
    """None where no run behind a cell's numbers has a probe."""
    probe = _probe(f, e)
    if probe is None:
        return None
    have = [(r, [c for x in r.runs if (c := probe.change(x.metrics)) is not None]) for r in f.results.values()]
    have = [(r, changes) for r, changes in have if changes]
    if not have:
        return None
    how, paths = _paths(f, probe, [r for r, _ in have])
    value = _matched_value(f, [(r, paths[r.id]) for r, _ in have])
    cells = [
        CellForgetting(
            r,
            _mean(r.runs, probe.before),
            _mean(r.runs, probe.key) or 0.0,
            estimates.mean_over_seeds(changes),
            paths[r.id],
            None if value is None else _mean_change_at(f, paths[r.id], value),
        )
        for r, changes in have
    ]
    known = sum(c.matched is not None for c in cells) > 1
    return Forgetting(probe, tuple(cells), how if known else None, value if known else None)


def _probe(f: Findings, e: Evidence) -> Probe | None:
    key = probe_key(e)
    if key is None:
        return None
    runs = [x for r in f.results.values() for x in r.runs]
    owner = key.rpartition("/")[0]
    before = before_key(key)
    named = {str(x.metrics["probe/name"]) for x in runs if x.metrics.get("probe/name")}
    if not key.startswith(AFTER) and owner.count("/") == 1:
        named = {owner.removeprefix("probe/")}
    name = f"{named.pop()}'s" if len(named) == 1 else "the probe's"
    known = any(x.metrics.get(before) is not None for x in runs)
    metric = probe_metric(f.results.values(), key)
    return Probe(key, name, metric.lower_is_better, metric, before if known else None)


def _mean(runs: Iterable[Record], key: str | None) -> float | None:
    found = [float(x.metrics[key]) for x in runs if key and x.metrics.get(key) is not None]
    return sum(found) / len(found) if found else None


# -- at one value of the target metric -------------------------------------------------------------------------------


def _paths(f: Findings, probe: Probe, cells: Sequence[Result]) -> tuple[How, dict[str, tuple[Path, ...]]]:
    """Each seed's path: along its evaluations where histories have the probe, else along its tuning rates."""
    steps = {r.id: _paths_over_evaluations(f, probe, r) for r in cells}
    if any(steps.values()):
        return "evaluations", steps
    return "rates", {r.id: _paths_over_rates(f, probe, r) for r in cells}


def _paths_over_evaluations(f: Findings, probe: Probe, r: Result) -> tuple[Path, ...]:
    target = f"val/{f.sweep.metric}"
    out = []
    for x in r.runs:
        base = {probe.before: x.metrics.get(probe.before)} if probe.before else {}
        rows = [
            (row["step"], row.get(target), probe.change({**base, **row})) for row in f.sweep.store.history(x.run_id)
        ]
        out.append(tuple((t, c) for _, t, c in sorted(rows, key=lambda row: row[0]) if t is not None and c is not None))
    return tuple(p for p in out if len(p) > 1)


def _paths_over_rates(f: Findings, probe: Probe, r: Result) -> tuple[Path, ...]:
    """From the smallest rate up to the best one: beyond it runs learn less again, in another way."""
    target = f"val/{f.sweep.metric}"
    seeds: dict[int, list[tuple[float, float, float]]] = {}
    for x in f.sweep.completed_records(r.cell.tune):
        lr, t, c = float(x.config["optimizer"]["lr"]), x.metrics.get(target), probe.change(x.metrics)
        if t is not None and c is not None and r.choice.lr is not None and lr <= r.choice.lr:
            seeds.setdefault(x.config["seed"], []).append((lr, float(t), c))
    return tuple(tuple((t, c) for _, t, c in sorted(rows)) for _, rows in sorted(seeds.items()) if len(rows) > 1)


def _matched_value(f: Findings, cells: Sequence[tuple[Result, tuple[Path, ...]]]) -> float | None:
    """A value that adapters and full fine-tuning pass with every seed. Of those that some cell just reaches: one that
    full fine-tuning passes too, then what most cells pass, then the best."""
    sign = _sign(f)
    judged = [(r, paths) for r, paths in cells if paths and (r.cell.adapter or r.cell.method == FULL)]
    reached = [sign * min(max(sign * t for t, _ in path) for path in paths) for _, paths in judged]

    def worth(value: float) -> tuple[bool, int, float]:
        passed = [r for r, paths in judged if _mean_change_at(f, paths, value) is not None]
        return len(passed) > 1 and any(r.cell.method == FULL for r in passed), len(passed), sign * value

    return max(reached, key=worth, default=None)


def _sign(f: Findings) -> float:
    return -1.0 if f.metric.lower_is_better else 1.0


def _mean_change_at(f: Findings, paths: Sequence[Path], value: float) -> Estimate | None:
    """Mean over seeds of the change where each first passes the value; None where one of them does not."""
    found = [change_at(path, value, _sign(f)) for path in paths]
    known = [x for x in found if x is not None]
    return estimates.mean_over_seeds(known) if known and len(known) == len(found) else None


def change_at(path: Path, value: float, sign: float) -> float | None:
    """Straight between the two points around the value; None for a path that begins beyond it or ends short of it."""
    if sign * path[0][0] > sign * value:
        return None
    for (t0, c0), (t1, c1) in pairwise(path):
        if sign * t0 <= sign * value <= sign * t1:
            return c0 + (c1 - c0) * ((value - t0) / (t1 - t0) if t1 != t0 else 1.0)
    return None


def matched_differences(made: Forgetting, f: Findings) -> list[tuple[CellForgetting, CellForgetting, Estimate]]:
    """Cells that are shown to be within the margin of the reference on the target, the reference, and the difference of
    their changes (Welch); those of three runs or more."""
    by_id = {c.result.id: c for c in made.cells}
    reference = by_id.get(f.reference or "")
    out = []
    for i, c in by_id.items():
        if reference is None or i not in f.versus or f.versus[i].size != "within":
            continue
        values = [[v for x in y.result.runs if (v := made.probe.change(x.metrics)) is not None] for y in (c, reference)]
        estimate = welch(*values)
        if estimate is not None:
            out.append((c, reference, estimate))
    return out
