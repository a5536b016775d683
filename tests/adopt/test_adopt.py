"""What others measured becomes records that the report reads; what a source does not say is marked, not made up."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.sweeps import RANK_SWEEP, build
from lorabench.adopt.__main__ import main
from lorabench.report import render
from lorabench.report.cautions import warnings as warnings_of
from lorabench.results.findings import find
from lorabench.results.recommendation import candidates
from lorabench.results.sweep import load
from lorabench.store.records import Store


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    return path


def grid() -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {"Name": f"run-{r}-{seed}", "State": "finished", "lora_r": r, "lora_alpha": 16, "learning_rate": 2e-4, "seed": seed,
         "eval_loss": 0.7 - r / 100, "test_accuracy": 0.7 + r / 200 + 0.004 * rng.standard_normal(), "eval_runtime": 3.0}
        for r in (4, 16) for seed in (1, 2, 3, 4)
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_a_wandb_export_becomes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = table(tmp_path / "export.csv", grid()), tmp_path / "sweeps" / "mine"
    assert (
        main(
            [str(path), "--out", str(out), "--set", "task.name=mnli", "--set", "method.target_modules=[q_proj,v_proj]"]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "8 runs" in told and "nothing was said of method.name, model.name, trainer.batch_size" in told
    records = Store(out).records()
    assert {r.role for r in records} == {"confirm"}
    assert all(set(r.metrics) == {"val/loss", "test/accuracy", "primary", "lower_is_better"} for r in records)
    assert {r.config["method"]["r"] for r in records} == {4, 16}
    assert records[0].provenance["missing"] == ["method.name", "trainer.batch_size", "model.name"]
    made = render(out, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert made.confirmed and "LoRA r = 16" in text
    assert (
        main(
            [str(path), "--out", str(out), "--set", "task.name=mnli", "--set", "method.target_modules=[q_proj,v_proj]"]
        )
        == 0
    )
    assert len(Store(out).records()) == 8, "adopting twice adds nothing"


def test_a_crashed_run_takes_no_cell_with_it(tmp_path: Path) -> None:
    rows = grid()
    rows[0] |= {"State": "crashed", "eval_loss": "", "test_accuracy": ""}
    assert main([str(table(tmp_path / "t.csv", rows)), "--out", str(tmp_path / "mine")]) == 0
    assert {r.role for r in Store(tmp_path / "mine").records()} == {"confirm"}
    assert {r.metrics["primary"] for r in Store(tmp_path / "mine").records()} == {"accuracy"}
    f = find(load(tmp_path / "mine"))
    lost = next(r for r in f.results.values() if r.cell.r == 4)
    assert (len(lost.runs), lost.lost, lost.lr) == (3, 1, 2e-4)
    assert any("1 confirmation run of 4 diverged or failed" in said for said in warnings_of(f))


def test_of_rates_that_were_all_tested_the_best_on_validation(tmp_path: Path) -> None:
    rows = [
        {"lora_r": 8, "learning_rate": lr, "seed": seed, "eval_loss": loss + seed / 1e3, "test_wer": 0.3 - seed / 1e3}
        for lr, loss in ((1e-4, 0.5), (3e-4, 0.4), (1e-3, 0.6)) for seed in (1, 2, 3)
    ]  # fmt: skip
    argv = [str(table(tmp_path / "t.csv", rows)), "--out", str(tmp_path / "mine"), "--lower-is-better"]
    assert main(argv) == 0
    f = find(load(tmp_path / "mine"))
    (found,) = f.results.values()
    assert found.lr == 3e-4 and f.metric.lower_is_better
    assert any("although runs at 3 rates were tested" in said for said in warnings_of(f))


def test_what_transformers_trainer_tells_wandb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = {
        "r": 8,
        "lora_alpha": 16,
        "use_dora": "true",
        "use_rslora": "false",
        "target_modules": '["q_proj","v_proj"]',
    }
    row = {f"peft_config.default.{key}": value for key, value in peft.items()}
    row |= {"_name_or_path": "roberta-base", "learning_rate": 1e-4, "eval/loss": 0.4, "seed": 1}
    assert main([str(table(tmp_path / "t.csv", [row])), "--out", str(tmp_path / "mine")]) == 0
    (record,) = Store(tmp_path / "mine").records()
    assert record.config["method"] == {
        "name": "dora", "r": 8, "alpha": 16, "use_rslora": False, "target_modules": ["q_proj", "v_proj"]
    }  # fmt: skip
    assert record.config["model"]["name"] == "roberta-base"
    bare = table(tmp_path / "bare.csv", [{"learning_rate": 1e-4, "eval/loss": 0.4}])
    capsys.readouterr()
    assert main([str(bare), "--out", str(tmp_path / "bare")]) == 0
    assert "nothing was said of method.name" in capsys.readouterr().out, "full fine-tuning is a guess"


def test_columns_of_ones_own_names(tmp_path: Path) -> None:
    rows = [{"size": r, "step_size": 1e-3, "acc": 0.5 + r / 100} for r in (1, 2)]
    path, out = table(tmp_path / "own.csv", rows), tmp_path / "mine"
    argv = [str(path), "--out", str(out), "--column", "method.r=size", "--column", "optimizer.lr=step_size"]
    assert main([*argv, "--metric", "test/accuracy=acc"]) == 0
    records = Store(out).records()
    assert sorted(r.metrics["test/accuracy"] for r in records) == [0.51, 0.52]
    assert len({r.config["seed"] for r in records}) == 2, "rows without a seed are never taken for the same seed"
    assert all("seed" in r.provenance["missing"] for r in records)
    again = table(tmp_path / "more.csv", [{**rows[0], "acc": 0.7}])
    assert main([str(again), *argv[1:], "--metric", "test/accuracy=acc"]) == 0
    assert len({r.config["seed"] for r in Store(out).records()}) == 3, "nor are those of another call"


def test_a_table_as_pandas_or_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    """Whole numbers beside empty cells get a decimal point; commas become semicolons."""
    path = tmp_path / "t.csv"
    path.write_text("r;lr;seed;test_accuracy\n4.0;1e-3;0;0.5\n;5e-5;0;0.6\n")
    assert main([str(path), "--out", str(tmp_path / "mine")]) == 0
    lora, full = sorted(Store(tmp_path / "mine").records(), key=lambda r: r.metrics["test/accuracy"])
    assert lora.config["method"] == {"r": 4, "name": "lora"} and type(lora.config["method"]["r"]) is int
    assert full.config["method"] == {"name": "full"}


def test_alpha_at_twice_the_rank_is_one_series(tmp_path: Path) -> None:
    """As most people train with peft; nothing says how many parameters that is."""
    rows = [
        {"r": r, "lora_alpha": 2 * r, "lr": 1e-3, "seed": seed, "test_accuracy": 0.7 + seed / 1e3 + r * seed % 5 / 1e4}
        for r in (4, 16) for seed in range(4)
    ]  # fmt: skip
    assert main([str(table(tmp_path / "t.csv", rows)), "--out", str(tmp_path / "mine")]) == 0
    f = find(load(tmp_path / "mine"))
    assert {c.alpha_rule for c in f.sweep.cells} == {"2r"} and len({c.series for c in f.sweep.cells}) == 1
    assert f.recommendation is not None and f.results[str(f.recommendation.cell)].cell.r == 4
    assert f.reference is not None
    steps = candidates(f.results.values(), f.results[f.reference])  # by rank, as nothing says how many parameters
    assert f.results[f.reference].cell.r == 16 and [r.cell.r for r in steps] == [4]


def test_a_sweep_that_was_planned_keeps_its_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = build(tmp_path / "s", RANK_SWEEP[:1])
    path = table(tmp_path / "t.csv", [{"r": 4, "lr": 1e-3, "test_accuracy": 0.7}])
    assert main([str(path), "--out", str(store.root)]) == 0
    assert "lists these runs apart from its cells" in capsys.readouterr().out


def test_folders_that_peft_and_trainer_wrote(tmp_path: Path) -> None:
    """Real ones: a tiny model, peft and transformers' own Trainer."""
    import torch
    import transformers as tf
    from peft import LoraConfig, get_peft_model

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"input_ids": torch.tensor([1, 2, i + 3]), "labels": i % 2}

    base = tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    folder = tmp_path / "out"
    arguments = tf.TrainingArguments(
        str(folder), max_steps=2, learning_rate=5e-4, eval_strategy="steps", eval_steps=1, logging_steps=1, save_steps=2,
        report_to=[], use_cpu=True, per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS"))
        trainer = tf.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train()
        trainer.save_model()
        trainer.save_state()
    assert main([str(folder), "--out", str(tmp_path / "mine")]) == 0
    (record,) = Store(tmp_path / "mine").records()
    assert record.role == "tune" and record.config["method"] == {
        "name": "lora", "r": 2, "alpha": 4, "dropout": 0.0, "use_rslora": False, "target_modules": ["query"]
    }  # fmt: skip
    assert record.config["trainer"]["max_steps"] == 2
    assert 0 < record.config["optimizer"]["lr"] <= 5e-4
    assert record.metrics["val/loss"] > 0 and record.metrics["primary"] == "loss"


class TestAttach:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        path = table(tmp_path / "t.csv", [{"r": 4, "lr": 1e-3, "seed": 0, "eval_loss": 0.5}])
        assert main([str(path), "--out", str(tmp_path / "mine")]) == 0
        (run_id,) = Store(tmp_path / "mine").run_ids()
        return tmp_path / "mine" / "runs" / run_id

    def record(self, run: Path) -> Any:
        return Store(run.parent.parent).read(run.name)

    def test_a_number(self, run: Path) -> None:
        assert main(["--attach", str(run), "--score", "test/bleu=31.2"]) == 0
        record = self.record(run)
        assert record.metrics["test/bleu"] == 31.2 and record.provenance["attached"] == ["test/bleu"]
        assert main(["--attach", str(run), "--score", "test/bleu=99"]) == 2, "what was measured is not overwritten"
        assert self.record(run).metrics["test/bleu"] == 31.2

    def test_per_example_results(self, run: Path, tmp_path: Path) -> None:
        rows = [{"example": i, "correct": int(i != 3), "loss": i / 10} for i in range(5)]
        assert main(["--attach", str(run), "--examples", str(table(tmp_path / "e.csv", rows))]) == 0
        assert self.record(run).metrics["test/accuracy"] == pytest.approx(0.8)
        arrays = Store(run.parent.parent).arrays(run.name, "test")
        assert arrays is not None and arrays["correct"].tolist() == [1, 1, 1, 0, 1]

    def test_per_example_results_never_replace_others(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        store = Store(run.parent.parent)
        held = {"example": np.array([7, 3, 5], np.uint64), "loss": np.array([0.1, 0.2, 0.3], np.float32)}
        store.write_arrays(run.name, "test", {**held, "weight": np.ones(3, np.float32)})

        def attach(*rows: dict[str, Any]) -> int:
            return main(["--attach", str(run), "--examples", str(table(tmp_path / "e.csv", list(rows)))])

        assert attach({"example": 1, "correct": 1}, {"example": 2, "correct": 0}) == 2
        assert "the 3 test examples" in capsys.readouterr().err
        assert attach(*({"example": i, "loss": 9} for i in (3, 5, 7))) == 2
        assert "columns this run does not hold yet" in capsys.readouterr().err
        assert attach(*({"example": i, "correct": int(i != 5)} for i in (3, 5, 7))) == 0
        found = store.arrays(run.name, "test")
        assert found is not None and found["loss"].tolist() == held["loss"].tolist()
        assert found["example"].tolist() == [7, 3, 5] and found["correct"].tolist() == [1, 1, 0]

    def test_a_tuning_run_of_ours_takes_no_test_result(self, run: Path) -> None:
        store, record = Store(run.parent.parent), self.record(run)
        del record.provenance["adopted"]
        store.write(record)
        assert main(["--attach", str(run), "--score", "test/bleu=31.2"]) == 2
        assert main(["--attach", str(run), "--score", "probe/wikitext=3.1"]) == 0


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ([{"r": 4, "seed": 0, "test_acc": 0.5}], [], "optimizer.lr"),
        ([{"r": 4, "lr": 1e-3}], [], "--metric"),
        ([{"r": 4, "lr": 1e-3, "test_acc": "high"}], [], "row 1"),
        ([{"r": 4, "lr": 1e-3, "test_acc": 0.5, "state": "running"}], [], "status=running"),
        ([{"r": 4, "lr": 1e-3, "test_acc": 0.5, "method": "magic"}], [], "method.name"),
        ([{"r": 4, "lr": 1e-3, "test_acc": 0.5, "seed": "first"}], [], "seed=first"),
        ([{"r": 4, "lr": 1e-3, "test_acc": 0.5}], ["--column", "method.alpha=a"], "a column of"),
        ([{"r": 4, "lr": 1e-3, "test_acc": 0.5}], ["--set", "nonsense"], "KEY=VALUE"),
        (
            [{"r": 4, "lr": 1e-3, "test_acc": 0.5, "seed": "first"}],
            [],
            "seed=first: a whole number from 0 on (file t.csv",
        ),
        ([{"r": "four", "lr": 1e-3, "test_acc": 0.5}], [], "method.r=four: a whole number from 1 on"),
        ([{"r": 4, "lr": 1e-3, "test_accuracy": 71.3}], [], "test/accuracy=71.3: a share from 0 to 1, such as 0.713"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], more: list[str], says: str
) -> None:
    assert main([str(table(tmp_path / "t.csv", rows)), "--out", str(tmp_path / "mine"), *more]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"log_history": []}'])
def test_folders_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if text:
        (folder / "trainer_state.json").write_text(text)
    assert main([str(folder), "--out", str(tmp_path / "mine")]) == 2
    assert "error: source=" in capsys.readouterr().err
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["out"]'


def test_a_folder_of_folders_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run-1", "run-2"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "eval_results.json").write_text('{"eval_loss": 0.5}')
    assert main([str(tmp_path / "out"), "--out", str(tmp_path / "mine")]) == 2
    assert f"its folders run-1, run-2 have such files: give {tmp_path / 'out'}/*/" in capsys.readouterr().err
    given = [*map(str, (tmp_path / "out").iterdir()), "--set", "optimizer.lr=1e-3"]
    assert main([*given, "--out", str(tmp_path / "mine")]) == 0


def test_an_unknown_metric_is_asked_for_its_direction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def adopted(metric: str, *words: str) -> bool | None:
        rows = [{"r": r, "lr": 1e-3, "seed": s, f"test_{metric}": 0.3 + s / 100} for r in (4, 8) for s in (0, 1)]
        out = tmp_path / f"{metric}{len(words)}{''.join(words)}"
        if main([str(table(tmp_path / "t.csv", rows)), "--out", str(out), *words]) == 2:
            assert not out.exists()
            return None
        return load(out).lower_is_better

    assert adopted("wer") is True and adopted("bleu") is False
    assert adopted("quality") is None
    assert "--lower-is-better or --higher-is-better" in capsys.readouterr().err
    assert adopted("quality", "--lower-is-better") is True and adopted("quality", "--higher-is-better") is False


def test_a_loss_that_is_missing_is_no_divergence(tmp_path: Path) -> None:
    rows = [
        {"r": 4, "lr": lr, "seed": s, "val_accuracy": 0.6 + s / 100, "test_accuracy": ""}
        for lr in (1e-3, 2e-3)
        for s in (0, 1)
    ]
    assert main([str(table(tmp_path / "t.csv", rows)), "--out", str(tmp_path / "mine")]) == 0
    f = find(load(tmp_path / "mine"))
    told = " ".join(warnings_of(f))
    assert "no validation loss is recorded" in told and "diverged" not in told
