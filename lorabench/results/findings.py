"""What the records say: comparisons with the reference, and the smallest cell that will do.

Which rate: `results.selection`. How sure: `stats.estimates`. Confirmation runs at the chosen rate alone give test
results; the best adapter is the best of the tuning runs, by the metric that chose the rates, so that the runs that are
then compared had no part in the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from lorabench.config.method_names import FULL, HEAD_ONLY
from lorabench.results import scores, units
from lorabench.results.cells import Result, Results, cell_results
from lorabench.results.comparisons import Compare, Comparison, compare_with_reference, comparer
from lorabench.results.formatting import Metric
from lorabench.results.recommendation import (
    Recommendation,
    choose_reference,
    has_same_conditions,
    is_only_one_tested,
    recommend,
)
from lorabench.results.sweep import Sweep
from lorabench.store.records import Record


@dataclass(frozen=True)
class Findings:
    sweep: Sweep
    metric: Metric
    results: Mapping[str, Result]
    measured: Results
    reference: str | None
    versus: Mapping[str, Comparison]  # by cell: against the reference
    best: str | None  # adapter cell that is best on validation
    controls: Mapping[str, Comparison]  # best adapter against "head only" and "full", where they are
    recommendation: Recommendation | None
    compare: Compare = field(repr=False)  # any two cells, exploratory

    def cell_records(self) -> Iterator[tuple[Result, Record]]:
        """Give each cell's result with each record of its runs, by seed, then run_id. A run in two cells comes
        twice."""
        for result in self.results.values():
            for record in self.sweep.records_of((*result.cell.tune, *result.cell.confirm)):
                yield result, record

    @property
    def confirmed(self) -> bool:
        return any(r.test is not None for r in self.results.values())

    @property
    def alone(self) -> bool:
        """One cell has a test result and no other does."""
        return is_only_one_tested(self.results)


def find(sweep: Sweep) -> Findings:
    """Return what a sweep's records say."""
    measured = cell_results(sweep)
    results = measured.by_cell
    metric = units.primary_metric(sweep, (r.val for r in results.values()))
    compare = comparer(measured, sweep)
    reference = choose_reference(sweep, results)
    versus: dict[str, Comparison] = {}
    recommendation = None
    if reference:
        versus = compare_with_reference(compare, reference, list(results), sweep.study.get("family"), sweep.margin)
        recommendation = recommend(sweep, results, compare, reference, versus)
    best = _best([r for r in results.values() if r.cell.adapter])
    controls = _controls(results, compare, reference, versus, best)
    return Findings(sweep, metric, results, measured, reference, versus, best, controls, recommendation, compare)


def _controls(
    results: Mapping[str, Result],
    compare: Compare,
    reference: str | None,
    versus: Mapping[str, Comparison],
    best: str | None,
) -> dict[str, Comparison]:
    """The best adapter against what trains no adapter, by method; the reference where no tuning says which is best."""
    adapter = best or (reference if reference and results[reference].cell.adapter else None)
    controls: dict[str, Comparison] = {}
    for method in (HEAD_ONLY, FULL):
        other = _control(results, method, adapter)
        if adapter and other:
            comparison = _pair_in_family(versus, reference, adapter, other) or compare(adapter, other)
            controls |= {method: comparison} if comparison else {}
    return controls


def _pair_in_family(
    versus: Mapping[str, Comparison], reference: str | None, cell: str, other: str
) -> Comparison | None:
    """A pair as the family has it, whichever of the two is the reference; None for any other pair."""
    if other == reference:
        return versus.get(cell)
    return versus[other].turned() if cell == reference and other in versus else None


def _best(results: Sequence[Result]) -> str | None:
    """By the tuning runs' selection metric; confirmed cells only where there are any. A tie goes to fewer parameters.

    None where some of them was not tuned: nothing but the runs that are compared could say which is best.
    """
    confirmed = [r for r in results if r.role == "confirm"]
    among = [r for r in confirmed or results if r.runs]
    if len(among) > 1 and any(r.tuned is None for r in among):
        return None
    return min(among, key=lambda r: (r.tuned or 0.0, r.cell.trainable or 0, r.id)).id if among else None


def _control(results: Mapping[str, Result], method: str, adapter: str | None) -> str | None:
    """The cell of a method without adapters, under the conditions of the adapter."""
    among = [r for r in results.values() if r.cell.method == method and r.runs]
    return _best(
        [r for r in among if adapter and has_same_conditions(r.cell.conditions, results[adapter].cell.conditions)]
    )


def majority_baseline(f: Findings) -> tuple[str, float] | None:
    """The commonest label and what always answering it scores, where no cell scores above that.

    In the primary metric: accuracy, macro-F1 or MCC. Of the test examples in a confirmed sweep, else of those validated
    on; None for other metrics and where records do not count their labels.
    """
    split, metric = ("test" if f.confirmed else "val"), f.sweep.metric
    runs = {r.id: [x for x in r.runs if f"{split}/{metric}" in x.metrics] for r in f.results.values()}
    first = next((found[0] for found in runs.values() if found), None)
    told = first.provenance.get("data_notes") if first else None
    for key in (split, "labels"):
        told = told.get(key) if isinstance(told, dict) else None
    labels = {k: n for k, n in told.items() if isinstance(n, int) and n > 0} if isinstance(told, dict) else {}
    if metric not in scores.OF_CONFUSION or not labels or any(dict(r.cell.conditions) for r in f.results.values()):
        return None
    name = max(sorted(labels), key=lambda label: labels[label])
    table = np.zeros((len(labels), len(labels)))
    table[:, list(labels).index(name)] = list(labels.values())
    baseline = scores.OF_CONFUSION[metric](table)
    best = max(fmean(float(x.metrics[f"{split}/{metric}"]) for x in found) for found in runs.values() if found)
    return (name, baseline) if best <= baseline + 1e-9 else None
