"""From per-example test results to what the statistics take. Shape letters: S seeds, N examples, R draws, L labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorabench.results.formatting import SHARES, Metric
from lorabench.stats import estimates
from lorabench.stats.estimates import Estimate, Statistic
from lorabench.store.records import Record, Store

BOOTSTRAP_DRAWS = 1000
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sample:
    """One cell's test results: seeds [S], their scores [S], and per example a [S, N] table or [R, S] bootstrap
    draws."""

    seeds: tuple[int, ...]
    scores: np.ndarray
    table: np.ndarray | None = None
    draws: np.ndarray | None = None
    examples: np.ndarray | None = None  # ids [N], sorted: samples are only compared over the same
    groups: np.ndarray | None = None  # [N]: examples of one group are drawn together; None: each alone

    @property
    def clusters(self) -> int | None:
        """How many groups of examples there are."""
        return None if self.groups is None else len(np.unique(self.groups))

    def at(self, seeds: Sequence[int]) -> Sample:
        rows = [self.seeds.index(s) for s in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            scores=self.scores[rows],
            table=None if self.table is None else self.table[rows],
            draws=None if self.draws is None else self.draws[:, rows],
        )

    def estimate(self, typical: float | None = None) -> Estimate:
        """Return the mean over seeds and its uncertainty. typical: `estimates.seed_variance`'s."""
        if self.clusters != 1:  # one draw of examples says nothing of how far draws scatter
            if self.table is not None:
                return estimates.crossed_mean(self.table, groups=self.groups, typical=typical)
            if self.draws is not None and self.examples is not None:
                n = len(self.examples)
                return estimates.crossed_bootstrap(
                    self.scores, self.draws, examples=n, groups=self.groups, typical=typical
                )
        return estimates.mean_over_seeds(self.scores, typical=typical)


def interval(metric: Metric, e: Estimate) -> tuple[float, float]:
    """Return the 95 % interval of a test result; of a share inside 0 to 1."""
    return estimates.share_interval(e) if metric.name in SHARES else e.interval()


def with_interval(metric: Metric, e: Estimate) -> str:
    """Return `73.4 ± 4.0`; `53.9 (3.8 to 100.0)` where a share's ends are not equally far; one seed has no interval."""
    value = metric.value(e.mean)
    if e.seeds < 2:
        return value
    (low, high), half = interval(metric, e), e.half_width()
    if math.isclose(low, e.mean - half, abs_tol=1e-12) and math.isclose(high, e.mean + half, abs_tol=1e-12):
        return f"{value} ± {metric.size(half, unit=False)}"
    return f"{value} ({metric.value(low)} to {metric.value(high)})"


def has_other_examples(a: Sample, b: Sample) -> bool:
    """Whether the two are known to have met other examples: their difference is one of test sets, too."""
    return a.examples is not None and b.examples is not None and not np.array_equal(a.examples, b.examples)


def difference(a: Sample, b: Sample) -> Sample | None:
    """a − b over the seeds both have; None without a common seed, and where they met other examples. Per example where
    both sides know theirs."""
    common = sorted(set(a.seeds) & set(b.seeds))
    if not common or has_other_examples(a, b):
        return None
    a, b = a.at(common), b.at(common)
    same = a.examples is not None and b.examples is not None
    alike = same and (a.groups is None) == (b.groups is None)  # else their resamples were drawn differently
    return Sample(
        tuple(common),
        a.scores - b.scores,
        a.table - b.table if same and a.table is not None and b.table is not None else None,
        a.draws - b.draws if alike and a.draws is not None and b.draws is not None else None,
        a.examples if same else None,
        (b.groups if a.groups is None else a.groups) if same else None,
    )


def sample(records: Sequence[Record], store: Store, metric: str) -> Sample | None:
    """The test results of a cell's confirmation runs, one seed a run; None where no record has the metric."""
    runs = {r.config["seed"]: r for r in records if r.metrics.get(f"test/{metric}") is not None}
    if not runs:
        return None
    seeds = tuple(sorted(runs))
    scores = np.array([runs[s].metrics[f"test/{metric}"] for s in seeds], dtype=np.float64)
    arrays = _align([store.arrays(runs[s].run_id, "test") for s in seeds])
    if arrays is None:
        return Sample(seeds, scores)
    examples, groups = arrays[0]["example"], next((a["group"] for a in arrays if "group" in a), None)
    if metric in EXAMPLE_MEANS:
        table = EXAMPLE_MEANS[metric](arrays)
        if table is not None and _agrees(table.mean(1), scores):
            return Sample(seeds, scores, table=table, examples=examples, groups=groups)
    if metric in TEST_SET_STATISTICS and STATISTIC_COLUMNS[metric] <= set(arrays[0]):
        statistic = TEST_SET_STATISTICS[metric](arrays)
        if _agrees(statistic(np.ones((1, len(examples))))[0], scores):
            # One fixed stream for all cells: they meet the same resamples of the same examples.
            draws = estimates.resample(statistic, len(examples), BOOTSTRAP_DRAWS, np.random.default_rng(0), groups)
            return Sample(seeds, scores, draws=draws, examples=examples, groups=groups)
    return Sample(seeds, scores)


def _agrees(found: np.ndarray, recorded: np.ndarray) -> bool:
    """A task of the user's own may mean something else by the same name; then only seeds are known."""
    return bool(np.allclose(found, recorded, rtol=1e-3, atol=1e-4))


def _align(found: Sequence[dict[str, np.ndarray] | None]) -> list[dict[str, np.ndarray]] | None:
    """Every seed's arrays in the order of the example ids; None where some are missing or the examples differ."""
    arrays = []
    for a in found:
        if a is None or "example" not in a:
            return None
        order = np.argsort(a["example"], kind="stable")
        arrays.append({name: column[order] for name, column in a.items()})
    same = all(np.array_equal(a["example"], arrays[0]["example"]) for a in arrays)
    return arrays if same and len(arrays[0]["example"]) > 1 else None


# -- metrics that are means over examples ----------------------------------------------------------------------------


def _correct(arrays: Sequence[Arrays]) -> np.ndarray | None:
    return _stack(arrays, "correct") if "correct" in arrays[0] else None


def _loss(arrays: Sequence[Arrays]) -> np.ndarray | None:
    return (
        estimates.linearize(_stack(arrays, "loss"), arrays[0]["weight"])
        if {"loss", "weight"} <= set(arrays[0])
        else None
    )


def _token_accuracy(arrays: Sequence[Arrays]) -> np.ndarray | None:
    if not {"correct_tokens", "tokens"} <= set(arrays[0]):
        return None
    tokens = arrays[0]["tokens"].astype(np.float64)
    return estimates.linearize(_stack(arrays, "correct_tokens") / np.maximum(tokens, 1), tokens)


def _stack(arrays: Sequence[Arrays], name: str) -> np.ndarray:
    """[S, N] of one column."""
    return np.stack([a[name].astype(np.float64) for a in arrays])


EXAMPLE_MEANS: dict[str, Callable[[Sequence[Arrays]], np.ndarray | None]] = {
    "accuracy": _correct,
    "loss": _loss,
    "token_accuracy": _token_accuracy,
}


# -- metrics of the whole test set: statistics of resampled counts ---------------------------------------------------


def _perplexity(arrays: Sequence[Arrays]) -> Statistic:
    weight = arrays[0]["weight"].astype(np.float64)
    losses = _stack(arrays, "loss") * weight
    return lambda counts: np.exp((counts @ losses.T) / (counts @ weight)[:, None])


def _confusion_statistic(score: Callable[[np.ndarray], float]) -> Callable[[Sequence[Arrays]], Statistic]:
    """A statistic from a function of an [L, L] confusion table (rows are labels)."""

    def make(arrays: Sequence[Arrays]) -> Statistic:
        L = 1 + max(int(max(a["label"].max(), a["prediction"].max())) for a in arrays)
        codes = [a["label"].astype(np.int64) * L + a["prediction"].astype(np.int64) for a in arrays]

        def statistic(counts: np.ndarray) -> np.ndarray:
            tables = ((np.bincount(c, w, L * L).reshape(L, L) for c in codes) for w in counts)
            return np.array([[score(t) for t in row] for row in tables])

        return statistic

    return make


def macro_f1(table: np.ndarray) -> float:
    """Unweighted mean of F1 over the classes that occur or are said, from an [L, L] confusion table."""
    hits, total = np.diag(table), table.sum(0) + table.sum(1)
    return float(np.mean(2 * hits[total > 0] / total[total > 0]))


def mcc(table: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004, R_K); 0 where it is undefined."""
    said, true, n = table.sum(0), table.sum(1), table.sum()
    below = (n**2 - said @ said) * (n**2 - true @ true)
    return float((np.trace(table) * n - said @ true) / np.sqrt(below)) if below > 0 else 0.0


def _accuracy(table: np.ndarray) -> float:
    return float(np.trace(table) / table.sum())


OF_CONFUSION: dict[str, Callable[[np.ndarray], float]] = {"accuracy": _accuracy, "macro_f1": macro_f1, "mcc": mcc}
TEST_SET_STATISTICS: dict[str, Callable[[Sequence[Arrays]], Statistic]] = {
    "perplexity": _perplexity,
    "macro_f1": _confusion_statistic(macro_f1),
    "mcc": _confusion_statistic(mcc),
}
STATISTIC_COLUMNS = {
    "perplexity": {"loss", "weight"},
    "macro_f1": {"label", "prediction"},
    "mcc": {"label", "prediction"},
}
