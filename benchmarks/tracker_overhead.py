"""What does mirroring to W&B add to a sweep's makespan, and what does a bad server? On many tiny runs.

    python benchmarks/tracker_overhead.py --json result.json               none, offline, online: 100 runs, 5 repeats
    python benchmarks/tracker_overhead.py --arms none online slow down refusing absent
    python benchmarks/tracker_overhead.py --runs 8 --repeats 1             does it work here?

Makespan: wall seconds of `python -m lorabench -m ...`, with start-up, report and the wait for W&B at the end. What is
sent in the background after that is waited for before the next arm and counted as `seconds_after`. Offline writes W&B's
files. Online sends to a stand-in server on the loopback device (`tests/fixtures/wandb_server.py`), which runs in this
process and so takes its share of the same CPU. Bad servers: slow answers each request `--delay` seconds later, down
refuses connections, refusing answers HTTP 500, absent takes connections and never answers. Arms take turns, in another
order each repeat; a ratio compares arms of one repeat. Nothing leaves the machine. Run it where nothing else runs.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO / "tests"), str(REPO)]

BAD = ("slow", "down", "refusing", "absent")
ARMS = ("none", "offline", "online", *BAD)
REFERENCES = ("none", "online")  # the arms that the others are compared with
MAX_RATIO, MAX_RATIO_BAD = 1.10, 1.05  # of makespans; the second for bad servers
RUNS_PER_RANK = 25
PAUSE_BETWEEN_ARMS = 2.0  # seconds; W&B's own process outlives its parent by a moment


def rank_count(runs: int) -> int:
    """Return how many ranks a grid of so many runs has. Raises `ValueError` for a number that makes no grid."""
    count = -(-runs // RUNS_PER_RANK)
    if runs % count:
        raise ValueError(f"--runs {runs}: a multiple of {count}")
    return count


def settings(folder: Path, runs: int, steps: int) -> list[str]:
    """Make a base and data, and return the overrides of a sweep of `runs` tiny runs on them."""
    from fixtures.runs import make_base, make_data

    base, data = make_base(folder / "base", "bert"), make_data(folder / "data.csv")
    ranks = rank_count(runs)
    rates = [f"{1e-4 * 1.2**k:.6g}" for k in range(runs // ranks)]
    return [
        "-m",
        f"method.r={','.join(str(2**k) for k in range(ranks))}",
        f"optimizer.lr={','.join(rates)}",
        "model=hf",
        f"model.source={base}",
        "model.name=tiny",
        "task=text_file",
        f"task.file={data}",
        "task.max_length=32",
        f"trainer.max_steps={steps}",
        "trainer.batch_size=4",
        "sweep.measure_solo=false",
        "sweep.progress=false",
    ]


@contextmanager
def served(arm: str, server: Any, delay: float) -> Iterator[str]:
    """Yield the address of a server that is as good or bad as the arm says, and make it good again."""
    from fixtures.wandb_server import silence

    server.reset()
    server.delay, server.refuse = delay if arm == "slow" else 0.0, 500 if arm == "refusing" else 0
    if arm == "down":
        server.stop()
    try:
        with silence() as absent:
            yield absent if arm == "absent" else server.url
    finally:
        server.start()
        time.sleep(PAUSE_BETWEEN_ARMS)
        while server.connections:
            time.sleep(0.1)


def run(arm: str, overrides: Sequence[str], folder: Path, server: Any, url: str) -> dict[str, Any]:
    """Run one sweep in a folder of its own. Return its seconds, CPU seconds with children, and what was mirrored."""
    from fixtures.wandb_server import KEY

    folder.mkdir(parents=True)
    online = {} if arm in ("none", "offline") else {"WANDB_API_KEY": KEY}
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        | online
        | {
            "WANDB_BASE_URL": url,
            "NETRC": str(folder / "none"),
            "PYTHONPATH": str(REPO),
            "LORABENCH_CACHE": str(folder / "cache"),
        }
    )
    mode = f"tracker.mode={'online' if online else 'offline'}"
    tracker = ["tracker=none"] if arm == "none" else ["tracker=wandb", mode]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lorabench", *overrides, *tracker, "sweep.name=s"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{arm}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    seconds_after = wait_for_mirror(folder)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds,
        "seconds_after": seconds_after,
        "cpu_seconds": cpu,
        **mirrored_runs(arm, folder, server),
        "said": done.stderr.strip()[-300:],
    }


def wait_for_mirror(folder: Path) -> float:
    """Wait for what a sweep's mirror goes on to send after its end. Return how many seconds that took."""
    from lorabench.store.records import Store
    from lorabench.trackers.wandb.state import SENDING

    start, store = time.perf_counter(), Store(folder / "sweeps/s")
    while store.leases.holder(SENDING) is not None:
        time.sleep(0.1)
    return time.perf_counter() - start


def mirrored_runs(arm: str, folder: Path, server: Any) -> dict[str, int]:
    """Count the runs, and those mirrored in full: offline with a file, online with every step of the records."""
    from lorabench.store.records import Store
    from lorabench.trackers.wandb.runs import history_steps, wandb_id

    store = Store(folder / "sweeps/s")
    ids = store.run_ids()
    if arm == "offline":
        return {"runs": len(ids), "mirrored": len(list(store.root.glob("runs/*/wandb/offline-run-*/*.wandb")))}
    whole = 0
    for run_id in () if arm == "none" else ids:
        remote = server.runs.get(f"me/lorabench/{wandb_id('s', run_id)}")
        whole += remote is not None and remote.steps == [s for s, _ in history_steps(store.history(run_id))]
    return {"runs": len(ids), "mirrored": whole}


def ratios(
    repeats: Sequence[Mapping[str, Mapping[str, Any]]], arms: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return by reference and arm the arm's makespan over the reference's in the same repeat: median, least, most."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for reference in (b for b in REFERENCES if b in arms):
        out[reference] = {}
        for arm in (a for a in arms if a != reference and (a in BAD or reference == "none")):
            quotients = [r[arm]["seconds"] / r[reference]["seconds"] for r in repeats]
            out[reference][arm] = {"median": median(quotients), "least": min(quotients), "most": max(quotients)}
    return out


def max_ratio(arm: str) -> float:
    """Return the ratio of makespans that is aimed at, at most."""
    return MAX_RATIO_BAD if arm in BAD else MAX_RATIO


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where a median ratio is above the target; 2 for bad input."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["none", "offline", "online"], metavar="ARM", help=", ".join(ARMS)
    )
    p.add_argument("--runs", type=int, default=100)
    p.add_argument("--steps", type=int, default=60, help="optimizer steps a run")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--delay", type=float, default=1.0, help="seconds before each answer of the slow server")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = p.parse_args(argv)
    arms = [a for a in ARMS if a in args.arms]
    try:
        if min(args.runs, args.steps, args.repeats) < 1 or args.delay < 0:
            raise ValueError("--runs, --steps and --repeats: at least 1; --delay: at least 0")
        if len(arms) < 2 or not set(arms) & set(REFERENCES):
            raise ValueError(f"--arms {' '.join(args.arms)}: at least two, one of them {' or '.join(REFERENCES)}")
        rank_count(args.runs)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    repeats = measure(arms, args)
    by_reference = ratios(repeats, arms)
    for reference, by_arm in by_reference.items():
        for arm, r in by_arm.items():
            whole = min(x[arm]["mirrored"] for x in repeats)
            print(
                f"{arm}: {r['median']:.3f} of {reference} ({r['least']:.3f} to {r['most']:.3f}, "
                f"{args.repeats} repeats; at most {max_ratio(arm):.2f} wanted); "
                f"at least {whole} of {args.runs} runs mirrored in full"
            )
    if args.json:
        result = {
            "runs": args.runs,
            "steps": args.steps,
            "delay": args.delay,
            "targets": {a: max_ratio(a) for a in arms},
            "ratios": by_reference,
            "repeats": repeats,
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(r["median"] > max_ratio(arm) for by_arm in by_reference.values() for arm, r in by_arm.items()))


def measure(arms: Sequence[str], args: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Return for each repeat what `run` returns for each arm."""
    from fixtures.wandb_server import WandbServer

    repeats: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder, WandbServer() as server:
        overrides = settings(Path(folder), args.runs, args.steps)
        for k in range(args.repeats):
            first = k % len(arms)
            repeats.append({})
            for arm in [*arms[first:], *arms[:first]]:
                with served(arm, server, args.delay) as url:
                    repeats[-1][arm] = run(arm, overrides, Path(folder, f"{k}-{arm}"), server, url)
            print(f"repeat {k}: " + ", ".join(f"{a} {repeats[-1][a]['seconds']:.1f} s" for a in arms), file=sys.stderr)
    return repeats


if __name__ == "__main__":
    sys.exit(main())
