"""Forgetting as the page has it: a picture, a table, and what was matched in words."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from lorabench.report import theme
from lorabench.report.figures import score_interval
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, plus_minus
from lorabench.report.theme import FAINT, Drawing, Look
from lorabench.results import formatting
from lorabench.results.evidence import Evidence
from lorabench.results.findings import Findings
from lorabench.results.forgetting import CellForgetting, Forgetting, Probe, find_forgetting, matched_differences
from lorabench.stats import estimates


def section(f: Findings, e: Evidence, looks: Mapping[str, Look]) -> Section | None:
    """Where runs behind the numbers have a probe."""
    made = find_forgetting(f, e)
    if made is None:
        return None
    drawings = (draw(f, made, looks),) if any(score_interval(f, c.result) for c in made.cells) else ()
    return Section("forgetting", "What the base forgot", tuple(_words(f, made)), drawings, (_table(f, made),))


def spread(p: Probe, e: estimates.Estimate, *, sign: bool = True) -> str:
    """The change with half its 95 % interval over seeds."""
    half = f" ± {p.metric.size(e.half_width(), unit=False)}" if e.seeds > 1 else ""
    return (p.metric.difference(e.mean) if sign and p.before else p.metric.value(e.mean)) + half


def _words(f: Findings, made: Forgetting) -> list[str]:
    p = made.probe
    worse = "a rise" if p.less else "a fall"
    out = [
        f"Probed: {p.said}, {'after minus before training' if p.before else 'after training alone, no value before it is recorded'}; {worse} is forgetting."
    ]
    if made.value is not None:
        along = (
            "the learning rates that were tuned, up to the chosen one"
            if made.how == "rates"
            else "the evaluations of the chosen runs"
        )
        passed = sum(c.matched is not None for c in made.cells)
        out.append(
            f"Matched: validation {f.metric.title} of {f.metric.value(made.value, unit=True)}, which {passed} of {len(made.cells)} cells pass with every "
            f"seed. The probe is read off where each seed first passes it along {along}, straight between the two runs or evaluations around it."
        )
    else:
        out.append(
            "Not matched along rates or evaluations: fewer than two cells have the probe there and pass one value of the target metric "
            "(task.probe_along=true measures it at every evaluation)."
        )
    pairs = matched_differences(made, f)
    for c, reference, d in pairs[:4]:
        low, high = d.interval()
        out.append(
            f"{formatting.capital(c.result.name)} is shown to be within the margin of {reference.result.name} on the test {f.metric.title}; at the chosen rates its {p.what} is "
            f"{p.metric.difference(d.mean, unit=True)} ({p.metric.bounds(low, high)}) against it (95 %, exploratory)."
        )
    return out


# -- the picture ---------------------------------------------------------------------------------------------------------


def draw(f: Findings, made: Forgetting, looks: Mapping[str, Look]) -> Drawing:
    """The change of the probe against the target; beside it, where cells are matched, their paths."""
    shown = [c for c in made.cells if score_interval(f, c.result)]
    with theme.canvas(6.2 if made.value is None else 10.4, 3.9) as figure:
        axes = figure.subplots(1, 1 if made.value is None else 2, sharey=True, squeeze=False)[0]
        target, where = axes[0], "test" if f.confirmed else "validation"
        for c in shown:
            _point(target, f, c, looks[c.result.id])
        theme.label_axes(target, x=f"{where} {f.metric.axis}", y=_axis(made.probe), grid="both")
        theme.format_metric_ticks(target, f.metric, "x")
        theme.format_metric_ticks(target, made.probe.metric)
        theme.draw_end_labels(target, [_label(f, c, looks[c.result.id]) for c in shown], size=9)
        if made.value is not None:
            target.set_title("at the chosen rates")
            _paths(axes[1], f, made, looks)
        for ax in axes:
            if made.probe.before:
                ax.axhline(0, color=FAINT, linewidth=1.0, zorder=1)
        title = "Forgetting against the target metric"
        return theme.render_drawing("forgetting", title, _caption(f, made), _alt(f, made), figure)


def _axis(p: Probe) -> str:
    text = formatting.capital(p.what)
    short = text if len(text) <= 34 else ("Change" if p.before else "Value") + " of the probe"
    return formatting.in_unit(short, p.metric.points)


def _point(ax: Axes, f: Findings, c: CellForgetting, look: Look) -> None:
    s = score_interval(f, c.result)
    assert s is not None
    low, high = c.change.interval() if c.change.seeds > 1 else (c.change.mean, c.change.mean)
    ax.hlines(c.change.mean, s[0], s[2], color=look.colour, linewidth=2.0, alpha=0.5)
    ax.vlines(s[1], low, high, color=look.colour, linewidth=2.0, alpha=0.5)
    ax.plot(
        s[1],
        c.change.mean,
        marker=look.marker,
        color=look.colour,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=4,
    )


def _label(f: Findings, c: CellForgetting, look: Look) -> theme.Label:
    s = score_interval(f, c.result)
    return (s[1] if s else None), c.change.mean, c.result.name, look.colour


def _paths(ax: Axes, f: Findings, made: Forgetting, looks: Mapping[str, Look]) -> None:
    """Every seed's path thin, the mean where it is matched as a point with its interval."""
    assert made.value is not None
    labels: list[theme.Label] = []
    for c in made.cells:
        look = looks[c.result.id]
        for path in c.paths:
            ax.plot(
                [t for t, _ in path],
                [y for _, y in path],
                color=look.colour,
                linestyle=look.dashes,
                linewidth=1.2,
                marker=".",
                markersize=4,
            )
        if c.matched:
            low, high = c.matched.interval() if c.matched.seeds > 1 else (c.matched.mean, c.matched.mean)
            ax.vlines(made.value, low, high, color=look.colour, linewidth=2.0, alpha=0.5, zorder=3)
            ax.plot(
                made.value,
                c.matched.mean,
                marker=look.marker,
                color=look.colour,
                markersize=7,
                markeredgecolor="white",
                markeredgewidth=0.8,
                zorder=4,
            )
        if c.paths:
            ends = [path[-1] for path in c.paths]
            labels.append((max(t for t, _ in ends), max(ends)[1], c.result.name, look.colour))
    ax.axvline(made.value, color=FAINT, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    theme.label_axes(ax, x=f"validation {f.metric.axis}", y="", grid="both")
    theme.format_metric_ticks(ax, f.metric, "x")
    ax.set_title(f"along the {made.how}; dotted: matched")
    theme.draw_end_labels(ax, labels, size=9)


def _caption(f: Findings, made: Forgetting) -> str:
    bars = "over seeds and test examples across" if f.confirmed else "none across"
    text = f"{formatting.capital(made.probe.what)} on data that training did not see, by cell; bars are 95 % intervals, {bars}, over seeds upwards."
    if made.value is not None:
        along = "learning rates" if made.how == "rates" else "evaluations"
        text += f" Right: each seed's runs along its {along}; points on the dotted line are the means where the target passes {f.metric.value(made.value, unit=True)}."
    return text


def _alt(f: Findings, made: Forgetting) -> str:
    said = []
    for c in made.cells:
        text = f"{c.result.name} {spread(made.probe, c.change)}"
        said.append(
            text + (f", matched {spread(made.probe, c.matched)}" if c.matched and made.value is not None else "")
        )
    return f"{formatting.capital(made.probe.what)} against {f.metric.axis}: {'; '.join(said)}."


# -- the table -----------------------------------------------------------------------------------------------------------


def _table(f: Findings, made: Forgetting) -> Table:
    p = made.probe
    unit, points = (f" ({x.measured_in})" if x.measured_in else "" for x in (f.metric, p.metric))
    columns = [
        Column("cell", "cell"), Column("lr", "best lr", "right"),
        Column("test", f"{'test' if f.confirmed else 'val'} {f.metric.title}{unit}", "right"),
        *([Column("before", f"probe {p.metric.title}{points} before", "right")] if p.before else []), Column("after", "after", "right"),
    ]  # fmt: skip
    columns += [Column("change", "change", "right")] if p.before else []
    columns += (
        [Column("matched", f"at val {f.metric.title} {f.metric.value(made.value, unit=True)}", "right")]
        if made.value is not None
        else []
    )
    rows = []
    for c in made.cells:
        r = c.result
        target = plus_minus(f, r) if f.confirmed else f.metric.value(r.val)
        cells = [r.name, formatting.rate(r.lr), target, *([p.metric.value(c.before)] if p.before else [])]
        cells += [p.metric.value(c.after), spread(p, c.change)] if p.before else [spread(p, c.change, sign=False)]
        cells += [spread(p, c.matched) if c.matched else formatting.DASH] if made.value is not None else []
        rows.append(Row(tuple(cells), tuple(x.run_id for x in r.runs)))
    note = f"Probe: {p.said}, {'less' if p.less else 'more'} is better. ±: half the 95 % interval over seeds alone."
    return Table("forgetting", "The probe before and after training", tuple(columns), tuple(rows), (note,))
