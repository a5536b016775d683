"""`python -m lorabench.plan <experiment or grid>`: what a study can show and what it costs, before anything of it runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command

if TYPE_CHECKING:
    from lorabench.launch.listing import Listing
    from lorabench.plan.study import Hours, StudyPlan
    from lorabench.results.sweep import Sweep
    from lorabench.stats.power import Design

TABLE_SEEDS = (3, 5, 8, 10, 15, 20, 35)
MAX_BUDGET_SEEDS = (
    500  # confirmation seeds that a budget is spent on: more would show no more, and no command line holds them
)
ASSUMED_SDS = (0.01, 0.014, 0.02)  # SDs shown where none is known: of accuracies and other shares
AUXILIARY_NOTE = "Hours are without what confirmation runs measure beside the test (task.probe, replies): a pilot that measures it knows."
ASSUMED_MARGIN_SHARES = (0.5, 0.7, 1.0)  # of other metrics: the same beside a margin of two points


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.plan",
        description="Seeds, runs, hours, smallest detectable difference and power of an experiment, before it runs.",
    )
    p.add_argument(
        "words",
        nargs="+",
        metavar="EXPERIMENT | key=value",
        help="an experiment's name, as in +experiment=NAME, and settings as for the sweep itself; or a grid of them",
    )
    p.add_argument("-m", "--multirun", action="store_true", help="as on the sweep's command line; always so here")
    p.add_argument(
        "--sd", type=float, metavar="X", help="SD of one seed's difference of two cells; accuracies: in points"
    )
    p.add_argument("--pilot", type=Path, metavar="SWEEP", help="a finished sweep's directory: its SD and its seconds")
    p.add_argument("--hours", type=float, metavar="H", help="a budget: what does it buy?")
    p.add_argument("--power", type=float, default=0.8, metavar="P", help="wanted power (default 0.8)")
    p.add_argument(
        "--no-measure", action="store_true", help="do not time a few steps; without a pilot hours stay blank"
    )
    p.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="a folder of your own that holds experiment/NAME.yaml"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    return p


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """All that is printed, as data. Differences and SDs are in the unit that reports show. Raises `ConfigError`.

    args: as `read` returns them.
    """
    _check(args)
    from lorabench.launch.listing import list_jobs
    from lorabench.plan.study import cautions, count_study, facts

    listing = list_jobs(args.experiment, args.overrides, user_config_dir=args.config_dir)
    study = count_study(listing.jobs)
    notes: list[str] = []
    sweep = _load_pilot(args.pilot, study) if args.pilot else None
    designs = _designs(args, study, sweep, notes)
    hours = _hours(args, study, sweep, notes)
    notes += cautions(study)
    found: dict[str, Any] = {"experiment": args.experiment or study.settings.sweep.name, "power": args.power} | facts(
        study
    )
    found["hours"] = asdict(hours) if hours else None
    found["tables"] = [
        {
            "sd": d.sd,
            "source": source,
            "rows": _rows(study, d, args.power, hours),
            "needed": _needed_seeds(study, d, args.power),
        }
        for d, source in designs
    ]
    found["budget"] = _budget(args, study, listing, [d for d, _ in designs], hours) if hours and args.hours else None
    return found | {"notes": notes}


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line: `experiment`, a name or None for a grid of its own, `overrides`, and the options."""
    args = parser().parse_intermixed_args(argv)
    named = [word for word in args.words if "=" not in word or word.startswith("+experiment=")]
    args.experiment = named[0].removeprefix("+experiment=") if named else None
    args.overrides = [word for word in args.words if word not in named[:1]]
    return args


def _check(args: argparse.Namespace) -> None:
    for key in ("sd", "hours"):
        value = getattr(args, key)
        if value is not None and not 0 < value < 1e9:
            raise ConfigError(f"--{key}", value, "a number above 0")
    if not 0.05 < args.power < 1:
        raise ConfigError("--power", args.power, "a number between 0.05 and 1")
    if args.hours is not None and args.no_measure and args.pilot is None:
        raise ConfigError(
            "--hours", args.hours, "a pilot (--pilot) or a measurement (no --no-measure): hours are unknown"
        )
    if args.experiment and "/" in args.experiment and Path(args.experiment).is_dir():
        allowed = "an experiment's name, as in +experiment=NAME; a finished sweep is for --pilot"
        raise ConfigError("experiment", args.experiment, allowed)
    if args.json is not None and args.json.is_dir():
        raise ConfigError("--json", str(args.json), "a file's name; this is a folder")


def _load_pilot(folder: Path, study: StudyPlan) -> Sweep:
    """The pilot, after checking that it speaks of the same metric and base."""
    from lorabench.results.sweep import load

    sweep, base = load(folder), study.tuning[0].model.source
    if sweep.metric != study.metric.name:
        raise ConfigError("--pilot", str(folder), f"a sweep by {study.metric.name}; this one goes by {sweep.metric}")
    bases = {r.config.get("model", {}).get("source", "") for r in sweep.records.values()}
    if bases != {base}:
        raise ConfigError("--pilot", str(folder), f"a sweep of the same base, {base}; this one's: {_join(bases)}")
    return sweep


def _designs(
    args: argparse.Namespace, study: StudyPlan, sweep: Sweep | None, notes: list[str]
) -> list[tuple[Design, str]]:
    """One design for each SD to show, and where that SD comes from. Seeds are filled in later."""
    from lorabench.stats.power import Design, example_half_width, sd_interval

    def design(sd: float) -> Design:
        return Design(sd, seeds=2, comparisons=study.comparisons)

    scale, examples = study.metric.scale, study.examples["test"]
    if args.sd is not None:
        return [(design(args.sd), "given")]
    if sweep is None:
        notes.append(
            "The SD is unknown: these are examples. Measure it first, with a pilot of few cells and 4 seeds or more."
        )
        shares = scale != 1
        return [
            (design(x * scale if shares else x * study.margin), "assumed")
            for x in (ASSUMED_SDS if shares else ASSUMED_MARGIN_SHARES)
        ]
    from lorabench.plan.pilot import noise

    seen = noise(sweep, examples=examples)
    low, high = sd_interval(seen.sd * scale, seen.df)
    source = f"pilot: {seen.cells} cells, {seen.seeds} seeds, df {seen.df:.0f}, 95 % interval {low:.2f} to {high:.2f}"
    if not seen.alike:
        notes.append("The pilot's cells scatter unequally from seed to seed: this is their mean SD, read it with care.")
    made = design(seen.sd * scale)
    if seen.example_sd:
        made = replace(made, example_sd=seen.example_sd * scale, examples=examples)
        notes.append(
            f"{examples:,} test examples leave ± {example_half_width(made):.2f} (95 %) however many seeds there are; counted in."
        )
    return [(made, source)]


def _hours(args: argparse.Namespace, study: StudyPlan, sweep: Sweep | None, notes: list[str]) -> Hours | None:
    from lorabench.plan.study import has_auxiliary_measures, hours, measure_paces, methods_without_pace

    lacking = [AUXILIARY_NOTE] if any(has_auxiliary_measures(cell.run.to_dict()) for cell in study.cells) else []
    if sweep is not None:
        from lorabench.plan.pilot import paces
        from lorabench.runtime.provenance import machine

        known = paces(sweep)
        found = hours(study, known, "the pilot's records")
        cpus = {(r.provenance.get("machine") or {}).get("cpu") for r in sweep.records.values()}
        if found and cpus != {machine()["cpu"]}:
            notes.append(f"The pilot's seconds are those of other hardware ({_join(cpus)}).")
        if found:
            notes += [] if any(has_auxiliary_measures(r.config) for r in sweep.records.values()) else lacking
            return found
        notes.append(f"The pilot has no times of method {', '.join(methods_without_pace(study, known))}.")
    if args.no_measure:
        if args.hours is not None:
            raise ConfigError(
                "--hours", args.hours, "a pilot with times of every method, or a measurement: hours are unknown"
            )
        return None
    known, once = measure_paces(study)
    notes += lacking
    source = "a few steps of the smallest and the largest cell of each kind of method, alone"
    return hours(study, known, source, once)


def _rows(study: StudyPlan, design: Design, power: float, hours: Hours | None) -> list[dict[str, Any]]:
    return [
        _row(study, design.at(S), power, hours) if S > 1 else _row_without_verdict(study, S, hours)
        for S in sorted({*TABLE_SEEDS, study.seeds} - {0})
    ]


def _row_without_verdict(study: StudyPlan, seeds: int, hours: Hours | None) -> dict[str, Any]:
    """Too few seeds for a verdict."""
    shown = {
        "seeds": seeds,
        "declared": seeds == study.seeds,
        "detectable": None,
        "equivalence": None,
        "non_inferiority": None,
    }
    return shown | {"runs": study.runs(seeds), "hours": hours.at(seeds) if hours else None}


def _row(study: StudyPlan, design: Design, power: float, hours: Hours | None) -> dict[str, Any]:
    from lorabench.stats.power import MIN_SEEDS, equivalence, non_inferiority, smallest_detectable

    blank = _row_without_verdict(study, design.seeds, hours)
    if design.seeds < MIN_SEEDS:
        return blank
    return blank | {
        "detectable": smallest_detectable(design, power=power),
        "equivalence": equivalence(design, study.margin),
        "non_inferiority": non_inferiority(design, study.margin),
    }


def _needed_seeds(study: StudyPlan, design: Design, power: float) -> dict[str, int | None]:
    """Seeds for the wanted power at the margin, where the true difference is none."""
    from lorabench.stats.power import equivalence, non_inferiority, seeds_needed

    return {
        "equivalence": seeds_needed(design, lambda d: equivalence(d, study.margin), power),
        "non_inferiority": seeds_needed(design, lambda d: non_inferiority(d, study.margin), power),
    }


def _budget(
    args: argparse.Namespace, study: StudyPlan, listing: Listing, designs: Sequence[Design], hours: Hours
) -> dict[str, Any]:
    """The largest number of confirmation seeds that fit, and what it resolves for each SD."""
    seeds = min(MAX_BUDGET_SEEDS, max(0, int((args.hours - hours.tuning) / hours.seed + 1e-9)))
    found: dict[str, Any] = {"hours": args.hours, "seeds": seeds, "takes": hours.at(seeds), "rows": [], "command": None}
    if seeds >= 3:
        found["rows"] = [{"sd": d.sd} | _row(study, d.at(seeds), args.power, hours) for d in designs]
        found["command"] = _command(args, study, listing, seeds)
    else:
        found["three_seeds_take"] = hours.at(3)
    return found


def _command(args: argparse.Namespace, study: StudyPlan, listing: Listing, seeds: int) -> str:
    """The sweep with so many confirmation seeds: those declared first, then fresh ones."""
    declared, tuning = list(study.settings.sweep.confirm_seeds), {run.seed for run in study.tuning}
    fresh = (s for s in range(max(declared, default=99) + 1, 2**31) if s not in tuning)
    chosen = [*declared[:seeds], *(next(fresh) for _ in range(seeds - len(declared)))]
    kept = [o for o in args.overrides if o.lstrip("+").split("=", 1)[0] != "sweep.confirm_seeds"]
    words = ["python", "-m", "lorabench", *([] if listing.multirun else ["-m"])]
    words += ["--config-dir", str(args.config_dir)] if args.config_dir else []
    words += [f"+experiment={args.experiment}"] if args.experiment else []
    words += [*kept, f"sweep.confirm_seeds=[{','.join(map(str, chosen))}]"]
    return shlex.join(words)


def _join(values: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exit 0: printed; 2: bad input, nothing written."""
    args = read(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as for the sweep itself (`__main__`): it is what is timed
    found = plan(args)
    if args.json:
        from lorabench.runtime.files import atomic_write
        from lorabench.store.records import dump_json

        atomic_write(args.json, dump_json(found))
    from lorabench.plan.table import show

    show(found)


if __name__ == "__main__":
    sys.exit(main())
