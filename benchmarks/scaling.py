"""What a training step of K packed LoRA runs costs: a model on paper (scaling.md), and a measurement that checks it.

python benchmarks/scaling.py --json scaling.json                          # K = 1 to 16 here, measured beside predicted
python benchmarks/scaling.py --steps 3 --repeats 1 --packs 1 2 4          # does it work here?
python benchmarks/scaling.py --table gpu --shape 7b                       # predictions; nothing is run on a GPU
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scaling_model import SHAPES, Device, Shape, Work, fitted, memory, ridge, seconds, speed_up, terms


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

    from lorabench.config.runs import parse
    from lorabench.launch.command_line import config_dir
    from lorabench.runtime.memory import PeakMemory
    from lorabench.store.records import Store
    from lorabench.training import train as tr

    steps, B = args.steps + 2, args.batch_size
    settings = {"sweep.name": "scaling", "method.r": args.r, "trainer.batch_size": B, "trainer.max_steps": steps,
                "trainer.eval_interval": steps + 1, "trainer.part_tokens": args.part_tokens or "null", "task.val_examples": 100,
                "task.test_examples": 100, "task.train_examples": B * steps, "trainer.accelerator": "cpu"}  # fmt: skip
    with initialize_config_dir(config_dir(), version_base=None):
        run = parse(compose("config", overrides=[f"{key}={value}" for key, value in settings.items()]))[0]
    pack, marks = tr.Pack("scaling", tuple(replace(run, seed=k) for k in range(K))), []
    listener = tr.Listener(step=lambda done, total: marks.append((time.perf_counter(), s.module.tokens)))
    with (
        tempfile.TemporaryDirectory() as folder,
        tr.open_session(pack, Store(Path(folder)), listener) as s,
        tr._quiet(),
    ):
        lengths = [sum(part.batch["input_ids"].numel() for part in x) / K / B for x in s.train_stream()]
        with PeakMemory("cpu") as peak:
            s.trainer.fit(s.module, s.train_stream(), s.val_stream())
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
