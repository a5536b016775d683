"""Which learning rate a cell gets (tune, then confirm: docs/architecture.md). Pure: manifest and records in, choices
out.

Rule: inside a cell the rate with the best mean of the study's selection metric on validation (the loss, unless it
declares another), at the step kept, over the tuning seeds. A rate at which any seed diverged, failed or was pruned is
out, ties go to the smaller rate, and a best rate at an end of its grid is a warning, not a result. Pruned rates are no
part of that grid: what they would have come to is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from lorabench.config.directions import is_lower_better
from lorabench.store.records import Record


@dataclass(frozen=True)
class Rate:
    """One learning rate of a cell over its tuning seeds."""

    lr: float
    losses: tuple[float, ...]  # validation loss of each completed seed, in seed order
    failures: int = 0  # seeds that diverged or failed
    missing: int = 0  # seeds that were pruned or have not ended yet
    pruned: tuple[int, ...] = ()  # of these the pruned ones: the step of each, in seed order, 0 where none is recorded
    unmeasured: int = 0  # seeds that ended well and recorded nothing that chooses (of another tool's results)
    scores: tuple[float, ...] = ()  # the selection metric, where that is not the loss; in seed order

    @property
    def eligible(self) -> bool:
        return bool(self.losses) and not self.failures and not self.missing and not self.unmeasured

    @property
    def seeds(self) -> int:
        return len(self.losses) + self.failures + self.missing + self.unmeasured

    @property
    def mean(self) -> float:
        return fmean(self.losses) if self.losses else math.nan

    @property
    def score(self) -> float:
        """Mean of what chooses the rate."""
        return fmean(self.scores) if self.scores else self.mean


@dataclass(frozen=True)
class Choice:
    """The rate that is best by the selection metric over the tuning seeds; `lr` is None where no rate is eligible."""

    lr: float | None
    rates: tuple[Rate, ...] = field(default=())  # ascending
    side: Literal["low", "high"] | None = None  # the end on which the best rate lies, of the rates that were not pruned

    @property
    def edge(self) -> bool:
        """The best rate lies at an end of its grid: the best may lie beyond. One lone rate is not a grid."""
        return self.side is not None

    @property
    def beyond(self) -> tuple[Rate, ...]:
        """What was tried beyond that end, none of it to the end: these rates were pruned."""
        if self.lr is None or self.side is None:
            return ()
        return tuple(r for r in self.rates if (r.lr < self.lr if self.side == "low" else r.lr > self.lr))

    @property
    def outward(self) -> float | None:
        """The next rate beyond the end on which the best lies, as far from it as its neighbour is; None inside the
        grid.

        Nor where rates beyond it were tried and pruned: to train those to their end says more.
        """
        if self.lr is None or self.side is None or self.beyond:
            return None
        tried = [r.lr for r in self.rates]
        i = tried.index(self.lr)
        neighbour = tried[i + 1 if self.side == "low" else i - 1]
        return float(f"{self.lr * self.lr / neighbour:.12g}")

    @property
    def loss(self) -> float:
        return next((r.mean for r in self.rates if r.lr == self.lr), math.nan)

    @property
    def ineligible(self) -> dict[float, int]:
        """Rates that are out because seeds diverged or failed, and how many did."""
        return {r.lr: r.failures for r in self.rates if r.failures}


def selection_metric(manifest: Mapping[str, Any]) -> str:
    """The validation metric that the study declares to choose rates by."""
    return str((manifest.get("study") or {}).get("selection") or "loss")


def lower_is_better(manifest: Mapping[str, Any], metric: str) -> bool:
    """Whether less of a metric is better: as the manifest says, which has it from the task, or as its name does."""
    return metric in manifest.get("lower_is_better", ()) or is_lower_better(metric) is True


def choose(manifest: Mapping[str, Any], records: Mapping[str, Record]) -> dict[str, Choice]:
    """For every cell of the manifest its chosen rate. records: by run_id; runs without one count as not ended."""
    listed, metric = manifest.get("runs", {}), selection_metric(manifest)
    sign = 1 if metric == "loss" or lower_is_better(manifest, metric) else -1
    return {
        c["id"]: _choose(c["runs"].get("tune", ()), listed, records, metric, sign) for c in manifest.get("cells", ())
    }


def _choose(
    run_ids: Sequence[str], listed: Mapping[str, Any], records: Mapping[str, Record], metric: str, sign: int
) -> Choice:
    by_rate: dict[float, list[tuple[int, str]]] = {}
    for run_id in run_ids:
        record = records.get(run_id)
        found = (
            (record.config["optimizer"]["lr"], record.config["seed"]) if record else _rate_and_seed(listed.get(run_id))
        )
        if found is not None:
            by_rate.setdefault(float(found[0]), []).append((int(found[1]), run_id))
    rates = tuple(_rate(lr, [records.get(i) for _, i in sorted(by_rate[lr])], metric) for lr in sorted(by_rate))
    eligible = [r for r in rates if r.eligible]
    if not eligible:
        return Choice(None, rates)
    best = min(eligible, key=lambda r: (sign * r.score, r.lr))
    return Choice(best.lr, rates, _side(best, rates))


def _rate_and_seed(entry: Mapping[str, Any] | None) -> tuple[float, int] | None:
    """Rate and seed of a run that has no record yet, from the manifest."""
    return (entry["lr"], entry["seed"]) if entry else None


def _rate(lr: float, runs: Sequence[Record | None], metric: str) -> Rate:
    losses, scores = list[float](), list[float]()
    failures, missing, unmeasured, pruned = 0, 0, 0, list[int]()
    for r in runs:
        loss, score = (r.metrics.get(f"val/{m}") if r and r.status == "completed" else None for m in ("loss", metric))
        if loss is not None and score is not None and math.isfinite(loss) and math.isfinite(score):
            losses.append(float(loss))
            scores.append(float(score))
        elif r is None or r.status == "pruned":
            missing += 1
            pruned += [int(r.metrics.get("pruned_step") or 0)] if r else []
        elif r.status == "completed" and not {"val/loss", f"val/{metric}"} <= set(r.metrics):
            unmeasured += 1
        else:
            failures += 1  # diverged, failed, or completed without a finite loss or score
    shown = () if metric == "loss" else tuple(scores)
    return Rate(lr, tuple(losses), failures, missing, tuple(pruned), unmeasured, shown)


def _side(best: Rate, rates: Sequence[Rate]) -> Literal["low", "high"] | None:
    """A neighbour that diverged bounds the grid as well as one that lost; one that was pruned does not."""
    if len(rates) == 1:
        return None
    grid = [r for r in rates if r.failures or not r.pruned]
    return "low" if best is grid[0] else "high" if best is grid[-1] else None
