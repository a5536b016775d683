"""What a reader must not overlook: gaps, grids that were too small, conditions that differ."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from lorabench.config.runs import digest
from lorabench.report import declared
from lorabench.results import findings, formatting, scores, unfinished
from lorabench.results.cells import Result
from lorabench.results.data_notes import data_caveats, reach_caveat
from lorabench.results.findings import Findings
from lorabench.results.formatting import capital, plural
from lorabench.store.records import MAX_HISTORY_ROWS, Record

MIN_SEEDS = 3  # for a verdict
SMALL_TEST = 200  # examples: below it a single answer moves a share by half a point and more
CONDITIONS = {  # key in a record's provenance -> what it is called
    "precision": "precision",
    "device": "kind of device",
    "cpu": "kind of CPU",
    "data_fingerprint": "version of the data",
    "model_fingerprint": "version of the base",
}
CONFIG_SECTIONS = {  # condition -> section of a config whose axes change it, as they should
    "data_fingerprint": "task",
    "model_fingerprint": "model",
}


def warnings(f: Findings) -> list[str]:
    """Return a line for each, most serious first."""
    return [
        *_declaration_warnings(f),
        *filter(None, (f.sweep.edit_notice,)),
        *_baseline_warnings(f),
        *_gap_warnings(f),
        *_test_warnings(f),
        *_rate_warnings(f),
        *_condition_warnings(f),
        *_data_warnings(f),
    ]


def _declaration_warnings(f: Findings) -> Iterator[str]:
    manifest, margin = f.sweep.manifest, declared.margin_fact(f)
    confirms_nothing = "chosen after the results were there, it confirms nothing."
    if f.sweep.other:
        yield f"The metric is {f.metric.title}, and with it the margin {margin}: {confirms_nothing}"
    elif f.sweep.post_hoc is not None:
        yield f"The margin is {margin}: {confirms_nothing}"
    frozen = manifest.get("frozen") or {}
    before, now = (
        len(frozen.get("confirm_seeds") or ()),
        max((r.test.seeds for r in f.results.values() if r.test), default=0),
    )
    if before and now > before:
        yield (
            f"Confirmation seeds were added after the sweep began: {before} were planned, {now} are there. "
            "Seeds added after a look at the results make verdicts firmer than they are."
        )
    study_hash = manifest.get("study_hash")
    if study_hash and digest(manifest.get("study"))[:12] != study_hash:
        yield f"The study in sweep.json is not the one that was declared: its hash is no longer {study_hash}."


def _baseline_warnings(f: Findings) -> Iterator[str]:
    if not f.confirmed and (baseline := findings.majority_baseline(f)):  # else the answer says it
        label, share = baseline
        yield (
            f"No cell does better on validation than always answering {label} ({f.metric.value(share, unit=True)}): "
            "nothing was learned."
        )


def _data_warnings(f: Findings) -> Iterator[str]:
    notes = (r.provenance.get("data_notes") for r in f.sweep.records.values())
    yield from dict.fromkeys(f"{capital(line)}." for note in notes for line in data_caveats(note))
    used = (r.resources for r in f.sweep.records.values())
    reach = (reach_caveat(u.get("beyond_adapters"), u.get("total_parameters")) for u in used)
    yield from dict.fromkeys(f"{capital(line)}." for line in reach if line)


# -- runs and tests that are missing ---------------------------------------------------------------------------------


def _gap_warnings(f: Findings) -> Iterator[str]:
    sweep, results = f.sweep, f.results.values()
    open_runs = [i for i in sweep.planned if i not in sweep.records]
    if open_runs:
        command = unfinished.continue_command(sweep)
        how = f" {capital(unfinished.HOW_TO_CONTINUE)}{f': {command}' if command else ''}."
        yield (
            f"{plural(len(open_runs), 'run')} of {len(sweep.planned)} had not ended; this is a report of the others."
            f"{how if f.confirmed else ''}"  # else the answer says it
        )
    if empty := unfinished.cells_without_runs(f):
        cells = plural(len(empty), "cell")
        yield f"No run has ended yet of {cells} of {len(results)}: {unfinished.name_list(empty)}."
    if f.confirmed and (untested := [r.name for r in results if r.test is None]):
        yield f"Without a test result: {formatting.name_some(untested)}."
    yield from _other_examples_warning(f)
    if thinned := [r.run_id for _, r in f.cell_records() if f.sweep.store.is_thinned(r.run_id)]:
        rows = f"{MAX_HISTORY_ROWS:,} rows"
        yield f"Curves show every second row or fewer of histories longer than {rows}: {formatting.name_some(thinned)}."
    for r in results:
        yield from _confirmation_warnings(r)


def _other_examples_warning(f: Findings) -> Iterator[str]:
    reference = f.results[f.reference] if f.reference else None
    if reference is None or reference.sample is None:
        return
    other = [r.name for r in f.results.values() if r.sample and scores.has_other_examples(r.sample, reference.sample)]
    if other:
        yield f"Tested on other examples than {reference.name}, so not compared with it: {formatting.name_some(other)}."


def _confirmation_warnings(r: Result) -> Iterator[str]:
    if r.lost:
        left = len(r.runs) if r.role == "confirm" else 0
        what = "its mean is of the survivors and gets no verdict" if left else "it has no test result"
        yield f"{r.name}: {plural(r.lost, 'confirmation run')} of {r.lost + left} diverged or failed; {what}."
    if r.stale:
        runs = plural(r.stale, "confirmation run")
        yield f"{r.name}: {runs} at a rate that is no longer the chosen one; not used."


def _test_warnings(f: Findings) -> Iterator[str]:
    tests = [r.test for r in f.results.values() if r.test is not None]
    if few := sorted({e.seeds for e in tests if e.seeds < MIN_SEEDS}):
        what = "an interval, but no verdict" if few[0] > 1 else "neither an interval nor a verdict"
        yield (
            f"{plural(few[0], 'confirmation seed')} in some cells: {what}. "
            "Three are the least: sweep.confirm_seeds takes more, and keeps what is done."
        )
    if f.confirmed and any(e.examples is None for e in tests):
        yield (
            "Some intervals are over seeds alone, for want of per-example results: "
            "they leave out the luck of the test set and are too narrow."
        )
    smallest = min((e.examples for e in tests if e.examples), default=SMALL_TEST)
    if f.confirmed and smallest < SMALL_TEST:
        yield (
            f"{plural(smallest, 'test example')}: few. More of them (task.test_examples, or a larger file) narrow every "
            "interval here; more seeds alone do not."
        )
    tuning = [r for r in f.sweep.records.values() if r.role == "tune"]
    if leaked := [r for r in tuning if any(k.startswith("test/") for k in r.metrics)]:
        yield f"{plural(len(leaked), 'tuning record')} hold test numbers; they are not used."


# -- learning rates --------------------------------------------------------------------------------------------------


def _rate_warnings(f: Findings) -> Iterator[str]:
    """Yield a line for all cells with the same warning."""
    by_warning: dict[str, list[Result]] = {}
    empty = unfinished.cells_without_runs(f)
    for r in (r for r in f.results.values() if r not in empty):
        if text := _rate_warning(f, r):
            by_warning.setdefault(text, []).append(r)
    for text, cells in by_warning.items():
        yield f"{unfinished.name_list(cells)}: {text}"


def _rate_warning(f: Findings, r: Result) -> str:
    """Return what is wrong with the rates of a cell; empty where nothing is."""
    choice = r.choice
    if choice.beyond:
        tried = ", ".join(formatting.rate(x.lr) for x in choice.beyond)
        return (
            f"every rate {'above' if choice.side == 'high' else 'below'} the best one, {formatting.rate(r.lr)}, "
            f"was pruned ({tried}), so that side is not covered: early losses favour some rates. "
            "The same command with sweep.prune=false trains them to the end."
        )
    if choice.side:
        return (
            f"the best rate, {formatting.rate(r.lr)}, is the {'largest' if choice.side == 'high' else 'smallest'} "
            "of its grid. The true best may lie beyond: widen the grid, "
            "or let the same command with sweep.extend_lr=true do it."
        )
    if choice.lr is None and any(x.unmeasured for x in choice.rates) and not choice.ineligible:
        return f"no validation {f.sweep.selection.replace('_', ' ')} is recorded, so no learning rate could be chosen."
    if choice.lr is None and choice.rates:
        pruned = ", was pruned" if any(x.pruned for x in choice.rates) else ""
        return f"no learning rate is eligible; at every one a seed diverged, failed{pruned} or has not ended."
    if len(choice.rates) == 1:
        return f"one learning rate only ({formatting.rate(r.lr)}), so it is not tuned."
    if not choice.rates and r.runs:
        return f"confirmed at {formatting.rate(r.lr)} {_untuned_text(f, r)}."
    return ""


def _untuned_text(f: Findings, r: Result) -> str:
    tested = {float(x.config["optimizer"]["lr"]) for x in f.sweep.records_of(r.cell.confirm)}
    if len(tested) == 1:
        return "without tuning"
    return (
        f"without tuning, although runs at {plural(len(tested), 'rate')} were tested: "
        "that of most runs, then the best on validation; "
        "the seeds that chose are those that are tested, so its result is too good"
    )


# -- conditions that differ ------------------------------------------------------------------------------------------


def _condition_warnings(f: Findings) -> Iterator[str]:
    for key, what in CONDITIONS.items():
        for cells in _comparable_cells(f, key):
            yield from _differing_cells(cells, key, what)
        yield from _differing_tuning(f, key, what)
    metrics = sorted({str(r.metrics["primary"]) for r in f.sweep.records.values() if r.metrics.get("primary")})
    if len(metrics) > 1:
        names = ", ".join(metrics)
        yield f"Records name different primary metrics ({names}); this report shows {f.sweep.metric}."
    reference = f.sweep.study.get("reference")
    if reference and reference not in f.results:
        instead = f.results[f.reference].name if f.reference else "none"
        yield f"The declared reference, {reference}, is not a cell of this sweep; {instead} stands in."


def _differing_cells(cells: Iterable[Result], key: str, what: str) -> Iterator[str]:
    by_value: dict[str, list[str]] = {}
    for r in cells:
        for value in _condition_values(r.runs, key):
            by_value.setdefault(value, []).append(r.name)
    if len(by_value) > 1:
        groups = sorted(by_value.items(), key=lambda item: (-len(item[1]), item[0]))
        rest = "; ".join(f"{value} for {formatting.name_some(names)}" for value, names in groups[1:])
        yield f"Cells compared here differ in {what}: {groups[0][0]}, but {rest}."


def _differing_tuning(f: Findings, key: str, what: str) -> Iterator[str]:
    by_cell = {r.name: _condition_values(f.sweep.completed_records(r.cell.tune), key) for r in f.results.values()}
    if mixed := [name for name, values in by_cell.items() if len(values) > 1]:
        values = sorted({value for name in mixed for value in by_cell[name]})
        names = formatting.name_some(mixed)
        yield f"Learning rates were chosen among runs that differ in {what} ({', '.join(values)}): {names}."


def _condition_values(runs: Iterable[Record], key: str) -> list[str]:
    """Return the values of a condition among runs, each once. A CPU counts where it was what trained."""
    values = set()
    for r in runs:
        place, machine = r.provenance, r.provenance.get("machine")
        if key == "cpu":
            on_cpu = place.get("device", "cpu") == "cpu" and isinstance(machine, Mapping)
            place = machine if on_cpu and machine else {}
        if place.get(key):
            values.add(str(place[key]))
    return sorted(values)


def _comparable_cells(f: Findings, key: str) -> Collection[list[Result]]:
    """Return groups of cells that should agree in a condition.

    Where the sweep varies data or base, they are the cells of one value of that axis.
    """
    section = CONFIG_SECTIONS.get(key)
    groups: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for r in f.results.values():
        axes = tuple((k, v) for k, v in r.cell.extra if section and k.split(".")[0] == section)
        groups.setdefault(axes, []).append(r)
    return groups.values()
