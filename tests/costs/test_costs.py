"""`python -m lorabench.costs` on saved runs made by hand: what is timed, what is kept, the table, the report, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.runs import make_base, make_data
from fixtures.sweeps import build
from fixtures.weights import Made, refused
from lorabench.config.errors import ConfigError
from lorabench.costs import __main__ as face
from lorabench.costs import measurement, timings
from lorabench.costs.measurement import CostsRequest
from lorabench.report import render
from lorabench.report.sections import costs
from lorabench.training.saved_run import open_run

LORA = {"method.target_modules": ["query", "value"], "method.alpha": 8.0}
CELLS: dict[str, dict[str, Any]] = {
    "r2": {**LORA, "method.r": 2},
    "dora": {"method.name": "dora", **LORA, "method.r": 2},
    "ia3": {"method.name": "ia3", "method.target_modules": ["key"], "method.feedforward_modules": None},
    "full": {"method.name": "full"},
    "head": {"method.name": "head"},
}
FAST = CostsRequest(repeats=3)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("costs")
    made = Made(root / "sweep", make_base(root / "bert", "bert"), make_data(root / "data.csv"))
    for cell, settings in CELLS.items():
        for seed in (0, 1) if cell == "r2" else (0,):
            made.add(cell, seed, settings)
    manifest = made.store.manifest()
    for cell in manifest["cells"]:
        cell["solo"] = {"seconds": 1.0, "steps": 8, "tokens": 100, "peak_memory_bytes": 800 << 20}
        if cell["id"] == "full":
            cell["solo"]["peak_memory_bytes"] = 1600 << 20
    made.store.write_manifest(manifest)
    return made


@pytest.fixture
def sweep(original: Made, tmp_path: Path) -> Made:
    copied = Made(shutil.copytree(original.root, tmp_path / "sweep"), original.base, original.data)
    copied.ids, copied.runs = dict(original.ids), dict(original.runs)
    return copied


def file(sweep: Made) -> Path:
    return sweep.root / "analysis" / "costs.json"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """run_ids in the order they are measured."""
    seen: list[str] = []
    real = timings.time_cell

    def measure(b: Any, folders: Sequence[Path], **kwargs: Any) -> Any:
        seen.append(folders[0].parent.name)
        return real(b, folders, **kwargs)

    monkeypatch.setattr(timings, "time_cell", measure)
    return seen


class TestMeasured:
    def test_what_the_file_holds(self, sweep: Made) -> None:
        ticks: list[tuple[str, int, int]] = []
        doc = measurement.measure_costs(sweep.root, FAST, lambda *tick: ticks.append(tick))
        assert doc == json.loads(file(sweep).read_text())
        assert set(doc["cells"]) == set(CELLS) and doc["left_out"] == {}
        assert [done for _, done, _ in ticks] == sorted(done for _, done, _ in ticks)
        assert ticks[-1][1] == ticks[-1][2] == 5 * timings.STEPS
        s = doc["setting"]
        assert (s["threads"], s["torch"], s["device"]) == (torch.get_num_threads(), torch.__version__, "cpu")
        assert s["machine"]["cpu"] and "host" not in s["machine"]
        for cell, x in doc["cells"].items():
            run = sweep.ids[cell, 0]
            assert x["run"] == run and x["weights"] == open_run(sweep.store.run_dir(run)).checksum
            assert x["bytes"] == sum(p.stat().st_size for p in (sweep.store.run_dir(run) / "adapter").iterdir())
            assert x["base_bytes"] == (sweep.base / "model.safetensors").stat().st_size
            assert x["training_memory"] == (1600 if cell == "full" else 800) << 20
            full = cell == "full"
            assert (x["merge"] is None) == full
            assert set(x["latency"]) == {"1", "32"}
            ways = {"plain", "merged"} | (set() if full else {"served", "ratio"})
            assert all(set(found) == ways for found in x["latency"].values())
            spreads = [x["load"], x["switch"], *(t for found in x["latency"].values() for t in found.values())]
            assert all(t["n"] == 3 and 0 < t["low"] <= t["median"] <= t["high"] for t in spreads)
        assert doc["cells"]["full"]["bytes"] > 10 * doc["cells"]["r2"]["bytes"]

    @pytest.mark.parametrize("cell", list(CELLS))
    def test_the_ways_answer_alike_and_leave_the_base(
        self, original: Made, cell: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Unmerged and merged are the same model, and not the base; afterwards all three copies are the base's."""
        saved = open_run(original.store.run_dir(original.ids[cell, 0]))
        b = timings.open_bench(saved, "float64", 3)
        said: list[Mapping[str, Tensor]] = []

        def turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
            said.append({name: way().logits for name, way in ways.items()})
            return {name: [1.0] * repeats for name in ways}

        monkeypatch.setattr(timings, "time_in_turns", turns)
        timings.time_cell(b, [saved.folder, saved.folder], tokens=12, repeats=3)
        assert [len(x["plain"]) for x in said] == [1, 32]
        for found in said:
            assert not torch.allclose(found["plain"], found["merged"], rtol=1e-3)
            if cell != "full":
                torch.testing.assert_close(found["served"], found["merged"], rtol=1e-6, atol=1e-8)
        given = timings.random_texts(b.plain, 2, 12)
        with torch.no_grad():
            answers = [m(**given).logits for m in (saved.base(dtype="float64").model, b.plain, b.served, b.merged)]
        assert all(torch.equal(answers[0], x) for x in answers[1:])

    def test_copies_share_the_base(self, original: Made) -> None:
        """Only the copy that is merged into has weights of its own."""
        b = timings.open_bench(open_run(original.store.run_dir(original.ids["r2", 0])), "float32", 3)
        plain, served, merged = ([p.data_ptr() for p in m.parameters()] for m in (b.plain, b.served, b.merged))
        assert plain == served and not set(plain) & set(merged)

    def test_ways_take_turns(self) -> None:
        order: list[str] = []
        ways = {name: lambda name=name: order.append(name) for name in "abc"}
        found = timings.time_in_turns(ways, 3)
        assert {name: len(x) for name, x in found.items()} == {"a": 3, "b": 3, "c": 3}
        rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
        assert rounds[timings.WARM_UP :] == ["abc", "bca", "cab"]

    def test_ratios_are_of_rounds(self) -> None:
        """A busy round makes both slow: it says nothing of the ratio."""
        found = timings._summary({"plain": [1.0] * 3, "merged": [1.0, 9.0, 2.0], "served": [2.0, 18.0, 4.0]})
        assert found["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 3}
        assert found["merged"] == {"median": 2.0, "low": 1.5, "high": 5.5, "n": 3}


class TestResume:
    def test_what_is_known_is_not_measured_again(self, sweep: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = counted(monkeypatch)
        measurement.measure_costs(sweep.root, CostsRequest(("r2", "ia3"), 3))
        first = file(sweep).read_bytes()
        measurement.measure_costs(sweep.root, CostsRequest(("r2", "ia3"), 3))
        assert seen == [sweep.ids["r2", 0], sweep.ids["ia3", 0]] and file(sweep).read_bytes() == first
        measurement.measure_costs(sweep.root, CostsRequest(("r2",), 3, again=True))
        doc = measurement.measure_costs(sweep.root, CostsRequest(("head",), 3))
        assert seen[2:] == [sweep.ids["r2", 0], sweep.ids["head", 0]]
        assert set(doc["cells"]) == {"r2", "ia3", "head"}
        sweep.train(sweep.ids["r2", 0], noise=1)
        measurement.measure_costs(sweep.root, CostsRequest(("r2", "ia3"), 3))
        assert seen[4:] == [sweep.ids["r2", 0]]

    def test_other_conditions_are_not_mixed_in(self, sweep: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = counted(monkeypatch)
        measurement.measure_costs(sweep.root, CostsRequest(("r2", "ia3"), 3))
        monkeypatch.setattr(torch, "__version__", "0.0.1")
        doc = measurement.measure_costs(sweep.root, CostsRequest(("r2",), 3))
        assert len(seen) == 3 and list(doc["cells"]) == ["r2"] and doc["setting"]["torch"] == "0.0.1"

    def test_a_killed_measurement_goes_on(self, sweep: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        real = timings.time_cell

        def killed(b: Any, folders: Sequence[Path], **kwargs: Any) -> Any:
            if folders[0].parent.name == sweep.ids["ia3", 0]:
                raise KeyboardInterrupt
            return real(b, folders, **kwargs)

        monkeypatch.setattr(timings, "time_cell", killed)
        with pytest.raises(KeyboardInterrupt):
            measurement.measure_costs(sweep.root, CostsRequest(("r2", "ia3"), 3))
        assert list(json.loads(file(sweep).read_text())["cells"]) == ["r2"]
        monkeypatch.setattr(timings, "time_cell", real)
        seen = counted(monkeypatch)
        measurement.measure_costs(sweep.root, CostsRequest(("r2", "ia3"), 3))
        assert seen == [sweep.ids["ia3", 0]]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 0}'])
    def test_a_torn_or_older_file_is_made_again(self, sweep: Made, text: str) -> None:
        file(sweep).parent.mkdir()
        file(sweep).write_text(text)
        assert list(measurement.measure_costs(sweep.root, CostsRequest(("ia3",), 3))["cells"]) == ["ia3"]
        sweep.store.check_foreign()


class TestCommandLine:
    def test_table_and_what_was_left_out(self, sweep: Made, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        shutil.rmtree(sweep.store.run_dir(sweep.ids["head", 0]) / "adapter")
        assert face.main([str(sweep.root), "--cells", "r2", "full", "head", "--repeats", "3"]) == 0
        said = capsys.readouterr()
        out = " ".join(said.out.split())
        assert "LoRA" in out and "full fine-tuning" in out and "batch 32: unmerged ms" in out, out
        assert "800 MiB (50 %)" in out and f"costs: {file(sweep)}" in said.out and said.err == ""
        assert "head only: not measured" in out and "trainer.save_weights was false" in out
        assert f"{torch.get_num_threads()} thread" in out and f"torch {torch.__version__}" in out

    def test_bad_input(self, sweep: Made, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "empty").mkdir()
        refused(face, [str(tmp_path / "nowhere")], "an existing directory", capsys)
        refused(face, [str(tmp_path / "empty")], "neither sweep.json nor runs", capsys)
        refused(face, [str(sweep.root), "--cells", "r3"], "--cells=r3: cells of this sweep: r2", capsys)
        refused(face, [str(sweep.root), "--repeats", "2"], "at least 3", capsys)
        for run in sweep.runs:
            shutil.rmtree(sweep.store.run_dir(run) / "adapter")
        refused(face, [str(sweep.root)], "trainer.save_weights was false, or they were deleted", capsys)
        assert not file(sweep).parent.exists()

    def test_a_base_that_changed(self, sweep: Made, capsys: Any) -> None:
        for record in sweep.store.records():
            record.provenance["model_fingerprint"] = "0" * 64
            sweep.store.write(record)
        refused(face, [str(sweep.root)], "these differ", capsys)
        assert not file(sweep).parent.exists()

    def test_help_imports_nothing_heavy(self) -> None:
        code = "import sys, lorabench.costs.__main__ as face\ntry: face.main(['--help'])\nexcept SystemExit: pass\n"
        code += (
            "print('heavy' if {'torch', 'transformers', 'omegaconf', 'rich', 'scipy'} & set(sys.modules) else 'light')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.endswith("light\n") and "OMP_NUM_THREADS" in done.stdout


def spread(median: float, n: int = 15) -> dict[str, float]:
    return {"median": median, "low": median * 0.9, "high": median * 1.1, "n": n}


@pytest.fixture
def doc() -> dict[str, Any]:
    """One adapter and full fine-tuning, as the file has them."""
    common = {"weights": "0" * 16, "base_bytes": 90 << 20, "base_load": spread(0.2, 3), "trainable": 1}
    ways = {"plain": spread(0.004), "merged": spread(0.004)}
    served = {**ways, "served": spread(0.005), "ratio": spread(1.25)}
    adapter = {**common, "order": 0, "name": "LoRA r = 8", "method": "LoRA", "r": 8, "run": "a" * 12, "bytes": 900 << 10, "load": spread(0.0151),
               "switch": spread(2.5e-6), "merge": spread(0.132), "latency": {"32": served, "1": served}, "training_memory": 500 << 20}  # fmt: skip
    full = {**common, "order": 1, "name": "full", "method": "full", "r": None, "run": "b" * 12, "bytes": 91 << 20, "load": spread(0.5),
            "switch": spread(0.05), "merge": None, "latency": {"32": ways, "1": ways}, "training_memory": 1000 << 20}  # fmt: skip
    setting = {
        "machine": {"cpu": "Some <CPU>", "cpus": 2},
        "threads": 1,
        "torch": "2.0",
        "dtype": "bfloat16",
        "tokens": 32,
    }
    return {"schema": 1, "setting": setting, "cells": {"full": full, "lora": adapter}, "left_out": {}}


class TestTable:
    def test_rows(self, doc: dict[str, Any]) -> None:
        keeping, latency = costs.tables(costs.parse(doc))
        lora, full = keeping.rows
        assert lora.runs == ("a" * 12,)
        assert lora.texts == ("LoRA r = 8", "900.0 KiB (0.98 %)", "15.1 (13.6 to 16.6)", "0.0025 (0.0023 to 0.0028)", "132 (119 to 145)",
                              "500 MiB (50 %)")  # fmt: skip
        assert full.texts[1] == "91.0 MiB (101 %)" and full.texts[-2:] == ("–", "1,000 MiB (100 %)")
        assert [c.key for c in latency.columns][1:] == "served1 merged1 ratio1 served32 merged32 ratio32".split()
        assert latency.rows[0].texts[1:4] == ("5.00 (4.50 to 5.50)", "4.00 (3.60 to 4.40)", "1.25 (1.12 to 1.38)")
        assert latency.rows[1].texts[1:4] == ("–", "4.00 (3.60 to 4.40)", "–")
        assert all(len(row.texts) == len(t.columns) for t in (keeping, latency) for row in t.rows)
        assert any("Some <CPU>, 2 processors, 1 thread, torch 2.0, in bfloat16" in note for note in keeping.notes)

    def test_without_full_fine_tuning_there_is_no_share(self, doc: dict[str, Any]) -> None:
        del doc["cells"]["full"]
        assert costs.tables(costs.parse(doc))[0].rows[0].texts[-1] == "500 MiB"
        doc["cells"]["lora"]["training_memory"] = None
        found = costs.tables(costs.parse(doc))[0]
        assert found.rows[0].texts[-1] == "–" and not any("Training memory" in note for note in found.notes)

    @pytest.mark.usefixtures("undrawn")
    def test_it_joins_the_report(self, doc: dict[str, Any], tmp_path: Path) -> None:
        path = build(tmp_path / "s").root / "analysis" / "costs.json"
        path.parent.mkdir()
        path.write_text(json.dumps(doc))
        render(tmp_path / "s", tmp_path / "r")
        page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
        assert "What it costs to keep and to serve" in page and "Some &lt;CPU&gt;" in page
        assert "## What it costs to keep and to serve" in (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
        assert "LoRA r = 8" in (tmp_path / "r" / "tables" / "costs.tex").read_text(encoding="utf-8")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2}', "\x00"])
    def test_torn_and_foreign_files(self, tmp_path: Path, text: str) -> None:
        assert costs.read(tmp_path) is None
        (tmp_path / "analysis").mkdir()
        (tmp_path / "analysis" / "costs.json").write_text(text)
        with pytest.raises(ConfigError, match="costs.json"):
            costs.read(tmp_path)

    def test_reading_needs_no_torch(self) -> None:
        code = "import sys, lorabench.report.sections.costs\nassert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
