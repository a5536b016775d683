"""`python -m lorabench.adopt`: results of other tools become records, so that statistics and reports serve them too.

python -m lorabench.adopt results.csv --out sweeps/mine --metric test/accuracy=acc
python -m lorabench.adopt out/run-*/ --out sweeps/mine --set task.name=mnli
python -m lorabench.adopt --attach sweeps/mine/runs/<run_id> --score test/bleu=31.2
python -m lorabench.adopt --attach sweeps/mine/runs/<run_id> --examples per_example.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lorabench.adopt.sources import check_share, from_folders, from_table
from lorabench.config.directions import is_lower_better
from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.runtime.terminal import say
from lorabench.store.records import Store

EXAMPLE_COLUMNS = ("correct", "loss", "weight", "label", "prediction")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.adopt",
        description="Make records of results that others measured: a csv file (one row a run; W&B exports are such), or folders "
        "that PEFT and transformers' Trainer wrote. What a source does not say is marked missing.",
    )
    p.add_argument("source", type=Path, nargs="*", help="one csv file, or folders")
    p.add_argument("--out", type=Path, metavar="SWEEP", help="the sweep's directory, new or one to add to")
    p.add_argument("--column", action="append", default=[], metavar="KEY=COLUMN", help="e.g. method.r=rank_of_adapter")
    p.add_argument("--metric", action="append", default=[], metavar="NAME=COLUMN", help="e.g. test/accuracy=acc")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="equal in all runs, e.g. task.name=mnli"
    )
    p.add_argument("--primary", metavar="METRIC", help="the metric that is compared (default: the first but the loss)")
    way = p.add_mutually_exclusive_group()
    way.add_argument("--lower-is-better", action="store_true", help="less of the primary metric is better")
    way.add_argument("--higher-is-better", action="store_true", help="more is; of a known metric neither is needed")
    p.add_argument("--attach", type=Path, metavar="RUN", help="add an evaluation to a run's record instead")
    p.add_argument("--score", action="append", default=[], metavar="NAME=NUMBER", help="with --attach")
    p.add_argument(
        "--examples", type=Path, metavar="CSV", help=f"with --attach: example and some of {', '.join(EXAMPLE_COLUMNS)}"
    )
    return p


def adopt(args: argparse.Namespace) -> str:
    """Write the records and say how many. Raises `ConfigError` before anything is written."""
    if not args.source or args.out is None:
        raise ConfigError("source", "", "a csv file or folders, and --out with a sweep's directory")
    fixed = _pairs(args.set, "--set")
    if len(args.source) == 1 and args.source[0].is_file():
        records = from_table(
            args.source[0],
            columns=_pairs(args.column, "--column"),
            fixed=fixed,
            metrics=_pairs(args.metric, "--metric"),
            primary=args.primary,
        )
    else:
        records = from_folders(args.source, fixed=fixed, primary=args.primary)
    for record in records:
        record.metrics["lower_is_better"] = _direction(record.metrics["primary"], args)
    store = Store(args.out)
    store.check_foreign()
    for record in records:
        store.write(record)
    missing = sorted({name for record in records for name in record.provenance["missing"]})
    told = f"; nothing was said of {', '.join(missing)}" if missing else ""
    if store.manifest().get("cells"):
        told += (
            "\nthis sweep was planned, and its report lists these runs apart from its cells: to compare them, adopt them "
            "into a directory of their own and set python -m lorabench.compare on both"
        )
    return f"{len(records)} runs in {args.out}{told}\npython -m lorabench.report {args.out} renders the report"


def _direction(metric: str, args: argparse.Namespace) -> bool:
    """Return whether less of a metric is better, as was said, else as its name says. Raises `ConfigError`."""
    known = is_lower_better(metric)
    if args.lower_is_better or args.higher_is_better:
        return bool(args.lower_is_better)
    if known is None:
        allowed = "a metric whose direction is known, or say it: --lower-is-better or --higher-is-better"
        raise ConfigError("--primary", metric, allowed)
    return known


def attach(args: argparse.Namespace) -> str:
    """Add numbers or per-example results to one record. Raises `ConfigError` before anything is written."""
    run = args.attach
    store = Store(run.parent.parent)
    record = store.read(run.name) if run.is_dir() and len(run.name) == 12 else None
    if record is None:
        raise ConfigError("--attach", str(run), "a run's directory, <sweep>/runs/<run_id>")
    scores = {name: _finite(name, text) for name, text in _pairs(args.score, "--score").items()}
    for name, value in scores.items():
        check_share(name, value, "--score")
    bad = [name for name in scores if not name.startswith(("test/", "val/", "probe/"))]
    if bad or not (scores or args.examples):
        raise ConfigError(
            "--score", bad[0] if bad else "", "test/<name>=<number>, val/... or probe/..., or --examples FILE"
        )
    arrays = _examples(args.examples) if args.examples else {}
    held = store.arrays(record.run_id, "test") if arrays else None
    if arrays and "correct" in arrays:
        scores.setdefault("test/accuracy", float(arrays["correct"].mean()))
    if arrays and "loss" in arrays:
        weight = arrays.setdefault("weight", np.ones(len(arrays["loss"]), np.float32))
        scores.setdefault("test/loss", float((arrays["loss"] * weight).sum() / weight.sum()))
    taken = sorted(set(scores) & set(record.metrics))
    if taken:
        raise ConfigError(
            "--score", taken[0], "a metric this record does not hold yet: what was measured is not overwritten"
        )
    ours = "adopted" not in record.provenance
    if record.role == "tune" and ours and any(name.startswith("test/") for name in scores):
        allowed = (
            "a confirmation run: this one took part in choosing the learning rate, so its test result would flatter it"
        )
        raise ConfigError("--attach", record.run_id, allowed)
    if arrays:
        store.write_arrays(
            record.run_id, "test", arrays if held is None else _add_columns(held, arrays, str(args.examples))
        )
    record.metrics |= scores
    record.provenance["attached"] = sorted({*record.provenance.get("attached", []), *scores})
    if any(name.startswith("test/") for name in scores):
        record.role = "confirm"
    store.write(record)
    return f"{record.run_id}: {', '.join(f'{name} = {value:.4g}' for name, value in sorted(scores.items()))}"


def _add_columns(held: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    """Columns [N] of the same examples, whatever their order, beside those that a run holds. Raises `ConfigError`."""
    if sorted(held["example"].tolist()) != sorted(new["example"].tolist()):
        allowed = f"the {len(held['example'])} test examples whose results this run holds already; of others attach the mean, --score test/<name>=NUMBER"
        raise ConfigError("--examples", path, allowed)
    if taken := sorted(set(held) & set(new) - {"example"}):
        raise ConfigError("--examples", path, f"columns this run does not hold yet; it has {', '.join(taken)}")
    at = dict(zip(new["example"].tolist(), range(len(new["example"])), strict=True))
    order = [at[i] for i in held["example"].tolist()]
    return {**held, **{name: column[order] for name, column in new.items() if name != "example"}}


def _examples(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError("--examples", str(path), f"a csv file with a header, in UTF-8 ({e})") from e
    have = [name for name in EXAMPLE_COLUMNS if rows and name in rows[0]]
    if not rows or "example" not in rows[0] or not {"correct", "loss"} & set(have):
        raise ConfigError("--examples", str(path), "columns example (a whole number each) and correct or loss")
    try:
        arrays = {"example": np.array([int(row["example"]) for row in rows], dtype=np.uint64)}
        for name in have:
            kind = np.float32 if name in ("loss", "weight") else np.int32
            arrays[name] = np.array([float(row[name]) for row in rows], dtype=kind)
    except (TypeError, ValueError, OverflowError) as e:
        raise ConfigError("--examples", str(path), f"numbers in every row ({e})") from e
    if len(set(arrays["example"].tolist())) != len(rows):
        raise ConfigError("--examples", str(path), "one row an example")
    return arrays


def _pairs(texts: Sequence[str], option: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not (key and sign and value):
            raise ConfigError(option, text, "KEY=VALUE")
        found[key] = value
    return found


def _finite(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as e:
        raise ConfigError("--score", f"{name}={text}", "a number") from e
    if not np.isfinite(value):
        raise ConfigError("--score", f"{name}={text}", "a finite number")
    return value


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0, or 2 with one line for bad input and nothing written."""
    args = parser().parse_args(argv)
    say(attach(args) if args.attach else adopt(args))


if __name__ == "__main__":
    sys.exit(main())
