"""The best step and early stopping follow the study's selection metric, and a record counts the examples it saw."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from fixtures.jobs import BASE, job
from fixtures.runs import make_base, make_data, make_run
from lorabench.config.errors import ConfigError
from lorabench.config.runs import Pack, parse
from lorabench.store.records import Store
from lorabench.sweep import declaration
from lorabench.training.train import train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("monitor")
    return make_base(root / "bert", "bert"), make_data(root / "data.csv")


def trained(places, root, **changes):
    run = make_run(*places, **{"trainer.eval_interval": 2, "trainer.max_steps": 24, "optimizer.lr": 0.05, **changes})
    store = Store(root)
    (record,) = train(Pack("p0", (run,)), store)
    assert record.status == "completed", record.error
    return record, [row for row in store.history(run.run_id) if "val/loss" in row]


@pytest.mark.parametrize(("monitor", "sign"), [("accuracy", -1), ("macro_f1", -1), ("loss", 1), (None, 1)])
def test_the_best_step_is_the_monitored_metrics_in_its_direction(places, tmp_path, monitor, sign):
    record, rows = trained(places, tmp_path, **{"trainer.monitor": monitor})
    name = f"val/{monitor or 'loss'}"
    best = min(rows, key=lambda row: sign * row[name])
    assert (record.metrics["best_step"], record.metrics[name]) == (best["step"], best[name])
    by_loss = min(rows, key=lambda row: row["val/loss"])
    assert sign > 0 or best["step"] != by_loss["step"], "the two metrics must disagree for this to be a test"


def test_early_stopping_waits_for_the_monitored_metric(places, tmp_path):
    changes = {"trainer.monitor": "accuracy", "trainer.early_stopping_patience": 2}
    record, rows = trained(places, tmp_path, **changes)
    best = waited = 0.0
    for row in rows:
        waited = 0 if row["val/accuracy"] > best else waited + 1
        best = max(best, row["val/accuracy"])
    assert waited == 2 and record.provenance["stopped"] == "no better validation accuracy for 2 evaluations"


def test_the_studys_selection_is_what_a_run_follows_and_the_loss_keeps_its_run_id():
    def run(**changes):
        cfg = OmegaConf.create(BASE)
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        return parse(cfg)[0]

    plain = run()
    assert "monitor" not in plain.identity()["trainer"] and run(**{"study.selection": "loss"}).run_id == plain.run_id
    assert run(**{"trainer.monitor": "loss"}).run_id == plain.run_id
    by_accuracy = run(**{"study.selection": "accuracy"})
    assert by_accuracy.trainer.monitor == "accuracy" and by_accuracy.run_id != plain.run_id
    both = run(**{"study.selection": "accuracy", "trainer.monitor": "loss"})
    assert both.trainer.monitor == "loss"


def test_a_metric_that_the_task_lacks_is_refused_and_pruning_needs_the_loss():
    with pytest.raises(ConfigError, match=r"trainer\.monitor=bleu: a metric of task"):
        declaration.check_metrics(job(**{"trainer.monitor": "bleu"}))
    with pytest.raises(ConfigError, match=r"sweep\.prune=True: false where trainer\.monitor=accuracy"):
        declaration.check_metrics(job(**{"trainer.monitor": "accuracy", "sweep.prune": True}))


def test_examples_are_those_that_were_seen(places, tmp_path):
    changes = {"trainer.max_steps": None, "trainer.max_epochs": 2, "trainer.batch_size": 7, "trainer.eval_interval": 99}
    record, _ = trained(
        places, tmp_path, **{k: v for k, v in changes.items() if v is not None} | {"trainer.max_steps": None}
    )
    n = record.resources["train_examples"]
    assert n % 7 and record.resources["examples"] == 2 * n
