"""What the numbers cost and where they come from: no table without its budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lorabench.report import declared
from lorabench.report.tables import step_list
from lorabench.results import formatting
from lorabench.results.findings import Findings
from lorabench.results.formatting import plural
from lorabench.store.records import Record


def budget(f: Findings) -> list[tuple[str, str]]:
    """Name and value: steps, examples, seeds, time, precision, hardware, versions. No host, no path, no clock."""
    return [(name, value) for name, value in (*_study(f), *_training(f), *_origin(f)) if value]


def about(f: Findings) -> str:
    """The sweep in a line: base, task, size."""
    facts = dict(budget(f))
    what = " on ".join(facts[k] for k in ("Base", "Task") if k in facts)
    size = (plural(len(f.results), "cell"), facts["Runs"].split(":")[0], facts.get("Time", ""))
    return ", ".join(x for x in (what, *size) if x)


def _study(f: Findings) -> Iterator[tuple[str, str]]:
    runs = list(f.sweep.records.values())
    yield "Base", _each(runs, lambda r: r.config.get("model", {}).get("name"))
    yield "Task", _each(runs, lambda r: r.config.get("task", {}).get("name"))
    yield from declared.study_facts(f)


def _training(f: Findings) -> Iterator[tuple[str, str]]:
    sweep = f.sweep
    runs = [sweep.records[i] for i in sweep.planned if i in sweep.records]
    done = [r for r in runs if r.status == "completed"]
    sizes = {"train": "train_examples", "validation": "val_examples", "test": "test_examples"}
    said = {
        name: sorted({formatting.count(n) for r in done if (n := r.resources.get(key))}, key=formatting.natural_key)
        for name, key in sizes.items()
    }
    yield "Examples", ", ".join(f"{' or '.join(counts)} {name}" for name, counts in said.items() if counts)
    yield "Optimizer steps", _each(done, lambda r: _count(r.resources.get("steps")))
    yield "Batch size", _each(done, _batch)
    for role, name in (("tune", "Tuning seeds"), ("confirm", "Confirmation seeds")):
        seeds = sorted({int(r.config["seed"]) for r in runs if r.role == role})
        yield name, f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "none"
    counts = [
        f"{n} {s}" for s in ("completed", "diverged", "failed", "pruned") if (n := sum(r.status == s for r in runs))
    ]
    sources = Counter(str(r.provenance["reused_from"]) for r in runs if r.provenance.get("reused_from"))
    counts += [f"{n} taken from {name}" for name, n in sorted(sources.items())]
    open_runs = len(sweep.planned) - len(runs)
    yield (
        "Runs",
        f"{plural(len(sweep.planned), 'run')}: {', '.join(counts)}" + (f", {open_runs} not ended" if open_runs else ""),
    )
    yield "Pruned", _pruned(f)
    spent = sum(float(r.resources.get(k) or 0) for r in runs for k in ("train_seconds", "eval_seconds"))
    yield "Time", f"{formatting.duration(spent)} of training and evaluation in all" if spent else ""
    yield "Precision", _each(done, lambda r: r.provenance.get("precision"))


def _pruned(f: Findings) -> str:
    """How many tuning runs left early, when, and the share of the tuning steps that this spared."""
    full: dict[str, int] = {}  # steps of a run that is not pruned, by tuning run: its cell's
    for cell in f.sweep.cells:
        steps = max((int(r.resources.get("steps") or 0) for r in f.sweep.completed_records(cell.tune)), default=0)
        full |= {r.run_id: steps for r in f.sweep.records_of(cell.tune)}
    left = {i: int(r.metrics.get("pruned_step") or 0) for i in full if (r := f.sweep.records[i]).status == "pruned"}
    if not left:
        return ""
    spared = formatting.share(sum(full[i] - step for i, step in left.items()), sum(full.values()))
    return f"{len(left)} of {plural(len(full), 'tuning run')}, at step {step_list(left.values())}; {spared} of the tuning steps were spared"


def _origin(f: Findings) -> Iterator[tuple[str, str]]:
    runs = [r for r in f.sweep.records.values() if r.status == "completed"]
    yield "Hardware", _each(runs, _hardware)
    yield (
        "Software",
        _each(runs, lambda r: ", ".join(f"{k} {v}" for k, v in sorted((r.provenance.get("packages") or {}).items()))),
    )
    yield "Code", _each(runs, _revision)
    yield "Data fingerprint", _each(runs, lambda r: r.provenance.get("data_fingerprint"))
    yield "Base fingerprint", _each(runs, lambda r: r.provenance.get("model_fingerprint"))


def _each(runs: Iterable[Record], of: Callable[[Record], Any]) -> str:
    """The distinct values, numbers by size, then words."""
    return "; ".join(sorted({str(v) for r in runs if (v := of(r)) not in (None, "")}, key=formatting.natural_key))


def _count(n: Any) -> str | None:
    return None if n is None else formatting.count(n)


def _batch(r: Record) -> str:
    trainer = r.config.get("trainer", {})
    size, accumulate = trainer.get("batch_size"), trainer.get("accumulate_grad_batches") or 1
    return "" if size is None else f"{size}" if accumulate == 1 else f"{size} × {accumulate} accumulated"


def _hardware(r: Record) -> str:
    machine, p = r.provenance.get("machine") or {}, r.provenance
    device = str(p.get("device") or "")
    cpus = plural(machine["cpus"], "core") if isinstance(machine.get("cpus"), int) else ""
    threads = plural(int(p["threads"]), "thread") if p.get("threads") else ""
    return ", ".join(
        x for x in (device, str(machine.get("cpu") or ""), cpus, threads, str(machine.get("system") or "")) if x
    )


def _revision(r: Record) -> str:
    git = r.provenance.get("git") or {}
    revision = (
        f"git {git['revision'][:12]}{', with uncommitted changes' if git.get('dirty') else ''}"
        if git.get("revision")
        else ""
    )
    code = f"source {r.provenance['code']}" if r.provenance.get("code") else ""
    return ", ".join(x for x in (revision, code) if x)
