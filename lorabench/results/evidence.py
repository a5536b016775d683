"""What claims are judged by: a sweep's cells on their lines of s and r, best rates between grid points, differences on
test.

A claim is judged one way throughout. It *holds* where the 90 % interval of its number lies inside what the claim says
(two one-sided tests at 5 %), it is *contradicted* where the 95 % interval lies outside; between the two there is not
enough evidence. Outside the conditions it was made under it is not applicable, whatever the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lorabench.config import alpha_rules
from lorabench.config.method_names import FULL, PLAIN_LORA, RSLORA
from lorabench.results import best_rate, formatting, scores, units
from lorabench.results.best_rate import Missing, Optimum
from lorabench.results.cells import Result, Results, cell_results, has_same_runs
from lorabench.results.formatting import Metric, plural
from lorabench.results.sweep import Cell, Sweep
from lorabench.results.weights import Analysis, read_analysis
from lorabench.stats.estimates import Estimate

MAX_PARAMETER_GAP = 0.02  # share by which parameters may differ and still count as equal


def parameter_gap(a: Result, b: Result) -> float:
    """0 where both train the same number of parameters, 1 where one trains none."""
    x, y = a.cell.trainable or 0, b.cell.trainable or 0
    return abs(x - y) / max(x, y, 1)


@dataclass(frozen=True)
class Line:
    """Cells on which s * r^power is one constant, a rank each, ascending."""

    constant: float
    cells: tuple[Result, ...]
    under: str = ""  # the conditions that tell it from other lines of the sweep, such as `train_examples 500`

    @property
    def ranks(self) -> list[int]:
        return [r.cell.r or 0 for r in self.cells]

    def span(self) -> float:
        return max(self.ranks) / min(self.ranks) if self.cells else 1.0

    @property
    def where(self) -> str:
        """For a sentence: `on q+v at ranks 4, 16 and 64`."""
        said = [str(r) for r in self.ranks]
        ranks = f"ranks {', '.join(said[:-1])} and {said[-1]}" if len(said) > 1 else f"rank {said[0]}"
        under = f" ({self.under})" if self.under else ""
        return f"on {self.cells[0].cell.targets} at {ranks}{under}"


@dataclass(frozen=True)
class Evidence:
    sweep: Sweep
    measured: Results
    metric: Metric

    @property
    def cells(self) -> list[Result]:
        """Cells that have runs, in the order of tables."""
        return [r for r in self.measured.by_cell.values() if r.runs]

    @cached_property
    def optima(self) -> dict[str, Optimum | Missing]:
        return {r.id: best_rate.optimum(r.choice) for r in self.cells}

    @cached_property
    def weights(self) -> Analysis | None:
        return read_analysis(self.sweep.store.root)

    def lines(self, power: float) -> list[Line]:
        """LoRA's cells on which s * r^power is constant, the line of most ranks first, of equals the one that trained
        on most examples. A cell may be on several: the rules that set alpha meet at their anchor."""
        found: dict[tuple[object, ...], dict[int, Result]] = {}
        constants: dict[tuple[object, ...], float] = {}
        for r in self.cells:
            s = scale(r.cell)
            if s is None or not r.cell.r:
                continue
            constant = s * r.cell.r**power
            key = (r.cell.targets, r.cell.extra, round(math.log2(constant), 2))
            found.setdefault(key, {}).setdefault(r.cell.r, r)
            constants.setdefault(key, constant)
        made = [
            Line(constants[k], tuple(at[n] for n in sorted(at)), self._under(at.values())) for k, at in found.items()
        ]
        return sorted(made, key=lambda line: (-len(line.cells), -(line.cells[0].resource("examples") or 0)))

    def _under(self, line: Iterable[Result]) -> str:
        """What axes of plain LoRA's cells, beside rank and alpha, say of these."""
        own = dict(next(iter(line)).cell.extra)
        every = [dict(r.cell.extra) for r in self.cells if r.cell.method in PLAIN_LORA]
        varied = (k for k in own if any(other.get(k) != own[k] for other in every))
        return ", ".join(f"{k.split('.')[-1]} {own[k]}" for k in varied)

    def full(self, like: Cell) -> Result | None:
        """Full fine-tuning under the conditions of a cell."""
        return next((r for r in self.cells if r.cell.method == FULL and has_same_conditions(r.cell, like)), None)

    def located(self, cells: Sequence[Result]) -> list[Optimum] | Missing:
        """The best rates of all these cells. One that lies beyond its grid says how far rates move: it cannot be left
        out."""
        found: list[Optimum] = []
        for r in cells:
            made = self.optima[r.id]
            if isinstance(made, Missing):
                return Missing(f"{r.name}: {made.reason}", f"{r.name}: {made.settle}")
            found.append(made)
        return found

    def difference(self, a: Result, b: Result) -> Estimate | Missing:
        """a − b in the primary metric on test, as in the report."""
        lacking = _missing_test((a, b)) or _other_test_sets(a, b)
        e = self.measured.difference(a, b)
        if lacking or e is None:
            return lacking or Missing(
                f"{a.name} and {b.name} have no seed in common", "the same confirmation seeds for both"
            )
        if e.allows_verdict and e.variance == 0 and not has_same_runs(a, b):
            return Missing(
                f"{a.name} minus {b.name} is the same for every seed and every test example known",
                "results of single test examples, or more of them",
            )
        return e if e.allows_verdict else too_few_seeds(e.seeds)


def _other_test_sets(a: Result, b: Result) -> Missing | None:
    if a.sample and b.sample and scores.has_other_examples(a.sample, b.sample):
        return Missing(f"{a.name} and {b.name} were tested on different examples", "one test set for both")
    return None


def too_few_seeds(seeds: int) -> Missing:
    return Missing(
        f"{plural(seeds, 'confirmation seed')} in common, a verdict takes three", "three or more confirmation seeds"
    )


def _missing_test(cells: Sequence[Result]) -> Missing | None:
    for r in cells:
        if r.lost:
            said = f"{plural(r.lost, 'confirmation run')} of {r.name} did not survive"
            return Missing(said, f"{r.name} at rates that every seed survives")
        if r.sample is None:
            return Missing(f"{r.name} has no test result", f"confirmation seeds for {r.name}, three or more")
    return None


def gather(sweep: Sweep) -> Evidence:
    measured = cell_results(sweep)
    metric = units.primary_metric(sweep, (r.val for r in measured.by_cell.values()))
    return Evidence(sweep, measured, metric)


def scale(cell: Cell) -> float | None:
    """s of W' = W + s B A; None for what is not plain LoRA."""
    if cell.method not in PLAIN_LORA or not cell.r or not cell.alpha:
        return None
    return alpha_rules.scaling(cell.alpha, cell.r, use_rslora=cell.method == RSLORA)


def has_same_conditions(a: Cell, b: Cell) -> bool:
    """Whether two have one value on every axis that both have, beside method, rank, alpha and targets."""
    left, right = dict(a.extra), dict(b.extra)
    return all(left[k] == right[k] for k in left.keys() & right.keys())


def missing_tuning(cells: Sequence[Result]) -> Missing | None:
    """A comparison of tuned cells takes cells that are tuned: several rates, and the best of them not at an end."""
    for r in cells:
        if len(r.choice.rates) < best_rate.MIN_RATES:
            said = f"{r.name} was tried at {plural(len(r.choice.rates), 'learning rate')}, so it is not tuned"
            return Missing(said, f"{r.name} at three or more rates")
        if r.choice.edge:
            way = "above" if r.choice.side == "high" else "below"
            said = f"the best rate of {r.name}, {formatting.rate(r.choice.lr)}, is at an end of its grid"
            widen = (
                best_rate.unpruned_rerun(r.choice) if r.choice.beyond else f"rates {way} {formatting.rate(r.choice.lr)}"
            )
            return Missing(said, f"{r.name} at {widen}")
    return None
