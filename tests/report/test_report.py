"""The report end to end, on synthetic sweeps written through the store: what it says, what it refuses, what it escapes."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.report import render, terminal_table
from lorabench.report.answer import answer
from lorabench.report.cautions import warnings
from lorabench.report.directory import MARK, check_place
from lorabench.report.tables import comparison
from lorabench.results.cells import cells_with_timing
from lorabench.results.findings import Findings, find
from lorabench.results.sweep import load
from lorabench.store.records import Record, Store

FILES = {
    "report.md",
    "report.html",
    "runs.csv",
    *(
        f"tables/{name}.{ending}"
        for name in ("comparison", "rates", "claims", "slopes", "best_rates", "pareto")
        for ending in ("tex", "csv")
    ),
    *(
        f"figures/{name}.{ending}"
        for name in ("metric_by_rank", "learning_rates", "best_rates", "pareto", "training")
        for ending in ("svg", "png")
    ),
}
SMALL = (RANK_SWEEP[1], RANK_SWEEP[3], RANK_SWEEP[4])  # r = 4, r = 64, head only


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sweeps") / "rank").root


@pytest.fixture(scope="module")
def report(rank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "rank"
    render(rank, out)
    return out


def found(root: Path) -> Findings:
    return find(load(root))


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def rewrite(store: Store, run_id: str, **changes: Any) -> Record:
    record = store.read(run_id)
    assert record is not None
    record = dataclasses.replace(record, **changes)
    store.write(record)
    return record


def cell(store: Store, name: str) -> dict[str, Any]:
    return next(c for c in store.manifest()["cells"] if c["id"] == name)


# -- what is in it ---------------------------------------------------------------------------------------------------


def test_the_files_of_a_report(report: Path) -> None:
    assert names(report) == FILES | {MARK, "tables/lost.tex", "tables/lost.csv"}


def test_the_answer_stands_at_the_top(rank: Path, report: Path) -> None:
    f = found(rank)
    said = answer(f)
    assert f.recommendation is not None
    assert f.recommendation.cell == "lora-r16-a16-all-linear"
    assert said.lead.startswith("So far LoRA r = 16 is enough")
    assert "not settled" in said.lead and "sweep.tune_seeds=[0,1,2]" in dict(said.points)["Learning rates"]
    about = dict(said.points)
    assert "points better than head only" in about["Against head-only"]
    assert "full fine-tuning" in about["Against full fine-tuning"]
    assert "r = 4 was the first not shown" in about["How small"]
    assert said.command is not None
    assert said.command.startswith("python -m lorabench +experiment=rank_sweep hydra.mode=RUN")
    for word in (
        "method=lora",
        "method.r=16",
        "method.alpha=16",
        "method.target_modules=all-linear",
        "optimizer.lr=0.002",
    ):
        assert word in said.command.split()
    text = (report / "report.md").read_text(encoding="utf-8")
    assert text.index("The answer") < text.index("figures/metric_by_rank.svg") < text.index("## Comparison")
    assert "The best adapter by validation loss of the tuning runs" in text


def test_the_best_adapter_is_picked_on_validation(rank: Path) -> None:
    f = found(rank)
    adapters = [r for r in f.results.values() if r.cell.adapter]
    assert f.best == min(adapters, key=lambda r: r.val_loss or 9).id
    best_on_test = max(adapters, key=lambda r: r.test.mean if r.test else 0).id
    assert best_on_test != f.best  # or this test would show nothing


def test_the_comparison_table(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    table = text[text.index("## Comparison") :].splitlines()
    head = [h.strip() for h in table[2].strip("|").split("|")]
    assert head[:6] == ["method", "r", "α", "targets", "best lr", "test accuracy (%), 3 seeds"]
    row = next(line for line in table if line.startswith("| LoRA | 64 |"))
    assert re.search(r"\| 7\d\.\d ± \d\.\d \| reference", row)
    assert "2,704,515 (12 %)" in row
    full = next(line for line in table if line.startswith("| full |"))
    assert "21.0 solo" in full  # a pack of one; the others' time is a share


def test_failed_and_diverged_runs_are_listed(rank: Path, report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    section = text[text.index("## Runs that failed") : text.index("## Budget")]
    assert "diverged" in section
    assert "the loss was not finite at step 31" in section
    rates = text[text.index("## Learning rates") : text.index("## Training")]
    assert re.search(r"LoRA r = 1 \| 8e-3 \| – \| 0 of 1 \| 1 \| ineligible", rates)
    assert found(rank).results["lora-r1-a16-all-linear"].choice.ineligible == {8e-3: 1}


def test_budget_and_provenance_without_host_or_path(rank: Path, report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    for fact in (
        "3,200 train, 600 validation, 2,000 test",
        "Tuning seeds | 1 (0)",
        "3 (100, 101, 102)",
        "bf16; bf16-mixed",
        "Synthetic CPU",
        "git 0123456789ab",
        "torch 2.13.0+cpu",
    ):
        assert fact in text
    for path in names(report):
        content = (report / path).read_bytes()
        assert b"synthetic-host" not in content
        assert str(rank).encode() not in content
        assert str(report).encode() not in content


def test_runs_csv(rank: Path, report: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((report / "runs.csv").read_text(encoding="utf-8"))))
    assert len(rows) == len(load(rank).records) == 42
    order = [c.id for c in load(rank).cells]
    assert [r["cell"] for r in rows] == sorted((r["cell"] for r in rows), key=order.index)
    for c in order:
        ids = [r["run_id"] for r in rows if r["cell"] == c]
        assert ids == sorted(ids)
    assert all(bool(r["test/accuracy"]) == (r["role"] == "confirm") for r in rows)


@pytest.mark.usefixtures("undrawn")
def test_seconds_and_memory_measured_alone(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL)
    manifest = store.manifest()
    for c in manifest["cells"]:
        c["solo"] = {"seconds": 1.5, "steps": 8, "tokens": 0, "peak_memory_bytes": 3 << 30}
    store.write_manifest(manifest)
    f = found(store.root)
    assert all(r.solo and r.seconds == pytest.approx(1.5 * 100 / 8) and r.memory == 3 << 30 for r in f.results.values())
    render(store.root, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "train s (solo)" in text
    assert "pack share" not in text
    assert "3.0 GiB" in text


def test_what_an_older_version_measured_without_the_trunk_is_not_shown(tmp_path: Path) -> None:
    """Runs that are served a frozen trunk's output take less than steps that compute it: their share of the pack stands there."""
    store = build(tmp_path / "s", SMALL)
    reusing = store.manifest()["cells"][0]
    for run_id in (*reusing["runs"]["tune"], *reusing["runs"]["confirm"]):
        record = store.read(run_id)
        assert record is not None
        store.write(dataclasses.replace(record, provenance={**record.provenance, "reused_blocks": 5}))
    solo = {"seconds": 1.5, "steps": 8, "tokens": 0, "peak_memory_bytes": 3 << 30}

    def measured(**more: float) -> Findings:
        manifest = store.manifest()
        for c in manifest["cells"]:
            c["solo"] = {**solo, **more}
        store.write_manifest(manifest)
        return found(store.root)

    f = measured()
    stale, *others = sorted(f.results.values(), key=lambda r: r.id != reusing["id"])
    assert (stale.seconds, stale.memory) == (stale.resource("train_seconds"), stale.resource("peak_memory_bytes"))
    assert not stale.solo and all(r.solo and r.memory == 3 << 30 for r in others)
    assert cells_with_timing(store.manifest(), load(store.root).records) == {r.id for r in others}
    text = " ".join(comparison(f).notes)
    assert f"No seconds and memory of a run alone for {stale.name}: " in text and "one pass" not in text
    f = measured(reused_blocks=5, trunk_seconds=2.5)
    assert all(r.solo and r.seconds == pytest.approx(1.5 * 100 / 8 + 2.5) for r in f.results.values())
    assert "with the one pass that the frozen blocks" in " ".join(comparison(f).notes)


def test_the_terminal_table(rank: Path) -> None:
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal_table(rank))
    text = console.export_text()
    assert "LoRA r = 16" in text
    assert "reference" in text
    assert "…" not in text
    assert "is enough" in text


# -- sweeps of other shapes ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_an_unconfirmed_sweep_says_so(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL, confirm=())
    made = render(store.root, tmp_path / "out")
    assert not made.confirmed
    html = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Unconfirmed." in html
    assert html.index("Unconfirmed.") < html.index("<figure")
    assert "test accuracy" not in html
    f = found(store.root)
    assert f.recommendation is None
    assert f.versus == {}
    assert "sweep.confirm_seeds" in dict(answer(f).points)["To confirm"]


def test_one_run(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [Planted("lora", (2e-3,), 2e-3, 0.76, r=8)], confirm=(), manifest=False)
    made = render(store.root, tmp_path / "out")
    assert made.lead.startswith("One run: LoRA r = 8 at 2e-3")
    assert names(tmp_path / "out") >= {"report.html", "figures/training.svg"}
    assert not any("metric_by" in n for n in names(tmp_path / "out"))  # one dot is no picture


def test_cells_from_configs_where_there_is_no_manifest(tmp_path: Path) -> None:
    cells = [*SMALL, Planted("lora", (1e-3, 2e-3), 2e-3, 0.75, r=4, config={"trainer": {"batch_size": 64}})]
    f = found(build(tmp_path / "s", cells, manifest=False).root)
    assert {r.name for r in f.results.values()} == {
        "LoRA r = 4 (batch_size 32)",
        "LoRA r = 4 (batch_size 64)",
        "LoRA r = 64 (batch_size 32)",
        "head only (batch_size 32)",
    }
    assert all(len(r.runs) == 3 for r in f.results.values())


def test_a_metric_of_which_less_is_better(tmp_path: Path) -> None:
    f = found(build(tmp_path / "s", metric="perplexity", study={"margin": 0.05}).root)
    head = f.controls["head only"]
    assert head.estimate.mean < 0
    assert head.direction == "better"
    assert f.versus["headonly-head"].direction == "worse"
    assert f.results["full-everything"].test is not None
    assert f.results["full-everything"].test.examples == 2000


@pytest.mark.parametrize("metric", ["macro_f1", "loss"])
def test_other_metrics_have_intervals_over_seeds_and_examples(metric: str, tmp_path: Path) -> None:
    f = found(build(tmp_path / "s", SMALL, metric=metric, examples=300).root)
    for r in f.results.values():
        assert r.test is not None
        assert r.test.examples == 300
        assert r.test.example > 0
    assert f.controls["head only"].direction == "better"


def test_without_examples_seeds_alone(tmp_path: Path) -> None:
    f = found(build(tmp_path / "s", SMALL, arrays=False).root)
    assert all(r.test is not None and r.test.examples is None for r in f.results.values())
    assert any("too narrow" in w for w in warnings(f))


def test_per_example_results_that_mean_something_else_are_not_used(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL)
    for run_id in cell(store, "headonly-head")["runs"]["confirm"]:
        record = store.read(run_id)
        assert record is not None
        rewrite(store, run_id, metrics=record.metrics | {"test/accuracy": 0.2})
    made = found(store.root).results["headonly-head"].test
    assert made is not None
    assert made.examples is None
    assert made.mean == pytest.approx(0.2)


@pytest.mark.usefixtures("undrawn")
def test_sweeps_over_targets_are_drawn_by_cell(tmp_path: Path) -> None:
    cells = [
        Planted("lora", (1e-3, 2e-3), 1e-3, 0.75, r=8, targets=t) for t in (["query", "value"], "mlp", "all-linear")
    ]
    store = build(tmp_path / "s", cells)
    render(store.root, tmp_path / "out")
    assert "figures/metric_by_cell.svg" in names(tmp_path / "out")
    assert "LoRA r = 8 on query+value" in (tmp_path / "out/report.md").read_text(encoding="utf-8")
    said = answer(found(store.root)).command or ""
    assert "method.target_modules=mlp" in said or "[query,value]" in said or "all-linear" in said


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_two_cells(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL)
    manifest = store.manifest()
    twin = json.loads(json.dumps(cell(store, "lora-r4-a16-all-linear")))
    twin["id"], twin["label"]["alpha_rule"] = "lora-r4-a4r-all-linear", "4r"
    manifest["cells"].append(twin)
    store.write_manifest(manifest)
    f = found(store.root)
    assert {"LoRA r = 4 (α = 16)", "LoRA r = 4 (α = 4r)"} <= {r.name for r in f.results.values()}
    render(store.root, tmp_path / "out")
    assert "16 (4r)" in (tmp_path / "out/report.md").read_text(encoding="utf-8")


# -- what a reader must not overlook ---------------------------------------------------------------------------------


def test_edges_of_grids(tmp_path: Path) -> None:
    cells = [Planted("lora", (1e-3, 2e-3), 1e-2, 0.75, r=4), Planted("lora", (1e-3, 2e-3), 1e-4, 0.76, r=8)]
    said = "\n".join(warnings(found(build(tmp_path / "s", cells).root)))
    assert "LoRA r = 4: the best rate, 2e-3, is the largest of its grid" in said
    assert "LoRA r = 8: the best rate, 1e-3, is the smallest of its grid" in said
    assert "sweep.extend_lr=true" in said


def test_cells_with_the_same_trouble_share_a_line(tmp_path: Path) -> None:
    cells = [Planted("lora", (1e-3, 2e-3), 1e-2, 0.75, r=r) for r in (2, 4, 8)]
    said = warnings(found(build(tmp_path / "s", cells).root))
    (edge,) = [w for w in said if "largest of its grid" in w]
    assert edge.startswith("LoRA r = 2, LoRA r = 4, LoRA r = 8: the best rate, 2e-3, is")


def test_the_command_keeps_every_digit_and_axis(tmp_path: Path) -> None:
    cells = [
        Planted(
            "lora",
            (1e-3, 1.2345678e-3),
            1.2345678e-3,
            0.75,
            r=4,
            alpha=5.656854249492381,
            rslora=True,
            targets=["q", "v"],
            config={"trainer": {"batch_size": size}},
        )
        for size in (16, 32)
    ]
    words = (answer(found(build(tmp_path / "s", cells, manifest=False).root)).command or "").split()
    assert {"method.alpha=5.656854249492381", "method.use_rslora=true", "optimizer.lr=0.0012345678"} <= set(words)
    assert "'method.target_modules=[q,v]'" in words
    assert {"trainer.batch_size=16", "trainer.batch_size=32"} & set(words)


def test_two_seeds_give_no_verdict(tmp_path: Path) -> None:
    f = found(build(tmp_path / "s", SMALL, confirm=(100, 101)).root)
    assert all(c.blocked and c.direction == c.size == "not resolved" for c in f.versus.values())
    assert "no verdict" in answer(f).lead
    assert any("no verdict" in w for w in warnings(f))


def test_a_lost_confirmation_run_takes_the_verdict(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL, confirm=(100, 101, 102, 103))
    lost = cell(store, "lora-r4-a16-all-linear")["runs"]["confirm"][0]
    rewrite(store, lost, status="diverged", metrics={}, error="the loss was not finite")
    f = found(store.root)
    made = f.versus["lora-r4-a16-all-linear"]
    assert made.blocked is not None
    assert "did not survive" in made.blocked
    assert any("1 confirmation run of 4 diverged or failed" in w for w in warnings(f))


def test_where_no_confirmation_run_survives_tuning_runs_are_not_counted_as_survivors(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL, arrays=False)
    for lost in cell(store, "lora-r4-a16-all-linear")["runs"]["confirm"]:
        rewrite(store, lost, status="diverged", metrics={}, error="the loss was not finite")
    told = next(w for w in warnings(found(store.root)) if "diverged or failed;" in w)
    assert told == "LoRA r = 4: 3 confirmation runs of 3 diverged or failed; it has no test result."


def test_a_smaller_adapter_that_is_beyond_the_margin_is_no_open_question(tmp_path: Path) -> None:
    weak = dataclasses.replace(RANK_SWEEP[1], quality=0.60, seed_sd=0.001)
    f = found(build(tmp_path / "s", [weak, dataclasses.replace(RANK_SWEEP[3], seed_sd=0.001)], arrays=False).root)
    lead = answer(f).lead
    assert lead.startswith("LoRA r = 64 is the one to keep (")
    assert lead.endswith("LoRA r = 4, the next smaller one, falls short of it by more than 2.0 points.")


def test_confirmation_at_a_rate_no_longer_chosen_is_not_used(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL)
    for run_id in cell(store, "lora-r64-a16-all-linear")["runs"]["tune"]:
        record = store.read(run_id)
        assert record is not None
        if record.config["optimizer"]["lr"] == 1e-3:
            rewrite(store, run_id, metrics=record.metrics | {"val/loss": 0.01})
    f = found(store.root)
    assert f.results["lora-r64-a16-all-linear"].test is None
    assert f.results["lora-r64-a16-all-linear"].stale == 3
    assert any("no longer the chosen one" in w for w in warnings(f))


@pytest.mark.usefixtures("undrawn")
def test_unfinished_sweeps_and_strangers(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL)
    gone = cell(store, "headonly-head")["runs"]["tune"][0]
    (store.run_dir(gone) / "run.json").unlink()
    stranger = store.read(cell(store, "headonly-head")["runs"]["tune"][1])
    assert stranger is not None
    store.write(dataclasses.replace(stranger, run_id="f" * 12))
    assert any("1 run of 21 had not ended" in w for w in warnings(found(store.root)))
    render(store.root, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "Records outside the manifest" in text
    assert "f" * 12 in text


def test_test_numbers_of_tuning_runs_are_not_used(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL, confirm=())
    for record in store.records():
        rewrite(store, record.run_id, metrics=record.metrics | {"test/accuracy": 0.99})
    f = found(store.root)
    assert not f.confirmed
    assert any("tuning records hold test numbers" in w for w in warnings(f))


def test_mixed_precision_is_flagged(rank: Path) -> None:
    assert any("differ in precision: bf16, but bf16-mixed for full fine-tuning" in w for w in warnings(found(rank)))


# -- what it refuses -------------------------------------------------------------------------------------------------


def test_bad_sweeps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an existing directory"):
        render(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither sweep\.json nor runs"):
        render(tmp_path / "empty", tmp_path / "out")
    store = build(tmp_path / "s", SMALL[:1], confirm=())
    for record in store.records():
        rewrite(store, record.run_id, status="failed", error="out of memory")
    with pytest.raises(ConfigError, match="a sweep with finished runs; of 4 runs: 4 failed"):
        render(store.root, tmp_path / "out")
    (store.root / "sweep.json").write_text("{", encoding="utf-8")
    with pytest.raises(ExistingWork, match="not valid JSON"):
        render(store.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_directory_of_others_is_left_alone(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL[:1], confirm=())
    out = tmp_path / "out"
    render(store.root, out)
    before = (out / "report.html").read_bytes()
    render(store.root, out)  # over itself
    assert (out / "report.html").read_bytes() == before
    for name in ("thesis.docx", "figures/mine.pdf", "tables/mine.csv", "figures/mine.png"):
        (out / name).write_text("years of work", encoding="utf-8")
        with pytest.raises(ExistingWork, match=name):
            render(store.root, out)
        assert (out / name).read_text(encoding="utf-8") == "years of work"
        (out / name).unlink()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="this is a file"):
        render(store.root, tmp_path / "file")


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_known_by_its_mark_and_content_not_by_its_names(tmp_path: Path) -> None:
    store = build(tmp_path / "s", SMALL[:1], confirm=())
    mine = tmp_path / "mydocs"
    (mine / "figures").mkdir(parents=True)
    for name in ("report.md", "figures/a.svg"):
        (mine / name).write_text("years of work", encoding="utf-8")
    with pytest.raises(ExistingWork, match=r"figures/a.svg, report.md and no .*choose another folder"):
        render(store.root, mine)
    assert names(mine) == {"report.md", "figures/a.svg"}
    out = tmp_path / "out"
    render(store.root, out)
    with open(out / "report.md", "a", encoding="utf-8") as f:
        f.write("my notes")
    with pytest.raises(ExistingWork, match="report.md changed since"):
        render(store.root, out)
    assert (out / "report.md").read_text(encoding="utf-8").endswith("my notes")
    aside = tmp_path / ".new.old"  # where a writer puts the old folder for an instant
    aside.mkdir()
    (aside / "a.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ExistingWork, match="a.txt"):
        render(store.root, tmp_path / "new")
    assert (aside / "a.txt").exists()


def test_a_place_where_the_report_cannot_go_is_refused_by_its_key(tmp_path: Path) -> None:
    sweep = tmp_path / "sweeps" / "s"
    sweep.mkdir(parents=True)
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "report.md").write_text("mine", encoding="utf-8")
    for place in (sweep, sweep.parent, sweep / "runs" / "report", tmp_path / "file" / "report", tmp_path / "docs"):
        with pytest.raises(ConfigError, match=r"^report\.dir="):
            check_place(place, sweep)
    for place in (sweep / "report", tmp_path / "reports" / "s", sweep.parent / "absent"):
        check_place(place, sweep)


@pytest.mark.usefixtures("undrawn")
def test_the_old_report_stands_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(tmp_path / "s", SMALL[:1], confirm=())
    out = tmp_path / "reports" / "out"
    render(store.root, out)
    before = {n: (out / n).read_bytes() for n in names(out)}

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        render(store.root, out)
    assert {n: (out / n).read_bytes() for n in names(out)} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


# -- the command -----------------------------------------------------------------------------------------------------


def run(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorabench.report", *args]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def test_exit_codes_and_default_directory(tmp_path: Path) -> None:
    store = build(tmp_path / "sweeps" / "mine", SMALL[:1], confirm=())
    done = run(str(store.root), "--title", "A title", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "# A title" in (tmp_path / "reports/mine/report.md").read_text(encoding="utf-8")
    bad = run("nowhere", cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "sweep dir=nowhere" in bad.stderr
    assert run(cwd=tmp_path).returncode == 2


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = {"torch", "pandas", "matplotlib", "seaborn", "scipy", "jinja2", "great_tables"}
    code = (
        "import runpy, sys; sys.argv = ['report', '--help']\n"
        "try: runpy.run_module('lorabench.report', run_name='__main__')\n"
        f"finally: print('heavy:', *(set(sys.modules) & {heavy}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--out" in done.stdout
    assert done.stderr.strip().endswith("heavy:")


def test_no_torch_anywhere_in_a_report(rank: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; from lorabench.report import render; render({str(rank)!r}, 'out'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_equal_records_give_equal_bytes(rank: Path, report: Path, tmp_path: Path) -> None:
    """Another process, hash seed, folder, locale and time zone."""
    away = tmp_path / "elsewhere"
    away.mkdir()
    env = {"PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo", "LC_ALL": "C", "MPLBACKEND": "svg", "HOSTNAME": "other"}
    done = run(str(rank), "--out", "copy", cwd=away, **env)
    assert done.returncode == 0, done.stderr
    assert names(away / "copy") == names(report)
    for name in names(report):
        assert (away / "copy" / name).read_bytes() == (report / name).read_bytes(), name


# -- what users put into it ------------------------------------------------------------------------------------------

HOSTILE = '"><script>alert(1)</script>$x_1^{2}$|&%#`*[a](http://evil.example)'


class References(HTMLParser):
    """Every tag, every address a page would fetch, every id."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on"), (tag, name)


def parsed(path: Path) -> References:
    found = References()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def test_one_file_that_fetches_nothing(report: Path) -> None:
    page = parsed(report / "report.html")
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(a.startswith("#") for a in page.addresses)
    text = (report / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_the_page_is_accessible(report: Path) -> None:
    page, text = parsed(report / "report.html"), (report / "report.html").read_text(encoding="utf-8")
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("h1") == 1
    assert '<html lang="en">' in text
    assert 'name="viewport"' in text
    for svg in re.findall(r"<svg[^>]*>.{0,40}", text):
        assert 'aria-hidden="true"' in svg or ('role="img"' in svg and "<title" in svg)
    for target in re.findall(r'aria-labelledby="([^"]+)"', text):
        assert target in page.ids
    levels = [int(t[1]) for t in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert "@media print" in text
    assert "prefers-color-scheme: dark" in text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names, axes, questions and errors that would break out of a page, a spreadsheet, LaTeX or Markdown."""
    root = tmp_path_factory.mktemp("hostile")
    label = {"method": HOSTILE, "targets": "=HYPERLINK(1)", "extra": {"task.<b>": HOSTILE, "task.ü": "日本語 ﷽"}}
    cells = [RANK_SWEEP[0], dataclasses.replace(RANK_SWEEP[1], label=label), RANK_SWEEP[3]]
    store = build(root / "s", cells, name=HOSTILE, study={"question": HOSTILE})
    lost = next(r for r in store.records() if r.status == "diverged")
    config = {**lost.config, "method": {**lost.config["method"], "target_modules": ["=cmd|' /C calc'!A0", "x"]}}
    rewrite(store, lost.run_id, config=config, error=f"@SUM(1)\n{HOSTILE} /home/somebody/secret/data.csv")
    rewrite(
        store,
        store.records()[0].run_id,
        error="OSError: [Errno 2] No such file: '/home/somebody/secret/data.csv' " + HOSTILE,
    )
    render(store.root, root / "out", title=HOSTILE)
    return root / "out"


def test_html_is_escaped(hostile: Path) -> None:
    text = (hostile / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "script" not in parsed(hostile / "report.html").tags
    assert "<b>" not in text


def test_svg_files_are_well_formed(hostile: Path) -> None:
    from xml.etree import ElementTree as ET

    for path in hostile.glob("figures/*.svg"):
        assert not [e for e in ET.parse(path).iter() if e.tag.endswith("script")]


def test_csv_holds_no_formula(hostile: Path) -> None:
    rows = list(csv.reader(io.StringIO((hostile / "runs.csv").read_text(encoding="utf-8"))))
    numbers = re.compile(r"-?[\d.]+(e[-+]?\d+)?")
    for field in (f for row in rows for f in row):
        assert not field.startswith(("=", "+", "-", "@", "\t", "\r")) or numbers.fullmatch(field), field
    assert any(f.startswith("'=cmd") for row in rows for f in row)
    assert any(f.startswith("'@SUM") for row in rows for f in row)


def test_latex_is_escaped(hostile: Path) -> None:
    for path in hostile.glob("tables/*.tex"):
        body = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("%")]
        text = "\n".join(body)
        assert not re.search(r"(?<!\\)[%#_^~]", text.replace(r"\textasciicircum{}", ""))
        assert text.count("&") > 5
        rows = [line for line in body if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in rows}) == 1
        text.encode("latin-1")


def test_markdown_is_escaped(hostile: Path) -> None:
    whole = (hostile / "report.md").read_text(encoding="utf-8")
    text = "\n".join(
        line for line in whole.splitlines() if not line.startswith("    ")
    )  # but for the command, which is code
    assert "<script" not in text.replace("\\<script", "")
    assert not re.search(r"(?<!\\)\]\(http", text)
    lines = text.splitlines()
    start = lines.index("## Comparison")
    table = [line for line in lines[start : start + 10] if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_errors_lose_their_folders(hostile: Path) -> None:
    for name in names(hostile):
        assert b"/home/somebody" not in (hostile / name).read_bytes(), name
    assert "…/data.csv" in (hostile / "runs.csv").read_text(encoding="utf-8")


def test_the_bases_score_before_training_is_said(tmp_path: Path) -> None:
    """Of a language model, whose loss after training says little by itself."""
    store = build(tmp_path / "s", RANK_SWEEP[1:3], metric="loss")
    assert "Before training" not in dict(answer(found(store.root)).points)
    for record in store.records():
        if record.role == "confirm":
            store.write(dataclasses.replace(record, metrics={**record.metrics, "base/loss": 3.61234}))
    said = dict(answer(found(store.root)).points)["Before training"]
    assert said.startswith("The base alone has a test loss of 3.612")
