"""A planned study on the terminal: what it is, a table for each SD, and what a budget buys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from lorabench.results import formatting
from lorabench.results.formatting import plural
from lorabench.results.terminal_tables import WholeWords
from lorabench.runtime.terminal import make_console

Answer = Mapping[str, Any]  # as `plan.plan` makes it


def show(answer: Answer, console: Console | None = None) -> None:
    console = console or make_console()

    def say(text: str = "") -> None:
        console.print(text, soft_wrap=True)

    for line in _study(answer):
        say(line)
    for table in answer["tables"]:
        say()
        console.print(_table(answer, table))
        say(_needed_sentence(answer, table))
    if answer["budget"]:
        say()
        for line in _budget(answer):
            say(line)
    for note in answer["notes"]:
        say(f"- {note}")


def _study(a: Answer) -> Iterator[str]:
    yield f"{a['experiment']}: {a['question'] or 'no question declared (study.question)'}"
    rates, tuning, fresh = len(a["rates"]), len(a["tuning_seeds"]), len(a["confirmation_seeds"])
    yield (
        f"{plural(len(a['cells']), 'cell')}, {plural(rates, 'learning rate')} in all, {plural(tuning, 'tuning seed')}: "
        f"{plural(a['tuning_runs'], 'tuning run')}; {plural(fresh, 'confirmation seed')} x {a['runs_a_confirmation_seed']}: "
        f"{plural(fresh * a['runs_a_confirmation_seed'], 'confirmation run')}"
    )
    sizes = ", ".join(f"{n:,} {name}" for name, n in a["examples"].items())
    yield f"{plural(a['steps'], 'step')} a run; examples: {sizes}"
    yield f"{plural(a['comparisons'], 'comparison')} with {a['reference']}, margin {_size(a, a['margin'])} of {a['metric']}"
    yield "seed variance of each pair alone, df = seeds - 1"
    if a["hours"]:
        h = a["hours"]
        yield f"tuning {_hours(h['tuning'])}, then {_hours(h['seed'])} a confirmation seed; from {h['source']}; loading is extra"
    else:
        yield "hours: not known (nothing was timed)"


def _table(a: Answer, table: Answer) -> WholeWords:
    margin = _size(a, a["margin"])
    title = f"SD of one seed's difference: {_size(a, table['sd'])} ({table['source']})"
    shown = Table(title=title, caption="* as declared; powers are for cells that do not differ", title_justify="left")
    for name in (
        "seeds",
        f"detectable\nat power {a['power']:g}",
        f"power: within\n± {margin}",
        f"power: not worse\nby {margin}",
        "runs",
        "hours",
    ):
        shown.add_column(name, justify="right")
    for row in table["rows"]:
        seeds = f"* {row['seeds']}" if row["declared"] else str(row["seeds"])
        shown.add_row(
            seeds,
            _number(a, row["detectable"]),
            _power(row["equivalence"]),
            _power(row["non_inferiority"]),
            f"{row['runs']:,}",
            formatting.DASH if row["hours"] is None else f"{row['hours']:.2f}",
            style="bold" if row["declared"] else None,
        )
    return WholeWords(shown)


def _needed_sentence(a: Answer, table: Answer) -> str:
    within, worse = (_seeds(table["needed"][key]) for key in ("equivalence", "non_inferiority"))
    return f'power {a["power"]:g}: {within} to show "within ± {_size(a, a["margin"])}", {worse} to show "not worse" by as much'


def _budget(a: Answer) -> Iterator[str]:
    b = a["budget"]
    if not b["rows"]:
        tuning = a["hours"]["tuning"]
        bought = (
            f"buy {plural(b['seeds'], 'confirmation seed')}" if b["hours"] >= tuning else "do not pay for the tuning"
        )
        yield f"{b['hours']:g} hours {bought}, which gives no verdict: three seeds take {_hours(b['three_seeds_take'])} in all."
        return
    yield f"{b['hours']:g} hours buy {plural(b['seeds'], 'confirmation seed')} ({_hours(b['takes'])}):"
    for row in b["rows"]:
        yield (
            f"  at an SD of {_size(a, row['sd'])}, differences from {_size(a, row['detectable'])} on are detected with power {a['power']:g}; "
            f'"within ± {_size(a, a["margin"])}" is shown with power {_power(row["equivalence"])}, '
            f'"not worse" by as much with {_power(row["non_inferiority"])}.'
        )
    yield f"  {b['command']}"


def _number(a: Answer, x: float | None) -> str:
    """Two decimals of a point; four of a metric that is shown as it is."""
    return formatting.number(x, 2 if a["unit"] == "points" else 4)


def _size(a: Answer, x: float) -> str:
    return f"{_number(a, x)} {a['unit']}".strip()


def _power(p: float | None) -> str:
    return formatting.number(p, 2)


def _hours(hours: float) -> str:
    return formatting.duration(3600 * hours)


def _seeds(n: int | None) -> str:
    return "more than 500 seeds" if n is None else plural(n, "seed")
