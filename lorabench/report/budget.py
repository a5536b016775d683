"""What the numbers cost and where they come from: no table without its budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lorabench.report import declared
from lorabench.report.tables import step_list
from lorabench.results import formatting
from lorabench.results.findings import Findings
from lorabench.results.formatting import plural
from lorabench.store.records import Record

STATUSES = ("completed", "diverged", "failed", "pruned")


def budget(f: Findings) -> list[tuple[str, str]]:
    """Return name and value: steps, examples, seeds, time, hardware, versions. No host, no path, no clock."""
    return [(name, value) for name, value in (*_study(f), *_training(f), *_origin(f)) if value]


def about(f: Findings) -> str:
    """Return the sweep in a line: base, task, size."""
    facts = dict(budget(f))
    what = " on ".join(facts[k] for k in ("Base", "Task") if k in facts)
    size = (plural(len(f.results), "cell"), facts["Runs"].split(":")[0], facts.get("Time", ""))
    return ", ".join(x for x in (what, *size) if x)


def _study(f: Findings) -> Iterator[tuple[str, str]]:
    runs = list(f.sweep.records.values())
    yield "Base", _distinct(runs, lambda r: r.config.get("model", {}).get("name"))
    yield "Task", _distinct(runs, lambda r: r.config.get("task", {}).get("name"))
    yield from declared.study_facts(f)


def _training(f: Findings) -> Iterator[tuple[str, str]]:
    runs = [f.sweep.records[i] for i in f.sweep.planned if i in f.sweep.records]
    completed = [r for r in runs if r.status == "completed"]
    yield "Examples", _examples(completed)
    yield "Optimizer steps", _distinct(completed, lambda r: _count(r.resources.get("steps")))
    yield "Batch size", _distinct(completed, _batch)
    for role, name in (("tune", "Tuning seeds"), ("confirm", "Confirmation seeds")):
        seeds = sorted({int(r.config["seed"]) for r in runs if r.role == role})
        yield name, f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "none"
    yield "Runs", _run_counts(len(f.sweep.planned), runs)
    yield "Pruned", _pruned_text(f)
    spent = sum(float(r.resources.get(k) or 0) for r in runs for k in ("train_seconds", "eval_seconds"))
    yield "Time", f"{formatting.duration(spent)} of training and evaluation in all" if spent else ""
    yield "Precision", _distinct(completed, lambda r: r.provenance.get("precision"))


def _examples(completed: Iterable[Record]) -> str:
    keys = {"train": "train_examples", "validation": "val_examples", "test": "test_examples"}
    counts = {
        split: {formatting.count(n) for r in completed if (n := r.resources.get(key))} for split, key in keys.items()
    }
    return ", ".join(
        f"{' or '.join(sorted(known, key=formatting.natural_key))} {split}" for split, known in counts.items() if known
    )


def _run_counts(planned: int, runs: Sequence[Record]) -> str:
    """Return how many runs ended in which way, and how many were taken from other sweeps."""
    ended = ((status, sum(r.status == status for r in runs)) for status in STATUSES)
    counts = [f"{n} {status}" for status, n in ended if n]
    sources = Counter(str(r.provenance["reused_from"]) for r in runs if r.provenance.get("reused_from"))
    counts += [f"{n} taken from {name}" for name, n in sorted(sources.items())]
    text = f"{plural(planned, 'run')}: {', '.join(counts)}"
    return text + (f", {planned - len(runs)} not ended" if planned > len(runs) else "")


def _pruned_text(f: Findings) -> str:
    """Return how many tuning runs left early, when, and the share of the tuning steps that this spared."""
    full: dict[str, int] = {}  # steps of a run that is not pruned, by tuning run: its cell's
    for cell in f.sweep.cells:
        steps = max((int(r.resources.get("steps") or 0) for r in f.sweep.completed_records(cell.tune)), default=0)
        full |= {r.run_id: steps for r in f.sweep.records_of(cell.tune)}
    left = {i: int(r.metrics.get("pruned_step") or 0) for i in full if (r := f.sweep.records[i]).status == "pruned"}
    if not left:
        return ""
    spared = formatting.share(sum(full[i] - step for i, step in left.items()), sum(full.values()))
    return (
        f"{len(left)} of {plural(len(full), 'tuning run')}, at step {step_list(left.values())}; "
        f"{spared} of the tuning steps were spared"
    )


def _origin(f: Findings) -> Iterator[tuple[str, str]]:
    runs = [r for r in f.sweep.records.values() if r.status == "completed"]
    yield "Hardware", _distinct(runs, _hardware)
    yield (
        "Software",
        _distinct(
            runs, lambda r: ", ".join(f"{k} {v}" for k, v in sorted((r.provenance.get("packages") or {}).items()))
        ),
    )
    yield "Code", _distinct(runs, _revision)
    yield "Data fingerprint", _distinct(runs, lambda r: r.provenance.get("data_fingerprint"))
    yield "Base fingerprint", _distinct(runs, lambda r: r.provenance.get("model_fingerprint"))


def _distinct(runs: Iterable[Record], of: Callable[[Record], Any]) -> str:
    """Return the distinct values, numbers by size, then words."""
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
