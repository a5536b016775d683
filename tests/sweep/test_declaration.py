"""`study.*`: declared before a sweep runs, hashed, held against what is there, and visible in all that is said of it."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fixtures.runs import make_base, make_data
from fixtures.sweeps import RANK_SWEEP, build
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.config.runs import digest
from lorabench.config.settings import StudyConfig
from lorabench.report import __main__ as face
from lorabench.report import render
from lorabench.report.answer import answer
from lorabench.report.cautions import warnings
from lorabench.results.findings import Findings, find
from lorabench.results.selection import choose
from lorabench.results.sweep import OtherMetric, load
from lorabench.store.records import Record, Store
from lorabench.sweep.declaration import check_unchanged

R1, R4, R16, R64 = (f"lora-r{r}-a16-all-linear" for r in (1, 4, 16, 64))
GRID = ["-m", "method.r=1,2", "optimizer.lr=1e-3,2e-3", "sweep.name=s"]
FAST = [
    "task.train_examples=64",
    "task.val_examples=32",
    "task.test_examples=32",
    "trainer.max_steps=2",
    "trainer.batch_size=4",
]
R1_FAST, R2_FAST = "lora-r1-a16-all-linear", "lora-r2-a16-all-linear"


def sweep(tmp_path: Path, **study: Any) -> Path:
    return build(tmp_path / "rank", study=study).root


def found(root: Path, margin: float | None = None) -> Findings:
    return find(load(root, margin=margin))


# -- before anything runs --------------------------------------------------------------------------------------------

REFUSED = {
    "metric": (["study.metric=bleu"], "study.metric=bleu: a metric of task tweets: accuracy, macro_f1, mcc, loss"),
    "selection": (["study.selection=f1"], "study.selection=f1: a metric of task tweets: accuracy, macro_f1, mcc, loss"),
    "pruned by another": (["study.selection=accuracy", "sweep.prune=true"], "sweep.prune=True: false where study.selection=accuracy"),
    "reference": (["study.reference=lora-r9"], f"study.reference=lora-r9: a cell of this sweep: {R1_FAST}, {R2_FAST}"),
    "family": ([f"study.reference={R1_FAST}", "study.family=[nope]"], f"study.family=nope: a cell of this sweep: {R1_FAST}"),
    "family alone": ([f"study.family=[{R1_FAST}]"], "study.reference=None"),
    "reference in family": ([f"study.reference={R1_FAST}", f"study.family=[{R1_FAST}]"], "without the reference"),
    "anchor": (["method.alpha=16,2r", "study.alpha_anchor=4"], "alpha=16 gives s = 4, alpha=2r gives s = 2"),
    "anchor below 1": (["study.alpha_anchor=0"], "study.alpha_anchor=0: must be at least 1"),
    "margin": (["study.margin=0"], "study.margin=0.0: must be greater than 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_judged_is_refused_and_nothing_is_written(cli, case):
    argv, said = REFUSED[case]
    code, out = cli(*GRID, *FAST, *argv)
    assert code == 2, out
    assert said in out
    assert "Traceback" not in out
    assert not Path("sweeps").exists()


# -- a sweep that is there -------------------------------------------------------------------------------------------


def test_another_declaration_for_a_sweep_that_is_there_is_refused(cli, tmp_path):
    """One that says the same goes on; the manifest holds all that was declared, and its hash."""
    base, data = make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv")
    tiny = ["model=hf", f"model.source={base}", "task=text_file", f"task.file={data}", "task.max_length=32"]
    fast = ["trainer.max_steps=2", "trainer.batch_size=4", "sweep.measure_solo=false", "report.enabled=false"]
    argv = [*GRID, *tiny, *fast, "study.selection=accuracy"]
    code, out = cli(*argv, "study.margin=0.02")
    assert code == 0, out
    manifest = Store("sweeps/s").manifest()
    assert manifest["study"]["selection"] == "accuracy"
    assert manifest["study_hash"] == digest(manifest["study"])[:12]
    assert "loss" in manifest["lower_is_better"] and "accuracy" not in manifest["lower_is_better"]
    before = Path("sweeps/s/sweep.json").read_bytes()
    code, out = cli(*argv, "study.margin=0.01")
    assert code == 2, out
    assert "study.margin=0.01: the sweep in sweeps/s was declared with 0.02" in out
    assert "another sweep.name, or report it post hoc with python -m lorabench.report sweeps/s --margin 0.01" in out
    code, out = cli(*argv[:-1], "study.selection=loss")
    assert code == 2 and "was declared with accuracy" in out
    assert Path("sweeps/s/sweep.json").read_bytes() == before
    assert cli(*argv, "study.margin=0.02")[0] == 0
    # rates were chosen by accuracy: no other rate of the cell has a higher one
    store = Store("sweeps/s")
    records = {r.run_id: r for r in store.records()}
    for choice in choose(store.manifest(), records).values():
        best = next(r for r in choice.rates if r.lr == choice.lr)
        assert best.score == max(r.score for r in choice.rates)


def test_a_manifest_of_before_a_key_existed_stays_valid(repo: Path) -> None:
    manifest = Store(repo / "sweeps/ref_rank_sweep").manifest()
    assert set(manifest["study"]) == {"question", "reference", "margin"}
    assert digest(manifest["study"])[:12] == manifest["study_hash"]
    same = StudyConfig(**manifest["study"])
    check_unchanged(manifest, same, "there")
    check_unchanged(manifest, StudyConfig(**manifest["study"], alpha_anchor=8), "there")  # changes no number
    check_unchanged({}, StudyConfig(margin=1), "nothing is there")
    for changed in ({"selection": "accuracy"}, {"metric": "mcc"}, {"family": [R1]}, {"question": "Another?"}):
        with pytest.raises(ExistingWork, match=f"study.{next(iter(changed))}"):
            check_unchanged(manifest, StudyConfig(**(asdict(same) | changed)), "there")
    assert not [w for w in warnings(found(repo / "sweeps/ref_rank_sweep")) if "hash" in w]


def test_an_edited_declaration_shows(tmp_path: Path) -> None:
    root = sweep(tmp_path)
    assert not any("declared" in w for w in warnings(found(root)))
    store = Store(root)
    manifest = store.manifest()
    manifest["study"]["margin"] = 0.05
    store.write_manifest(manifest)
    assert f"its hash is no longer {manifest['study_hash']}" in warnings(found(root))[0]


# -- what acts -------------------------------------------------------------------------------------------------------


def test_the_selection_metric_chooses_the_rate() -> None:
    def record(i: int, lr: float, loss: float | None, accuracy: float | None) -> Record:
        metrics = {"val/loss": loss, "val/accuracy": accuracy}
        return Record(f"{i:012x}", "tune", "completed", {"optimizer": {"lr": lr}, "seed": 0}, metrics)

    runs = [record(0, 1e-3, 0.5, 0.7), record(1, 2e-3, 0.6, 0.8), record(2, 4e-3, 0.4, None)]
    records, manifest = (
        {r.run_id: r for r in runs},
        {"cells": [{"id": "c", "runs": {"tune": [r.run_id for r in runs]}}]},
    )
    assert choose(manifest, records)["c"].lr == 4e-3
    by_accuracy = choose({**manifest, "study": {"selection": "accuracy"}}, records)["c"]
    assert (by_accuracy.lr, by_accuracy.loss) == (2e-3, 0.6)
    assert by_accuracy.rates[2].failures == 1, "a run without the metric that chooses cannot be chosen"
    # an error rate: less is better, as the task said when the manifest was written
    lower = {**manifest, "study": {"selection": "accuracy"}, "lower_is_better": ["accuracy", "loss"]}
    assert choose(lower, records)["c"].lr == 1e-3


@pytest.mark.usefixtures("undrawn")
def test_a_declared_metric_is_the_one_of_the_tables(tmp_path: Path) -> None:
    root = sweep(tmp_path, metric="macro_f1", selection="accuracy")
    f = found(root)
    assert (f.metric.name, f.metric.lower_is_better, f.sweep.selection) == ("macro_f1", False, "accuracy")
    r = f.results[R16]
    tests = [x.metrics["test/macro_f1"] for x in r.runs]
    assert r.test is not None and r.test.mean == pytest.approx(sum(tests) / len(tests))
    adapters = [r for r in f.results.values() if r.cell.adapter]
    assert f.best == max(adapters, key=lambda r: sum(x.metrics["val/accuracy"] for x in r.runs)).id
    render(root, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "macro-F1, higher is better; rates chosen on validation accuracy" in text
    assert "mean val accuracy" in text and "best adapter by validation accuracy of the tuning runs" in text


@pytest.mark.usefixtures("undrawn")
def test_holm_inside_the_declared_family_and_the_others_exploratory(tmp_path: Path) -> None:
    every = found(sweep(tmp_path / "a", reference=R64))
    some = found(sweep(tmp_path / "b", reference=R64, family=[R1, R4]))
    assert {c for c, made in every.versus.items() if made.exploratory} == set()
    assert {c for c, made in some.versus.items() if not made.exploratory} == {R1, R4}
    assert set(some.versus) == set(every.versus)
    raw = {c: made.estimate.p_value() for c, made in some.versus.items()}
    assert some.versus[R16].p == raw[R16] and some.versus[R16].level == 0.95
    worst, least = sorted((R1, R4), key=lambda c: raw[c], reverse=True)  # Holm over two, by hand
    assert some.versus[least].p == pytest.approx(min(1, 2 * raw[least]))
    assert some.versus[worst].p == pytest.approx(max(min(1, 2 * raw[least]), raw[worst]))
    # the sequence of the recommendation is the family's own: r = 16 is not on it
    assert some.recommendation is not None and R16 not in some.recommendation.passed
    render(tmp_path / "b/rank", tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "within the 2 comparisons with LoRA r = 64 (declared). The 3 others are exploratory" in text
    rows = [line for line in text.splitlines() if line.startswith(("| LoRA | 16 |", "| full |", "| head only |"))]
    assert rows and all("(exploratory)" in row for row in rows[:3])
    assert "(exploratory)" not in next(line for line in text.splitlines() if line.startswith("| LoRA | 1 |"))


def test_a_pair_without_the_reference_is_exploratory_in_words(tmp_path: Path) -> None:
    f = found(sweep(tmp_path, reference=R1))
    assert f.best != R1
    assert f.controls["full"].exploratory
    assert "exploratory, 95 % interval" in dict(answer(f).points)["Against full fine-tuning"]
    own = found(sweep(tmp_path / "b", reference="full-everything"))
    control, family = own.controls["full"], own.versus[str(own.best)]
    assert control == family and not control.exploratory
    turned = found(sweep(tmp_path / "c", reference=str(f.best)))
    control, family = turned.controls["full"], turned.versus["full-everything"]
    assert not control.exploratory and control.p == family.p
    assert control.estimate.mean == -family.estimate.mean
    assert {control.direction, family.direction} in ({"better", "worse"}, {"not resolved"})


@pytest.mark.usefixtures("undrawn")
def test_the_first_screen_states_what_was_declared(tmp_path: Path) -> None:
    root = sweep(tmp_path, reference=R64, alpha_anchor=8)
    render(root, tmp_path / "report")
    hash_ = Store(root).manifest()["study_hash"]
    html, text = (Path(tmp_path, "report", name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    said = f"Declared before it ran (study {hash_}): accuracy, higher is better; rates chosen on validation loss; margin 2.0 points (declared); "
    for page in (re.sub("\u00a0", " ", html), re.sub(r"\\(.)", r"\1", text)):
        assert page.index(said + "reference LoRA r = 64 (declared)") < page.index("The answer")
        assert "alpha anchor r = 8 (s = 2)" in page
        assert page.index("Budget and provenance") < page.rindex(hash_)


# -- another margin, afterwards --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_another_margin_is_post_hoc_wherever_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert face.main([str(root), "--margin", "0.01"]) == 0
    out = capsys.readouterr().out
    assert "post hoc" in out and "reports/rank-post-hoc/report.html" in out
    text = Path("reports/rank-post-hoc/report.md").read_text(encoding="utf-8")
    plain = re.sub(r"\\(.)", r"\1", text)
    assert "margin 1.0 points (post hoc; declared: 2.0 points)" in plain
    assert "margin ± 1.0 points, post hoc" in plain
    for line in plain.splitlines():  # no line has the new margin without the word
        assert "1.0 points" not in line or "post hoc" in line or "margin" not in line, line
    assert face.main([str(root), "--margin", "0.02", "--out", "same"]) == 0
    assert "post hoc" not in Path("same/report.md").read_text(encoding="utf-8")
    capsys.readouterr()
    for bad in ("0", "-1", "nan", "inf"):
        assert face.main([str(root), f"--margin={bad}", "--out", "bad"]) == 2
        assert "margin=" in capsys.readouterr().err
    assert not Path("bad").exists()


def test_another_metric_is_post_hoc_and_takes_a_margin_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was attached to the runs afterwards can be compared, and says that it was."""
    root = sweep(tmp_path)
    store = Store(root)
    confirm = [r for r in store.records() if r.role == "confirm"]
    for r in confirm:
        r.metrics["test/wer"] = 1 - r.metrics["test/accuracy"]
        store.write(r)
    monkeypatch.chdir(tmp_path)
    for argv, key in (
        (["--metric", "wer"], "margin="),
        (["--metric", "bleu", "--margin", "1"], "accuracy, loss, macro_f1, mcc, perplexity, wer"),
        (["--lower-is-better"], "--lower-is-better="),
    ):
        assert face.main([str(root), *argv]) == 2
        assert key in capsys.readouterr().err
    assert not Path("reports").exists()
    assert face.main([str(root), "--metric", "wer", "--lower-is-better", "--margin", "0.02"]) == 0
    out = capsys.readouterr().out
    assert "reports/rank-post-hoc/report.html" in out and "The metric is wer" in out
    text = re.sub(r"\\(.)", r"\1", Path("reports/rank-post-hoc/report.md").read_text(encoding="utf-8"))
    assert "wer (post hoc; the primary one: accuracy), lower is better" in text and "margin 0.020 (post hoc)" in text
    by_accuracy, by_wer = (find(load(root, **kw)) for kw in ({}, {"margin": 0.02, "metric": OtherMetric("wer", True)}))
    for cell, made in by_wer.versus.items():
        assert made.estimate.mean == pytest.approx(-by_accuracy.versus[cell].estimate.mean)
    assert face.main([str(root), "--metric", "accuracy", "--out", "same"]) == 0
    assert "post hoc" not in Path("same/report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_that_declared_nothing_says_so(tmp_path: Path) -> None:
    root = build(tmp_path / "loose", (RANK_SWEEP[1], RANK_SWEEP[3]), manifest=False).root
    render(root, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "No study was declared: accuracy" in text and "2.0 points (default)" in text
    with pytest.raises(ConfigError, match="margin"):
        load(root, margin=float("nan"))


def test_a_margin_of_a_share_is_not_in_points(tmp_path: Path, cli: Any) -> None:
    told = r"margin=2(\.0)?: below 1: accuracy is a share from 0 to 1, and 2 points are 0\.02"
    code, out = cli(*GRID, *FAST, "study.margin=2", "study.metric=accuracy", "sweep.dry_run=true")
    assert code == 2 and re.search(told, " ".join(out.split())), out
    assert not Path("sweeps/s").exists()
    with pytest.raises(ConfigError, match=told):
        load(sweep(tmp_path), margin=2)
    assert load(tmp_path / "rank", margin=2, metric=OtherMetric("loss", True)).margin == 2
    assert cli(*GRID, *FAST, "study.margin=2", "study.metric=loss", "sweep.dry_run=true")[0] == 0
