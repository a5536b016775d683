"""What does mirroring to W&B add to a sweep's makespan? `tracker=wandb` beside `tracker=none`, on many tiny runs.

    python benchmarks/tracker_overhead.py --json result.json               100 runs, 5 repeats
    python benchmarks/tracker_overhead.py --runs 8 --repeats 1             does it work here?

Makespan: wall seconds of `python -m lorabench -m ...`, start-up, report and the wait for W&B at the end in it. Offline
writes W&B's files; online sends to a stand-in server on the loopback device (`tests/wandb_server.py`), which runs in this
process and so takes its share of the same CPU. Arms take turns, in another order each repeat; a ratio compares arms of one
repeat. Nothing leaves the machine. Run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO / "tests"), str(REPO)]

ARMS = ("none", "offline", "online")
TARGET = 1.10  # the ratio that is aimed at, at most
RATES = 25  # runs of a rank


def settings(folder: Path, runs: int, steps: int) -> list[str]:
    """Overrides of a sweep of `runs` tiny runs; makes its base and data."""
    from tiny import make_base, make_data

    base, data = make_base(folder / "base", "bert"), make_data(folder / "data.csv")
    ranks = -(-runs // RATES)
    if runs % ranks:
        raise ValueError(f"--runs {runs}: a multiple of {ranks}")
    rates = [f"{1e-4 * 1.2**k:.6g}" for k in range(runs // ranks)]
    return [
        "-m", f"method.r={','.join(str(2**k) for k in range(ranks))}", f"optimizer.lr={','.join(rates)}", "model=hf",
        f"model.source={base}", "model.name=tiny", "task=text_file", f"task.file={data}", "task.max_length=32",
        f"trainer.max_steps={steps}", "trainer.batch_size=4", "sweep.measure_solo=false", "sweep.progress=false",
    ]  # fmt: skip


def run(arm: str, overrides: Sequence[str], folder: Path, server: Any) -> dict[str, Any]:
    """One sweep in a folder of its own: seconds, CPU seconds of it and its children, and what was mirrored."""
    from wandb_server import KEY

    folder.mkdir(parents=True)
    server.reset()
    online = {"WANDB_API_KEY": KEY} if arm == "online" else {}
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | online | {
        "WANDB_BASE_URL": server.url, "NETRC": str(folder / "none"), "PYTHONPATH": str(REPO), "LORABENCH_CACHE": str(folder / "cache"),
    }  # fmt: skip
    tracker = ["tracker=none"] if arm == "none" else ["tracker=wandb", f"tracker.mode={arm}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lorabench", *overrides, *tracker, "sweep.name=s"],
        cwd=folder, env=env, capture_output=True, text=True,
    )  # fmt: skip
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{arm}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, **mirrored(arm, folder, server), "said": done.stderr.strip()[-300:]}


def mirrored(arm: str, folder: Path, server: Any) -> dict[str, int]:
    """Runs whose mirror holds all of it: offline those with a file, online those with every step of the records."""
    from lorabench.records import Store
    from lorabench.trackers.wandb_runs import steps, wandb_id

    store = Store(folder / "sweeps/s")
    ids = store.run_ids()
    if arm == "offline":
        return {"runs": len(ids), "mirrored": len(list(store.root.glob("runs/*/wandb/offline-run-*/*.wandb")))}
    whole = 0
    for run_id in ids if arm == "online" else ():
        found = server.runs.get(f"me/lorabench/{wandb_id('s', run_id)}")
        whole += found is not None and found.steps == [s for s, _ in steps(store.history(run_id))]
    return {"runs": len(ids), "mirrored": whole}


def ratios(repeats: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Makespan over that of `none` in the same repeat: median, least, most."""
    out = {}
    for arm in ARMS[1:]:
        found = [r[arm]["seconds"] / r["none"]["seconds"] for r in repeats]
        out[arm] = {"median": median(found), "least": min(found), "most": max(found)}
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where a median ratio is above the target; 2 for bad input."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=100)
    p.add_argument("--steps", type=int, default=60, help="optimizer steps a run")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = p.parse_args(argv)
    if min(args.runs, args.steps, args.repeats) < 1:
        print("error: --runs, --steps and --repeats: at least 1", file=sys.stderr)
        return 2
    from wandb_server import WandbServer

    with tempfile.TemporaryDirectory() as made, WandbServer() as server:
        try:
            overrides = settings(Path(made), args.runs, args.steps)
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
        repeats = []
        for k in range(args.repeats):
            turn = ARMS[k % 3 :] + ARMS[: k % 3]
            repeats.append({arm: run(arm, overrides, Path(made, f"{k}-{arm}"), server) for arm in turn})
            print(f"repeat {k}: " + ", ".join(f"{a} {repeats[-1][a]['seconds']:.1f} s" for a in ARMS), file=sys.stderr)
    result = {
        "runs": args.runs, "steps": args.steps, "target": TARGET, "ratios": ratios(repeats), "repeats": repeats,
        "cpus": os.cpu_count(), "load": os.getloadavg(),
    }  # fmt: skip
    for arm, r in result["ratios"].items():  # type: ignore[attr-defined]
        whole = min(x[arm]["mirrored"] for x in repeats)
        print(f"wandb {arm}: {r['median']:.3f} of tracker=none ({r['least']:.3f} to {r['most']:.3f}, {args.repeats} repeats); "
              f"at least {whole} of {args.runs} runs mirrored in full")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(r["median"] > TARGET for r in result["ratios"].values()))  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
