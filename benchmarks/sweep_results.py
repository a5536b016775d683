"""From timings to an answer: equal work, FLOPs, ratios, the JSON. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.sweep_grid import MODELS, PRUNED, RATIOS, Settings, grid
from benchmarks.sweep_launch import BenchmarkFailed


@dataclass(frozen=True)
class Run:
    """One run of one variant. seconds: of its process where it has one, else its part inside the one process.

    train_seconds: without evaluations and start-up. tokens: true ones, seen in training. metric: of the validation rows
    at the last step.
    """

    r: int
    lr: float
    seconds: float
    train_seconds: float
    tokens: int
    steps: int
    evaluated_at: list[int]
    trainable: int
    train_examples: int
    val_examples: int
    metric: float
    peak_memory_bytes: int
    status: str = "completed"


@dataclass
class Outcome:
    """One variant in one repeat. makespan: seconds from launching its first process to the end of its last one.

    cpu_seconds: of all its processes and threads; far below cores x makespan, something else had the machine.
    """

    variant: str
    repeat: int
    makespan: float
    cpu_seconds: float
    peak_memory_bytes: int
    precision: str  # 32, bf16
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Shape:
    """Linear layers of a base. blocks: (inputs, outputs) of each inside the blocks; width: of attention, heads together."""

    blocks: tuple[tuple[int, int], ...]
    layers: int
    width: int

    def flops_per_token(self, r: int, length: float) -> float:
        """Useful FLOPs a true token, forward and backward, with rank r on every linear layer of the blocks.

        Frozen weights P: 2 P forward, 2 P back to the input. LoRA: 6 r (I + O) a layer. Attention: 4 T H forward and
        8 T H backward a layer, T the mean length. Embeddings, pooler and heads are left out.
        """
        frozen = sum(i * o for i, o in self.blocks)
        added = sum(i + o for i, o in self.blocks)
        return 4 * frozen + 6 * r * added + 12 * length * self.width * self.layers


# -- equal work ---------------------------------------------------------------------------------------------------------


def check_equal_work(outcomes: Iterable[Outcome], s: Settings, tokens: int) -> None:
    """Raise `BenchmarkFailed` unless every run of every variant saw the same rows and tokens in as many steps.

    tokens: what one run must see in training. Pruned runs may stop early; nothing else of them may differ.
    """
    points = sorted(grid(s.runs, s.model, prune=s.prune).points)
    trainable: dict[int, int] = {}
    for o in outcomes:
        where = f"{o.variant}, repeat {o.repeat + 1}"
        _same(where, "runs (r, lr)", sorted((run.r, run.lr) for run in o.runs), points)
        for run in o.runs:
            name = f"{where}, r={run.r} lr={run.lr:g}"
            _same(name, "training rows", run.train_examples, s.train_examples)
            _same(name, "validation rows", run.val_examples, s.val_examples)
            _same(name, "trainable parameters", run.trainable, trainable.setdefault(run.r, run.trainable))
            if o.variant == PRUNED and run.status == "pruned":
                continue
            _same(name, "status", run.status, "completed")
            _same(name, "steps", run.steps, s.steps)
            _same(name, "evaluations at steps", run.evaluated_at, s.evaluated_at)
            _same(name, "tokens", run.tokens, tokens)


def _same(where: str, what: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        raise BenchmarkFailed(f"unequal work: {where}: {what} {got}, wanted {wanted}")


# -- summary ------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "values": list(values)}


def ratios(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """Makespan of a peer over lorabench's, repeat by repeat, for each pair that was run."""
    spans: dict[str, dict[int, float]] = {}
    for o in outcomes:
        spans.setdefault(o.variant, {})[o.repeat] = o.makespan
    found = {}
    for name, (peer, own) in RATIOS.items():
        shared = sorted(spans.get(peer, {}).keys() & spans.get(own, {}).keys())
        if shared:
            found[name] = spread([spans[peer][i] / spans[own][i] for i in shared])
    return found


def useful_gflops(o: Outcome, shape: Shape, length: float) -> float:
    """Useful GFLOP/s over a variant's training seconds."""
    seconds = sum(run.train_seconds for run in o.runs)
    return sum(run.tokens * shape.flops_per_token(run.r, length) for run in o.runs) / max(seconds, 1e-9) / 1e9


def describe(o: Outcome, shape: Shape, length: float, roofline: Mapping[str, float], metric: str) -> dict[str, Any]:
    """One entry of "variants": a variant in one repeat. roofline: GFLOP/s by precision."""
    seconds = max(sum(run.train_seconds for run in o.runs), 1e-9)
    gflops = useful_gflops(o, shape, length)
    made = [run.metric for run in o.runs if run.status == "completed"]
    best = (min if metric == "loss" else max)(made) if made else None
    return {
        "variant": o.variant, "repeat": o.repeat, "makespan": o.makespan,
        "cpu_seconds": o.cpu_seconds, "peak_memory_bytes": o.peak_memory_bytes,
        "precision": o.precision, "train_seconds": seconds, "tokens_per_second": sum(r.tokens for r in o.runs) / seconds,
        "gflops": gflops, "roofline_gflops": roofline[o.precision], "roofline_fraction": gflops / roofline[o.precision],
        "metric": metric, "best": best, "mean": sum(made) / len(made) if made else None,
        "pruned": sum(run.status == "pruned" for run in o.runs),
    }  # fmt: skip


def memory_ratio(outcomes: Sequence[Outcome]) -> float | None:
    """Peak of the one lorabench process over the median run's of one PEFT Trainer process each; None without both."""
    own = [o.peak_memory_bytes for o in outcomes if o.variant == "lorabench"]
    peer = [run.peak_memory_bytes for o in outcomes if o.variant == "trainer_processes" for run in o.runs]
    return median(own) / median(peer) if own and peer else None


def summary(
    outcomes: Sequence[Outcome], s: Settings, facts: Mapping[str, Any], roofline: Mapping[str, float]
) -> dict[str, Any]:
    """The JSON of a benchmark. facts: what `sweep_setup.py` found out; roofline: GFLOP/s by precision."""
    shape, metric = shape_of(facts), MODELS[s.model].metric
    variants = [describe(o, shape, facts["mean_length"], roofline, metric) for o in outcomes]
    own = [v["roofline_fraction"] for v in variants if v["variant"] == "lorabench"]
    runs = [
        {"variant": o.variant, "repeat": o.repeat, "metric_name": metric, **asdict(r)} for o in outcomes for r in o.runs
    ]
    asked = grid(s.runs, s.model, prune=s.prune)
    work = {"steps": s.steps, "evaluated_at": s.evaluated_at, "tokens_per_run": facts["tokens"]}
    return {
        "ratios": ratios(outcomes),
        "roofline_fraction": median(own) if own else None,
        "memory_ratio": memory_ratio(outcomes),
        "runs": runs,
        "variants": variants,
        "machine": {**facts["machine"], "roofline_gflops": dict(roofline)},
        "settings": {**asdict(s), "variants": list(s.variants), **asdict(asked), **work, "mean_length": facts["mean_length"]},
    }  # fmt: skip


def shape_of(facts: Mapping[str, Any]) -> Shape:
    return Shape(tuple((i, o) for i, o in facts["blocks"]), facts["layers"], facts["width"])
