"""What a training step of K packed LoRA runs costs: a model on paper (scaling.md), and a measurement that checks it.

python benchmarks/scaling.py --json scaling.json                          # K = 1 to 16 here, measured beside predicted
python benchmarks/scaling.py --steps 3 --repeats 1 --packs 1 2 4          # does it work here?
python benchmarks/scaling.py --table gpu --shape 7b                       # predictions; nothing is run on a GPU
Letters: K runs, B examples a run and step, T tokens an example, r rank, I in, O out, H hidden, F intermediate.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scipy.optimize import minimize


@dataclass(frozen=True)
class Shape:
    """A transformer. kv: width of keys and values. gated: three MLP matrices, not two. logits: a language model's."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    kv: int
    gated: bool = False
    logits: bool = False

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(I, O) of one layer's products, all of them adapted."""
        H, F = self.hidden, self.intermediate
        return [(H, H), (H, self.kv), (H, self.kv), (H, H), *[(H, F)] * (1 + self.gated), (F, H)]

    @property
    def parameters(self) -> int:
        """P: the weights each token is multiplied by. An embedding is looked up, not multiplied."""
        return self.layers * sum(i * o for i, o in self.matrices) + self.logits * self.vocabulary * self.hidden

    def trainable(self, r: int) -> int:
        """Of one run: r (I + O) a matrix."""
        return self.layers * r * sum(i + o for i, o in self.matrices)


SHAPES = {
    "minilm": Shape(384, 1536, 6, 30522, heads=12, kv=384),
    "smollm2": Shape(576, 1536, 30, 49152, heads=9, kv=192, gated=True, logits=True),
    "7b": Shape(3584, 18944, 28, 152064, heads=28, kv=512, gated=True, logits=True),  # Qwen2.5-7B's widths
}


@dataclass(frozen=True)
class Work:
    """One step. size: bytes an element of base and activations. eager: attention writes its T x T maps."""

    K: int
    B: int
    T: float
    r: int = 8
    size: int = 2
    part_tokens: int = 32768
    eager: bool = False

    @property
    def parts(self) -> int:
        """As `batches.PackStream` cuts a step: one run's batch is never cut, so there are at most K."""
        return min(self.K, math.ceil(self.K * self.B * self.T / self.part_tokens))


@dataclass(frozen=True)
class Device:
    flops: float  # FLOP/s of its products
    bandwidth: float  # B/s
    launch: float  # seconds an operation costs before it computes


def operations(s: Shape, w: Work) -> float:
    """FLOP a token: base 2P forward, 2P to the input (frozen: no weight gradients), adapters 6 r (I + O), attention 12 T H."""
    return 4 * s.parameters + 6 * s.trainable(w.r) + 12 * w.T * s.hidden * s.layers


def traffic(s: Shape, w: Work) -> tuple[float, float, float]:
    """Bytes moved by the weights a part, by the activations a token, by the adapters of a run; counted in scaling.md."""
    rest = 34 * s.hidden + (5 + 3 * s.gated) * s.intermediate + 13 * s.heads * w.T * w.eager
    token = w.size * (6 * s.trainable(1) + s.layers * rest + 4 * s.logits * s.vocabulary)
    return 2.0 * s.parameters * w.size, token, 4.0 * 13 * s.trainable(w.r)


def launches(s: Shape, w: Work) -> int:
    """Operations a step starts: in a part 20 a matrix, 26 a layer, 24 more; 6 an adapter tensor (norm, clipping); 16 a run."""
    part = s.layers * (20 * len(s.matrices) + 26) + 24
    return w.parts * part + 6 * 2 * s.layers * len(s.matrices) + 16 * w.K


def terms(s: Shape, w: Work, d: Device) -> dict[str, float]:
    """Seconds of a step that each resource asks for."""
    (part, token, run), tokens = traffic(s, w), w.K * w.B * w.T
    moved = w.parts * part + tokens * token + w.K * run
    compute, launching = tokens * operations(s, w) / d.flops, launches(s, w) * d.launch
    return {"compute": compute, "bandwidth": moved / d.bandwidth, "launches": launching}


def seconds(s: Shape, w: Work, d: Device) -> float:
    t = terms(s, w, d)
    return max(t["compute"], t["bandwidth"]) + t["launches"]


def speed_up(s: Shape, w: Work, d: Device) -> float:
    """K steps of lone runs over one step of the pack: between 1 and K."""
    return w.K * seconds(s, replace(w, K=1), d) / seconds(s, w, d)


def ridge(s: Shape, w: Work, d: Device) -> float:
    """Tokens a part from which the products take longer than the traffic; inf where activations alone outweigh them."""
    part, token, _ = traffic(s, w)
    gap = operations(s, w) / d.flops - token / d.bandwidth
    return part / d.bandwidth / gap if gap > 0 else math.inf


def memory(s: Shape, w: Work) -> float:
    """Bytes: base with embedding, K x trainable x 16 (float32 value, gradient, two moments), what a part keeps (scaling.md)."""
    layer = 6 * s.hidden + 2 * s.kv + (2 + 2 * s.gated) * s.intermediate + w.r * len(s.matrices)
    kept = s.layers * w.size * (layer + 2 * s.heads * w.T * w.eager) + s.logits * s.vocabulary * (w.size + 8)
    base = w.size * (s.parameters + (not s.logits) * s.vocabulary * s.hidden)  # logits: tied to the embedding
    return base + w.K * s.trainable(w.r) * 16 + math.ceil(w.K / w.parts) * w.B * w.T * kept


def fitted(s: Shape, measured: Sequence[tuple[Sequence[Work], float]], flops: float) -> Device:
    """Bandwidth and launch cost of least squared relative error at a given peak. measured: a K's steps, their mean seconds."""

    def error(logs: Sequence[float]) -> float:
        d = Device(flops, 10 ** logs[0], 10 ** logs[1])
        return sum((fmean(seconds(s, w, d) for w in works) / t - 1) ** 2 for works, t in measured)

    found = minimize(error, (9, -5), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12, "maxiter": 4000}).x
    return Device(flops, float(10 ** found[0]), float(10 ** found[1]))


def table(s: Shape, d: Device, work: Work, packs: Sequence[int]) -> str:
    """Speed-up over lone runs by batch and K, as markdown."""
    lines = [
        f"**Predictions: nothing was run on a GPU.** P = {s.parameters:,}, r = {work.r}, T = {work.T:g}, parts of "
        f"{work.part_tokens:,} tokens; {d.flops / 1e12:g} TFLOP/s, {d.bandwidth / 1e12:g} TB/s, {d.launch * 1e6:g} µs a launch; "
        f"ridge {ridge(s, work, d):,.0f} tokens a part.\n",
        f"| B | B·T | ms alone | bound by | {' | '.join(f'K = {k}' for k in packs)} | bound by | GB |",
        "|--:|--:|--:|---|" + "--:|" * len(packs) + "---|--:|",
    ]
    for B in (1, 4, 16, 64, 256):
        one, *_, last = works = [replace(work, K=k, B=B) for k in (1, *packs)]
        bound = [max(t, key=t.__getitem__) for t in (terms(s, one, d), terms(s, last, d))]
        cells = [f"{speed_up(s, w, d):.1f}×" for w in works[1:]]
        row = [B, f"{B * work.T:,.0f}", f"{seconds(s, one, d) * 1e3:.1f}", bound[0], *cells, bound[1]]
        lines.append(f"| {' | '.join(map(str, row))} | {memory(s, last) / 1e9:.1f} |")
    return "\n".join([*lines, f"\nThe last two columns: at K = {packs[-1]}; GB is its peak memory."])


def clock(args: argparse.Namespace, K: int) -> dict[str, Any]:
    """Trains K runs on tweets: seconds and true tokens of each step but the first two, padded lengths, peak memory in bytes."""
    from hydra import compose, initialize_config_dir

    from lorabench import train as tr
    from lorabench.app import config_dir
    from lorabench.config import parse
    from lorabench.memory import PeakMemory
    from lorabench.records import Store

    steps, B = args.steps + 2, args.batch_size
    settings = {"sweep.name": "scaling", "method.r": args.r, "trainer.batch_size": B, "trainer.max_steps": steps,
                "trainer.eval_interval": steps + 1, "trainer.part_tokens": args.part_tokens or "null", "task.val_examples": 100,
                "task.test_examples": 100, "task.train_examples": B * steps, "trainer.accelerator": "cpu"}  # fmt: skip
    with initialize_config_dir(config_dir(), version_base=None):
        run = parse(compose("config", overrides=[f"{key}={value}" for key, value in settings.items()]))[0]
    pack, marks = tr.Pack("scaling", tuple(replace(run, seed=k) for k in range(K))), []
    listener = tr.Listener(step=lambda done, total: marks.append((time.perf_counter(), s.module.tokens)))
    with tempfile.TemporaryDirectory() as folder, tr._opened(pack, Store(Path(folder)), listener) as s, tr._quiet():
        lengths = [sum(part.batch["input_ids"].numel() for part in x) / K / B for x in tr._train_stream(s)]
        with PeakMemory("cpu") as peak:
            s.trainer.fit(s.module, tr._train_stream(s), tr._val_stream(s))
            high = peak.peak()
        eager, size = s.resolved.attention == "eager", s.base.model.dtype.itemsize
        work = asdict(Work(K, B, 0, args.r, size, s.resolved.part_tokens, eager))
    took = [(end - start, after - before) for (start, before), (end, after) in pairwise(marks[1:])]
    return {"took": [t for t, _ in took], "tokens": [n for _, n in took], "T": lengths, "peak": high, "work": work}


def limits(s: Shape, size: int) -> tuple[float, float]:
    """FLOP/s of `linear` over a layer's shapes; seconds of an operation on one number, forward and backward."""
    import torch
    from sweep_setup import ROWS, _seconds

    dtype = {2: torch.bfloat16, 4: torch.float32}[size]
    flops = sum(2 * ROWS * i * o for i, o in s.matrices) / sum(_seconds(x, dtype, "cpu") for x in s.matrices)
    start, x = time.perf_counter(), torch.ones(1, requires_grad=True)
    for _ in range(2000):
        x = x * 1.0
    x.backward()
    return flops, (time.perf_counter() - start) / 4000


def measure(args: argparse.Namespace, s: Shape) -> dict[str, Any]:
    """Each K in turn, in a process of its own, `repeats` times. The device is fitted to the first two K, the rest predicted."""
    found: dict[int, list[dict[str, Any]]] = {K: [] for K in args.packs}
    machine = []
    for _ in range(args.repeats):
        for K, seen in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", str(K)]
            seen.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
        machine.append(limits(s, seen[0]["work"]["size"]))
    works = {K: [replace(Work(**f[0]["work"]), T=T) for T in f[0]["T"]] for K, f in found.items()}
    step = {K: fmean(map(median, zip(*(x["took"] for x in f)))) for K, f in found.items()}
    flops, operation = map(median, zip(*machine))
    need = {K: max(memory(s, w) for w in works[K]) for K in found}
    process = (
        median(x["peak"] for x in found[args.packs[0]]) - need[args.packs[0]]
    )  # Python, torch, data: as at the first K
    d, rows = fitted(s, [(works[K][2:], step[K]) for K in args.packs[:2]], flops), []
    for K, f in found.items():
        tokens, predicted = fmean(f[0]["tokens"]), fmean(seconds(s, w, d) for w in works[K][2:])
        paces, peak = [tokens / fmean(x["took"]) for x in f], median(x["peak"] for x in f)
        rows.append(
            {"K": K, "tokens/s": tokens / step[K], "least": min(paces), "most": max(paces), "ms": step[K] * 1e3}
            | {"predicted ms": predicted * 1e3, "error %": 100 * (predicted / step[K] - 1)}
            | {"MB": peak / 1e6, "predicted MB": (process + need[K]) / 1e6}
        )
    return {
        "rows": rows,
        "linear_flops": flops,
        "operation_us": operation * 1e6,
        "fitted": asdict(d),
        "work": f[0]["work"],
    }


def text(made: dict[str, Any]) -> str:
    rows, d = made["rows"], made["fitted"]
    lines = [f"| {' | '.join(rows[0])} |", "|" + "--:|" * len(rows[0])]
    lines += [f"| {' | '.join(f'{value:,.0f}' for value in row.values())} |" for row in rows]
    found = f"linear {made['linear_flops'] / 1e9:.0f} GFLOP/s, an operation on one number {made['operation_us']:.1f} µs"
    fit = f"{d['bandwidth'] / 1e9:.1f} GB/s and {d['launch'] * 1e6:.1f} µs an operation, from the first two rows' ms"
    return "\n".join([*lines, f"\nMeasured: {found}. Fitted: {fit}; predicted MB from the first row's."])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], prog="benchmarks/scaling.py")
    numbers = {"batch-size": 16, "steps": 14, "repeats": 3, "r": 8, "part-tokens": 0, "length": 128}
    for name, default in {**numbers, "flops": 312e12, "bandwidth": 1.555e12, "launch-us": 5.0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default:g}")
    parser.add_argument("--packs", type=int, nargs="+", help="the K, rising; default 1 2 4 8 16, in the table 2 to 32")
    parser.add_argument("--table", choices=("gpu",), help="predict (--flops, --bandwidth, --launch-us, --length)")
    parser.add_argument("--shape", choices=SHAPES, default="minilm", help="of the table; minilm is what is measured")
    parser.add_argument("--json", type=Path, help="write the measurement here too")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the K of a child process
    args = parser.parse_args(argv)
    if args.table:
        device = Device(args.flops, args.bandwidth, args.launch_us / 1e6)
        work = Work(1, 1, args.length, args.r, 2, args.part_tokens or 32768)
        return print(table(SHAPES[args.shape], device, work, args.packs or (2, 4, 8, 16, 32)))
    if args.one:
        return print(json.dumps(clock(args, args.one)))
    args.packs = args.packs or [1, 2, 4, 8, 16]
    made = measure(args, SHAPES["minilm"])
    if args.json:
        args.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return print(text(made))


if __name__ == "__main__":
    main()
