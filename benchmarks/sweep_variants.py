"""How each variant runs, and what it says it did. Children are launched one after another: nothing runs beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sweep_grid as g
from benchmarks.sweep_launch import BenchmarkFailed, Finished, launch
from benchmarks.sweep_results import Outcome, Run
from lorabench.runtime.files import cache_root

HERE = Path(__file__).resolve().parent
Say = Callable[[str, float], None]


@dataclass(frozen=True)
class Bench:
    """One call of the benchmark. shared: folder of the rows and of facts.json; say: hears of every finished process."""

    settings: g.Settings
    shared: Path
    say: Say

    def launch(self, name: str, arguments: list[str], folder: Path) -> Finished:
        done = launch(name, arguments, folder=folder, device=self.settings.device)
        self.say(name, done.seconds)
        return done

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.shared / "facts.json").read_text(encoding="utf-8"))
        return found

    @property
    def work(self) -> Path:
        return self.shared / "work.json"

    def export(self) -> None:
        """Rows, facts and the work order of the PEFT side, before any clock starts."""
        s, model = self.settings, g.MODELS[self.settings.model]
        if model.gguf:  # converted once, into the user's own cache
            (cache_root() / "gguf").mkdir(parents=True, exist_ok=True)
        script = [str(HERE / "sweep_setup.py"), "export", str(self.shared), *g.base_overrides(s)]
        launch("the export of rows", script, folder=self.shared, device=s.device)
        facts = self.facts
        order = {
            "folder": facts["folder"], "data": str(self.shared), "auto_class": facts["auto_class"], "labels": facts["labels"],
            "max_length": model.max_length, "batch_size": s.batch_size, "eval_rows": g.EVAL_ROWS, "epochs": s.epochs,
            "eval_interval": s.eval_interval, "warmup": g.WARMUP, "clip": g.CLIP, "alpha": g.ALPHA, "dropout": s.dropout,
            "seed": s.seed, "device": s.device, "grid": g.grid(s.runs, s.model, prune=s.prune).points,
        }  # fmt: skip
        self.work.write_text(json.dumps(order), encoding="utf-8")

    def roofline(self) -> dict[str, float]:
        """GFLOP/s of `linear` by precision, now."""
        script = [str(HERE / "sweep_setup.py"), "roofline", str(self.shared), self.settings.device]
        launch("the roofline", script, folder=self.shared, device=self.settings.device)
        found: dict[str, float] = json.loads((self.shared / "roofline.json").read_text(encoding="utf-8"))
        return found

    def run(self, variant: str, repeat: int, folder: Path) -> Outcome:
        if variant in ("trainer_processes", "trainer_tuned"):
            return _trainer(self, variant, repeat, folder)
        return (_loop if variant == "peft_loop" else _lorabench)(self, variant, repeat, folder)


def _trainer(bench: Bench, variant: str, repeat: int, folder: Path) -> Outcome:
    """One process a run, one after another: on two cores they would only share them."""
    tuned = variant == "trainer_tuned"
    outcome = Outcome(variant, repeat, 0.0, 0.0, 0, "bf16" if tuned else "32")
    s = bench.settings
    for r, lr in g.grid(s.runs, s.model, prune=s.prune).points:
        own = folder / f"r{r}-lr{lr:g}"
        script = [str(HERE / "peft_trainer_run.py"), "--work", str(bench.work), "--r", str(r), "--lr", repr(lr)]
        done = bench.launch(f"{variant} r={r} lr={lr:g}", [*script, "--out", str(own)] + ["--tuned"] * tuned, own)
        (found,) = json.loads((own / "result.json").read_text(encoding="utf-8"))
        run = Run(**found | {"seconds": done.seconds, "peak_memory_bytes": _peak(found, done)})
        outcome.runs.append(run)
        outcome.makespan += done.seconds
        outcome.cpu_seconds += done.cpu_seconds
        outcome.peak_memory_bytes = max(outcome.peak_memory_bytes, run.peak_memory_bytes)
    return outcome


def _loop(bench: Bench, variant: str, repeat: int, folder: Path) -> Outcome:
    script = [str(HERE / "peft_loop_run.py"), "--work", str(bench.work), "--out", str(folder)]
    done = bench.launch(variant, script, folder)
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    runs = [Run(**one | {"peak_memory_bytes": _peak(one, done)}) for one in found]
    return Outcome(variant, repeat, done.seconds, done.cpu_seconds, max(r.peak_memory_bytes for r in runs), "32", runs)


def _peak(found: Mapping[str, Any], done: Finished) -> int:
    """Of the GPU where there is one, else of the process."""
    return found["peak_memory_bytes"] or done.peak_memory_bytes


def _lorabench(bench: Bench, variant: str, repeat: int, folder: Path) -> Outcome:
    """The whole command, from its start to its report."""
    from lorabench.store.records import Store  # numpy: what is not installed is named before this

    arguments = ["-m", "lorabench", *g.sweep_overrides(bench.settings, variant)]
    done = bench.launch(variant, arguments, folder)
    store = Store(folder / "sweep")
    records = store.records()
    if not records or not (folder / "report" / "report.html").is_file():
        raise BenchmarkFailed(f"{variant} left no {'report' if records else 'records'}; see {folder / 'log.txt'}")
    runs = [_run_of(record, store.history(record.run_id)) for record in records]
    peaks = [r.peak_memory_bytes for r in runs]
    peak = max(peaks) if bench.settings.device == "cuda" else max(done.peak_memory_bytes, *peaks)
    precision = "32" if records[0].provenance["base_dtype"] == "float32" else "bf16"
    return Outcome(
        variant, repeat, done.seconds, done.cpu_seconds, peak, precision, sorted(runs, key=lambda r: (r.r, r.lr))
    )


def _run_of(record: Any, history: list[dict[str, Any]]) -> Run:
    config, found = record.config, record.resources
    if record.status == "failed":
        raise BenchmarkFailed(f"lorabench's run r={config['method']['r']} failed: {record.error}")
    return Run(
        r=config["method"]["r"], lr=config["optimizer"]["lr"], seconds=found["pack_seconds"] / found["pack_size"],
        train_seconds=found["train_seconds"], tokens=found["tokens"], steps=found["steps"],
        evaluated_at=[row["step"] for row in history if "val/loss" in row], trainable=found["trainable_parameters"],
        train_examples=found["train_examples"], val_examples=found["val_examples"],
        metric=record.metrics[f"val/{record.metrics['primary']}"], peak_memory_bytes=found["peak_memory_bytes"],
        status=record.status,
    )  # fmt: skip
