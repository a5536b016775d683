"""Forgetting as the page has it: a picture, a table, and what was matched in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes

from lorabench.report import theme
from lorabench.report.figures import score_interval
from lorabench.report.section import Section
from lorabench.report.tables import Column, Row, Table, metric_title, plus_minus, run_ids, unit_suffix
from lorabench.report.theme import FAINT, Drawing, Look
from lorabench.results import formatting
from lorabench.results.evidence import Evidence
from lorabench.results.findings import Findings
from lorabench.results.forgetting import CellForgetting, Forgetting, Probe, find_forgetting, matched_differences
from lorabench.stats.estimates import Estimate

MAX_AXIS_TITLE = 34  # characters of a probe's own name
MAX_PAIRS = 4  # compared in a sentence each


def section(f: Findings, e: Evidence, looks: Mapping[str, Look]) -> Section | None:
    """Return the section where runs behind the numbers have a probe."""
    forgetting = find_forgetting(f, e)
    if forgetting is None:
        return None
    has_scores = any(score_interval(f, c.result) for c in forgetting.cells)
    drawings = (draw(f, forgetting, looks),) if has_scores else ()
    texts = (_probe_sentence(forgetting.probe), _matching_sentences(f, forgetting), *_pair_sentences(f, forgetting))
    return Section("forgetting", "What the base forgot", texts, drawings, (_table(f, forgetting),))


def spread(p: Probe, e: Estimate, *, sign: bool = True) -> str:
    """Return the change with half its 95 % interval over seeds."""
    half = f" ± {p.metric.size(e.half_width(), unit=False)}" if e.seeds > 1 else ""
    return (p.metric.difference(e.mean) if sign and p.before else p.metric.value(e.mean)) + half


# -- words -----------------------------------------------------------------------------------------------------------


def _probe_sentence(p: Probe) -> str:
    measured = "after minus before training" if p.before else "after training alone, no value before it is recorded"
    return f"Probed: {p.said}, {measured}; {'a rise' if p.less else 'a fall'} is forgetting."


def _matching_sentences(f: Findings, forgetting: Forgetting) -> str:
    if forgetting.value is None:
        return (
            "Not matched along rates or evaluations: "
            "fewer than two cells have the probe there and pass one value of the target metric "
            "(task.probe_along=true measures it at every evaluation)."
        )
    passed = sum(c.matched is not None for c in forgetting.cells)
    along = "the evaluations of the chosen runs"
    if forgetting.how == "rates":
        along = "the learning rates that were tuned, up to the chosen one"
    return (
        f"Matched: validation {f.metric.title} of {f.metric.value(forgetting.value, unit=True)}, "
        f"which {passed} of {len(forgetting.cells)} cells pass with every seed. "
        f"The probe is read off where each seed first passes it along {along}, "
        "straight between the two runs or evaluations around it."
    )


def _pair_sentences(f: Findings, forgetting: Forgetting) -> Iterator[str]:
    p = forgetting.probe
    for cell, reference, difference in matched_differences(forgetting, f)[:MAX_PAIRS]:
        change = f"{p.metric.difference(difference.mean, unit=True)} ({p.metric.bounds(*difference.interval())})"
        yield (
            f"{formatting.capital(cell.result.name)} is shown to be within the margin of {reference.result.name} "
            f"on the test {f.metric.title}; at the chosen rates its {p.what} is {change} against it "
            "(95 %, exploratory)."
        )


# -- the picture -----------------------------------------------------------------------------------------------------


def draw(f: Findings, forgetting: Forgetting, looks: Mapping[str, Look]) -> Drawing:
    """Draw the change of the probe against the target; beside it, where cells are matched, their paths."""
    shown = [c for c in forgetting.cells if score_interval(f, c.result)]
    is_matched = forgetting.value is not None
    with theme.canvas(10.4 if is_matched else 6.2, 3.9) as figure:
        axes = figure.subplots(1, 2 if is_matched else 1, sharey=True, squeeze=False)[0]
        _draw_changes(axes[0], f, forgetting, shown, looks)
        if is_matched:
            axes[0].set_title("at the chosen rates")
            _draw_paths(axes[1], f, forgetting, looks)
        for ax in axes:
            if forgetting.probe.before:
                ax.axhline(0, color=FAINT, linewidth=1.0, zorder=1)
        title = "Forgetting against the target metric"
        caption, alt = _caption(f, forgetting), _alt(f, forgetting)
        return theme.render_drawing("forgetting", title, caption, alt, figure)


def _draw_changes(
    ax: Axes, f: Findings, forgetting: Forgetting, shown: Sequence[CellForgetting], looks: Mapping[str, Look]
) -> None:
    labels: list[theme.Label] = []
    for c in shown:
        interval, look = score_interval(f, c.result), looks[c.result.id]
        assert interval is not None
        low, mean, high = interval
        ax.hlines(c.change.mean, low, high, color=look.colour, linewidth=2.0, alpha=0.5)
        ax.vlines(mean, *_bounds(c.change), color=look.colour, linewidth=2.0, alpha=0.5)
        theme.draw_point(ax, mean, c.change.mean, look)
        labels.append((mean, c.change.mean, c.result.name, look.colour))
    split = "test" if f.confirmed else "validation"
    theme.label_axes(ax, x=f"{split} {f.metric.axis}", y=_probe_axis(forgetting.probe), grid="both")
    theme.format_metric_ticks(ax, f.metric, "x")
    theme.format_metric_ticks(ax, forgetting.probe.metric)
    theme.draw_end_labels(ax, labels, size=9)


def _bounds(e: Estimate) -> tuple[float, float]:
    return e.interval() if e.seeds > 1 else (e.mean, e.mean)


def _probe_axis(p: Probe) -> str:
    title = formatting.capital(p.what)
    if len(title) > MAX_AXIS_TITLE:
        title = f"{'Change' if p.before else 'Value'} of the probe"
    return formatting.in_unit(title, p.metric.points)


def _draw_paths(ax: Axes, f: Findings, forgetting: Forgetting, looks: Mapping[str, Look]) -> None:
    """Draw every seed's path thin, the mean where it is matched as a point with its interval."""
    assert forgetting.value is not None
    labels: list[theme.Label] = []
    for c in forgetting.cells:
        look = looks[c.result.id]
        for path in c.paths:
            targets, changes = [x for x, _ in path], [y for _, y in path]
            line = {"color": look.colour, "linestyle": look.dashes}
            ax.plot(targets, changes, linewidth=1.2, marker=".", markersize=4, **line)
        if c.matched:
            ax.vlines(forgetting.value, *_bounds(c.matched), color=look.colour, linewidth=2.0, alpha=0.5, zorder=3)
            theme.draw_point(ax, forgetting.value, c.matched.mean, look)
        if c.paths:
            ends = [path[-1] for path in c.paths]
            labels.append((max(x for x, _ in ends), max(ends)[1], c.result.name, look.colour))
    ax.axvline(forgetting.value, color=FAINT, linewidth=1.0, linestyle=theme.DOTTED, zorder=1)
    theme.label_axes(ax, x=f"validation {f.metric.axis}", y="", grid="both")
    theme.format_metric_ticks(ax, f.metric, "x")
    ax.set_title(f"along the {forgetting.how}; dotted: matched")
    theme.draw_end_labels(ax, labels, size=9)


def _caption(f: Findings, forgetting: Forgetting) -> str:
    bars = "over seeds and test examples across" if f.confirmed else "none across"
    text = (
        f"{formatting.capital(forgetting.probe.what)} on data that training did not see, by cell; "
        f"bars are 95 % intervals, {bars}, over seeds upwards."
    )
    if forgetting.value is None:
        return text
    along = "learning rates" if forgetting.how == "rates" else "evaluations"
    return (
        f"{text} Right: each seed's runs along its {along}; points on the dotted line are the means "
        f"where the target passes {f.metric.value(forgetting.value, unit=True)}."
    )


def _alt(f: Findings, forgetting: Forgetting) -> str:
    p = forgetting.probe
    cells = []
    for c in forgetting.cells:
        matched = f", matched {spread(p, c.matched)}" if c.matched and forgetting.value is not None else ""
        cells.append(f"{c.result.name} {spread(p, c.change)}{matched}")
    return f"{formatting.capital(p.what)} against {f.metric.axis}: {'; '.join(cells)}."


# -- the table -------------------------------------------------------------------------------------------------------


def _table(f: Findings, forgetting: Forgetting) -> Table:
    p = forgetting.probe
    columns = [
        Column("cell", "cell"),
        Column("lr", "best lr", "right"),
        Column("test", metric_title(f, "test" if f.confirmed else "val"), "right"),
    ]
    if p.before:
        columns.append(Column("before", f"probe {p.metric.title}{unit_suffix(p.metric)} before", "right"))
    columns.append(Column("after", "after", "right"))
    if p.before:
        columns.append(Column("change", "change", "right"))
    if forgetting.value is not None:
        target = f.metric.value(forgetting.value, unit=True)
        columns.append(Column("matched", f"at val {f.metric.title} {target}", "right"))
    rows = tuple(_row(f, forgetting, c) for c in forgetting.cells)
    note = f"Probe: {p.said}, {'less' if p.less else 'more'} is better. ±: half the 95 % interval over seeds alone."
    return Table("forgetting", "The probe before and after training", tuple(columns), rows, (note,))


def _row(f: Findings, forgetting: Forgetting, c: CellForgetting) -> Row:
    p, r = forgetting.probe, c.result
    texts = [r.name, formatting.rate(r.lr), plus_minus(f, r) if f.confirmed else f.metric.value(r.val)]
    if p.before:
        texts += [p.metric.value(c.before), p.metric.value(c.after), spread(p, c.change)]
    else:
        texts.append(spread(p, c.change, sign=False))
    if forgetting.value is not None:
        texts.append(spread(p, c.matched) if c.matched else formatting.DASH)
    return Row(tuple(texts), run_ids(r))
