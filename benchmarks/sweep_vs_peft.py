"""The same LoRA sweep as peft users run it today and as lorabench runs it, in one call and in turn.

    python benchmarks/sweep_vs_peft.py --json result.json
    python benchmarks/sweep_vs_peft.py --runs 2 --repeats 1 --train-examples 160          # does it work here?

  trainer_processes   one process a run: peft + transformers.Trainer, dynamic padding, its defaults (float32)
  trainer_tuned       the same with Trainer's bf16 and length grouping
  peft_loop           one process: peft in a plain torch loop, float32, base loaded once, rows tokenised once
  lorabench           `python -m lorabench -m ...`, precision auto, from the command to the report
  lorabench_fp32      the same in float32: what peft_loop is compared with
  lorabench_pruned    with --prune: the same with sweep.prune=true, on a grid of eight rates a rank

Equal in all: rows, max length, epochs, batch size, AdamW, schedule, clipping, dropout, evaluations, seed, a saved adapter a
run; steps, tokens and trainable parameters are compared and a difference is an error. Start-up counts in all. lorabench's
sweep.measure_solo is off: it measures cells alone, for its tables, which no peer does. Its makespan does hold the reading,
de-duplication and splitting of the whole task, while the peers read their rows ready from a file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, wherever it is called from

from benchmarks import sweep_grid as g
from benchmarks.sweep_launch import BenchmarkFailed
from benchmarks.sweep_results import Outcome, check_equal_work, summary
from benchmarks.sweep_variants import Bench

BUSY = 0.6  # load a core above which a note is printed; the export itself is one process
PACKAGES = ("torch", "transformers", "peft", "accelerate", "rich", "lorabench")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, d = made.add_argument, g.Settings()
    counts = {
        "runs": "of the grid: 1, 2, 4, 6, 8 or a multiple of 4", "repeats": "of everything; a ratio is their median",
        "train-examples": "rows", "val-examples": "rows", "batch-size": "rows", "epochs": "of a run", "evaluations": "of a run",
    }  # fmt: skip
    for name, about in counts.items():
        default = getattr(d, name.replace("-", "_"))
        option(f"--{name}", type=_positive, default=default, metavar="N", help=f"{about} (default {default})")
    option("--dropout", type=_dropout, default=0.0, metavar="P", help="of the base; none: its own (default 0.0)")
    option("--device", choices=("cpu", "cuda"), default=d.device, help="(default %(default)s)")
    option("--model", choices=tuple(g.MODELS), default=d.model, help="(default %(default)s)")
    option("--seed", type=int, default=d.seed, help="(default %(default)s)")
    option("--variants", type=_variants, metavar="A,B", help=f"some of {', '.join([*g.VARIANTS, g.PRUNED])}")
    option("--prune", action="store_true", help=f"{g.PRUNED} too, and a grid of eight rates a rank for all variants")
    option("--json", type=Path, metavar="FILE", help="write the result there")
    option("--keep", type=Path, metavar="DIR", help="keep adapters, records, reports and logs in this new or empty one")
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number above 0")
    return int(text)


def _dropout(text: str) -> float | None:
    try:
        value = None if text == "none" else float(text)
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value <= 0.9:
        raise argparse.ArgumentTypeError(f"{text!r}: none, or a number from 0 to 0.9")
    return value


def _variants(text: str) -> tuple[str, ...]:
    known = (*g.VARIANTS, g.PRUNED)
    asked = tuple(text.split(","))
    if unknown := [name for name in asked if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: allowed are {', '.join(known)}")
    return tuple(name for name in known if name in asked)


SAME = ("runs", "repeats", "train_examples", "val_examples", "batch_size", "epochs", "evaluations", "dropout", "device",
        "model", "seed", "prune")  # fmt: skip


def settings_of(args: argparse.Namespace) -> g.Settings:
    """Raises ValueError for numbers that do not go together, and for packages and folders that are not there."""
    chosen = args.variants or (*g.VARIANTS, *([g.PRUNED] if args.prune else []))
    if g.PRUNED in chosen and not args.prune:
        raise ValueError(f"--variants {g.PRUNED}: needs --prune, which sets the grid for all variants")
    s = g.Settings(**{name: getattr(args, name) for name in SAME}, variants=chosen)
    g.grid(s.runs, s.model, prune=s.prune)
    if s.evaluations > s.steps:
        raise ValueError(f"--evaluations {s.evaluations}: at most one a step; these settings make {s.steps} steps")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}. In the checkout: make install, or pip install -e '.[dev]'"
        )
    if args.json and not args.json.resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: no such folder {args.json.parent}")
    if args.keep and args.keep.exists() and (not args.keep.is_dir() or any(args.keep.iterdir())):
        raise ValueError(f"--keep {args.keep}: not an empty folder")
    return s


def benchmark(s: g.Settings, root: Path) -> dict[str, Any]:
    """All repeats; the order of variants turns from one to the next, so that drift favours none."""
    repeat = 0

    def say(name: str, seconds: float) -> None:
        print(f"[{repeat + 1}/{s.repeats}] {name}: {seconds:.1f} s", flush=True)

    (root / "shared").mkdir(parents=True)
    bench = Bench(s, root / "shared", say)
    bench.export()
    machine = bench.facts["machine"]
    if machine["load"] > BUSY * machine["cores"]:
        print(
            f"note: load {machine['load']} on {machine['cores']} cores: what else runs here blurs the ratios",
            flush=True,
        )
    outcomes: list[Outcome] = []
    rooflines: list[dict[str, float]] = []
    for repeat in range(s.repeats):
        rooflines.append(bench.roofline())
        turn = repeat % len(s.variants)
        order = (*s.variants[turn:], *s.variants[:turn])
        outcomes += [bench.run(variant, repeat, root / f"repeat{repeat + 1}" / variant) for variant in order]
        check_equal_work(outcomes, s, bench.facts["tokens"])
    rooflines.append(bench.roofline())
    roofline = {name: median(one[name] for one in rooflines) for name in rooflines[0]}
    return summary(outcomes, s, bench.facts, roofline)


def _stopped(*_: Any) -> None:
    """SIGTERM: an exception, so that the child and the scratch folder go too."""
    print("stopped", file=sys.stderr)
    sys.exit(143)


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(argv)
    try:
        s = settings_of(args)
    except ValueError as e:
        made.error(str(e))
    signal.signal(signal.SIGTERM, _stopped)
    folder = nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory(prefix="sweep-benchmark-")
    try:
        with folder as root:
            result = benchmark(s, Path(root).resolve())
    except BenchmarkFailed as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        return 130
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    from rich.console import Console

    from benchmarks.sweep_table import tables

    console = Console()
    for table in tables(result):
        console.print(table, highlight=False)
        console.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
