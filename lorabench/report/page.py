"""The files of a report, as text and bytes, from one set of findings. Nothing is written here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lorabench.report import answer, cautions, declared, figures, runs_csv, table_formats, tables, theme
from lorabench.report.budget import about, budget
from lorabench.report.contents import collect
from lorabench.report.tables import Table
from lorabench.results.findings import Findings

HOW_TO_READ = {
    "Cells, runs, packs": (
        "A cell is what is compared: a method with its rank, alpha and targets. "
        "Its runs differ in learning rate and seed. "
        "Runs that trained side by side on one base are a pack; solo is what a run alone would take."
    ),
    "Tune, then confirm": (
        "Inside each cell the learning rate with the best mean on validation "
        "(of the loss, or of the metric that the study declares) over the tuning seeds is chosen; "
        "a rate at which any seed diverged or failed is out. "
        "Fresh seeds then train at that rate only, and they alone are tested."
    ),
    "Intervals": (
        "Seeds and test examples are crossed: "
        "a mean varies through both, and each part counts with the quantile of Student's t that belongs to it. "
        "Groups of examples that belong together (dialogues, near-duplicates) are drawn whole. "
        "For metrics that are no mean over examples the examples' part comes from a bootstrap "
        "that draws the same examples for all seeds."
    ),
    "Two verdicts, kept apart": (
        "Direction says better, worse or not resolved (95 %). "
        "The margin says whether the difference is within what would matter (two one-sided tests, 90 % interval), "
        "beyond it (the interval of the direction), or not resolved. “Not resolved” never means equal."
    ),
    "Recommendation": (
        "From the largest adapter down, each is tested for falling short of the reference by less than the margin; "
        "the first that is not shown to do so stops the sequence. The last that passed is recommended."
    ),
    "Exploratory": (
        "The family is the comparisons with the one reference. "
        "All others are exploratory: their intervals are not adjusted for their number."
    ),
}


def files(f: Findings, title: str | None) -> dict[str, str | bytes]:
    """Return every file of the report by its relative name. Equal findings give equal bytes."""
    contents = collect(f)
    drawings = [*figures.draw(f), *contents.drawings]
    all_tables = {**tables.main_tables(f), **contents.tables}
    values = {
        "title": title or f.sweep.name,
        "about": about(f),
        "declared": declared.study_line(f),
        "question": f.sweep.study.get("question") or "",
        "confirmed": f.confirmed,
        "answer": answer.answer(f),
        "warnings": cautions.warnings(f),
        "budget": budget(f),
        "how": HOW_TO_READ.items(),
        "tables": all_tables,
        "drawings": {d.key: d for d in drawings},
        "main": next((d for d in drawings if d.key.startswith("metric")), None),
        "traces": _traces(f),
        "sections": contents.sections,
    }
    out: dict[str, str | bytes] = {
        "report.md": _markdown(values),
        "report.html": _html(f, values),
        "runs.csv": runs_csv.runs_csv(f),
    }
    for d in drawings:
        out |= {f"figures/{d.key}.svg": d.svg, f"figures/{d.key}.png": d.png}
    for key, table in all_tables.items():
        out |= {f"tables/{key}.tex": table_formats.latex(table), f"tables/{key}.csv": runs_csv.table_csv(table)}
    return out


def _traces(f: Findings) -> list[tuple[str, str, str]]:
    """Return (cell, role, run_ids): the runs behind every number of a cell."""
    return [(r.name, r.role, " ".join(x.run_id for x in r.runs)) for r in f.results.values() if r.runs]


def _environment(*, autoescape: bool) -> Environment:
    env = Environment(
        loader=PackageLoader("lorabench.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    if autoescape:
        env.finalize = _keep_together
        env.filters["breakable"] = _add_break_points
    env.filters |= {"md": table_formats.escape_markdown, "md_table": table_formats.markdown}
    return env


def _keep_together(value: Any) -> Any:
    """Return plain text with the spaces inside `95 %`, `r = 16` and `± 1.7` kept on one line. Markup passes."""
    if type(value) is not str:
        return value
    return value.replace(" %", "\u00a0%").replace(" = ", "\u00a0=\u00a0").replace(" ± ", "\u00a0±\u00a0")


def _add_break_points(text: str) -> Markup:
    """Return a list or a regex of layers, which may go on in a new line after each of its parts."""
    return Markup(re.sub(r"([.+|,/])", r"\1<wbr>", str(escape(text))))


def _markdown(values: Mapping[str, Any]) -> str:
    return _environment(autoescape=False).get_template("report.md.j2").render(values)


def _html(f: Findings, values: Mapping[str, Any]) -> str:
    env = _environment(autoescape=True)
    assert env.loader is not None
    css = Markup(env.loader.get_source(env, "page.css")[0])  # ours, not the user's
    svg = {key: Markup(theme.inline_svg(d)) for key, d in values["drawings"].items()}  # escapes its alt text itself
    forest = _forest(f, values["tables"].get("comparison"))
    return env.get_template("report.html.j2").render(values, css=css, svg=svg, forest=forest)


INTERVAL_WIDTH, INSET = 150.0, 6.0  # of an interval drawn in a table's row, in its own units


def _forest(f: Findings, table: Table | None) -> Sequence[dict[str, float] | None]:
    """Return for each row of the comparison the x positions of its interval, mean and reference, on one scale."""
    intervals = [r.interval for r in table.rows] if table else []
    ends = [x for i in intervals if i for x in i]
    if not ends or min(ends) == max(ends):
        return []
    low, high = min(ends), max(ends)

    def x(value: float) -> float:
        return round(INSET + (value - low) / (high - low) * (INTERVAL_WIDTH - 2 * INSET), 1)

    reference = f.results[f.reference].test if f.reference else None
    at = x(min(max(reference.mean, low), high)) if reference else -10.0
    return [{"low": x(i[0]), "mean": x(i[1]), "high": x(i[2]), "reference": at} if i else None for i in intervals]
