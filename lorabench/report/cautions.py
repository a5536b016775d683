"""What a reader must not overlook: gaps, grids that were too small, conditions that differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lorabench.config.runs import digest
from lorabench.report import declared
from lorabench.results import findings, formatting, scores, unfinished
from lorabench.results.cells import Result
from lorabench.results.data_notes import data_caveats
from lorabench.results.findings import Findings
from lorabench.results.formatting import plural
from lorabench.store.records import Record

CONDITIONS = {
    "precision": "precision",
    "device": "kind of device",
    "cpu": "kind of CPU",
    "data_fingerprint": "version of the data",
    "model_fingerprint": "version of the base",
}

CONFIG_SECTIONS = {
    "data_fingerprint": "task",
    "model_fingerprint": "model",
}  # sections of a config whose axes change them, as they should


def warnings(f: Findings) -> list[str]:
    """One line each, most serious first."""
    return [*_declaration(f), *_learned(f), *_gaps(f), *_rates(f), *_conditions(f), *_data(f)]


def _learned(f: Findings) -> Iterator[str]:
    if not f.confirmed and (chance := findings.majority_baseline(f)):  # else the answer says it
        yield f"No cell does better on validation than always answering {chance[0]} ({f.metric.value(chance[1], unit=True)}): nothing was learned."


def _data(f: Findings) -> Iterator[str]:
    found = (r.provenance.get("data_notes") for r in f.sweep.records.values())
    yield from dict.fromkeys(f"{formatting.capital(line)}." for notes in found for line in data_caveats(notes))


def _declaration(f: Findings) -> Iterator[str]:
    manifest = f.sweep.manifest
    if f.sweep.other:
        yield f"The metric is {f.metric.title}, and with it the margin {declared.margin_fact(f)}: chosen after the results were there, it confirms nothing."
    elif f.sweep.post_hoc is not None:
        yield f"The margin is {declared.margin_fact(f)}: chosen after the results were there, it confirms nothing."
    if manifest.get("study_hash") and digest(manifest.get("study"))[:12] != manifest["study_hash"]:
        yield f"The study in sweep.json is not the one that was declared: its hash is no longer {manifest['study_hash']}."


def _gaps(f: Findings) -> Iterator[str]:
    sweep, results = f.sweep, f.results.values()
    open_runs = [i for i in sweep.planned if i not in sweep.records]
    if open_runs:
        command = unfinished.continue_command(sweep)
        how = f" {formatting.capital(unfinished.HOW_TO_CONTINUE)}{f': {command}' if command else ''}."
        how = how if f.confirmed else ""  # else the answer says it
        yield f"{plural(len(open_runs), 'run')} of {len(sweep.planned)} had not ended; this is a report of the others.{how}"
    if empty := unfinished.cells_without_runs(f):
        yield f"No run has ended yet of {plural(len(empty), 'cell')} of {len(results)}: {unfinished.name_list(empty)}."
    if f.confirmed and (bare := [r.name for r in results if r.test is None]):
        yield f"Without a test result: {', '.join(bare)}."
    top = f.results[f.reference] if f.reference else None
    if other := [
        r.name for r in results if r.sample and top and top.sample and scores.has_other_examples(r.sample, top.sample)
    ]:
        yield f"Tested on other examples than {top.name if top else ''}, so not compared with it: {', '.join(other)}."
    for r in results:
        if r.lost:
            left = len(r.runs) if r.role == "confirm" else 0
            said = "its mean is of the survivors and gets no verdict" if left else "it has no test result"
            yield f"{r.name}: {plural(r.lost, 'confirmation run')} of {r.lost + left} diverged or failed; {said}."
        if r.stale:
            yield f"{r.name}: {plural(r.stale, 'confirmation run')} at a rate that is no longer the chosen one; not used."
    few = sorted({r.test.seeds for r in results if r.test is not None and r.test.seeds < 3})
    if few:
        given = "an interval, but no verdict" if few[0] > 1 else "neither an interval nor a verdict"
        yield f"{plural(few[0], 'confirmation seed')} in some cells: {given}. Three are the least: sweep.confirm_seeds takes more, and keeps what is done."
    if f.confirmed and any(r.test is not None and r.test.examples is None for r in results):
        yield "Some intervals are over seeds alone, for want of per-example results: they leave out the luck of the test set and are too narrow."
    leaked = [
        r.run_id for r in sweep.records.values() if r.role == "tune" and any(k.startswith("test/") for k in r.metrics)
    ]
    if leaked:
        yield f"{plural(len(leaked), 'tuning record')} hold test numbers; they are not used."


def _rates(f: Findings) -> Iterator[str]:
    """Cells of which the same is to be said share a line."""
    said: dict[str, list[Result]] = {}
    empty = unfinished.cells_without_runs(f)
    for r in (r for r in f.results.values() if r not in empty):
        if text := _rate(f, r):
            said.setdefault(text, []).append(r)
    for text, cells in said.items():
        yield f"{unfinished.name_list(cells)}: {text}"


def _rate(f: Findings, r: Result) -> str:
    """What is wrong with the rates of a cell; empty where nothing is."""
    rates = r.choice.rates
    if r.choice.beyond:
        tried = ", ".join(formatting.rate(x.lr) for x in r.choice.beyond)
        return (f"every rate {'above' if r.choice.side == 'high' else 'below'} the best one, {formatting.rate(r.lr)}, was pruned ({tried}), so that side is "
                "not covered: early losses favour some rates. The same command with sweep.prune=false trains them to the end.")  # fmt: skip
    if r.choice.side:
        end = "largest" if r.choice.side == "high" else "smallest"
        return (
            f"the best rate, {formatting.rate(r.lr)}, is the {end} of its grid. The true best may lie beyond: widen the grid, "
            "or let the same command with sweep.extend_lr=true do it."
        )
    if r.choice.lr is None and rates:
        return f"no learning rate is eligible; at every one a seed diverged, failed{', was pruned' if any(x.pruned for x in rates) else ''} or has not ended."
    if len(rates) == 1:
        return f"one learning rate only ({formatting.rate(r.lr)}), so it is not tuned."
    if not rates and r.runs:
        tested = {float(x.config["optimizer"]["lr"]) for x in f.sweep.records_of(r.cell.confirm)}
        how = ("without tuning" if len(tested) == 1 else f"without tuning, although runs at {plural(len(tested), 'rate')} were tested: "
               "that of most runs, then the best on validation; the seeds that chose are those that are tested, so its result is too good")  # fmt: skip
        return f"confirmed at {formatting.rate(r.lr)} {how}."
    return ""


def _made(runs: Iterable[Record], key: str) -> list[str]:
    """The values of a condition among runs, each once. A CPU counts where it was what trained."""
    found = set()
    for r in runs:
        place, machine = r.provenance, r.provenance.get("machine")
        if key == "cpu":
            here = place.get("device", "cpu") == "cpu" and isinstance(machine, Mapping)
            place = machine if here and machine else {}
        if place.get(key):
            found.add(str(place[key]))
    return sorted(found)


def _one_axis(f: Findings, key: str) -> Iterable[list[Result]]:
    """Cells that should agree in it: where the sweep varies data or base, those of one value of that axis."""
    section = CONFIG_SECTIONS.get(key)
    made: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for x in f.results.values():
        axes = tuple((k, v) for k, v in x.cell.extra if section and k.split(".")[0] == section)
        made.setdefault(axes, []).append(x)
    return made.values()


def _conditions(f: Findings) -> Iterator[str]:
    for key, what in CONDITIONS.items():
        for cells in _one_axis(f, key):
            found: dict[str, list[str]] = {}
            for x in cells:
                for value in _made(x.runs, key):
                    found.setdefault(value, []).append(x.name)
            if len(found) > 1:
                groups = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
                rest = "; ".join(f"{value} for {', '.join(names)}" for value, names in groups[1:])
                yield f"Cells compared here differ in {what}: {groups[0][0]}, but {rest}."
        tuned = {x.name: _made(f.sweep.completed_records(x.cell.tune), key) for x in f.results.values()}
        if mixed := [name for name, values in tuned.items() if len(values) > 1]:
            values = sorted({value for name in mixed for value in tuned[name]})
            yield f"Learning rates were chosen among runs that differ in {what} ({', '.join(values)}): {', '.join(mixed)}."
    tasks = sorted({str(r.metrics["primary"]) for r in f.sweep.records.values() if r.metrics.get("primary")})
    if len(tasks) > 1:
        yield f"Records name different primary metrics ({', '.join(tasks)}); this report shows {f.sweep.metric}."
    if f.sweep.study.get("reference") and f.sweep.study["reference"] not in f.results:
        yield f"The declared reference, {f.sweep.study['reference']}, is not a cell of this sweep; {f.results[f.reference].name if f.reference else 'none'} stands in."
