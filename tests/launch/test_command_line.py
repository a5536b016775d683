"""The words of a command line, and what is said of those that Hydra refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorabench.config.errors import ConfigError
from lorabench.config.secrets import mask_values, mask_word
from lorabench.launch.command_line import run_words, sweep_name, sweep_words
from lorabench.launch.guards import check_arguments, explain_unknown_setting

SOURCE = SimpleNamespace(provider="command-line", path="file://conf_of_mine")


def test_the_words_that_ask_for_a_run_leave_out_rate_seed_and_place() -> None:
    words = ["+experiment=x", "method.r=4", "optimizer.lr=1e-3", "seed=1", "sweep.name=s", "hydra/launcher=slurm"]
    assert run_words(words) == ["+experiment=x", "method.r=4"]
    assert run_words(["~tracker", "optimizer.lr_scale=2"], [SOURCE]) == [
        "--config-dir",
        "conf_of_mine",
        "optimizer.lr_scale=2",
    ]


def test_a_sweep_is_named_by_its_experiment_or_by_what_it_asks_for() -> None:
    assert sweep_name(["method.r=4"], "rank_sweep") == "rank_sweep"
    name = sweep_name(["method.r=4", "seed=1"], None)
    assert name == sweep_name(["seed=1", "method.r=4", "report.title=x", "+sweep.dir=y"], None)
    assert name != sweep_name(["method.r=8", "seed=1"], None)


def test_values_of_keys_are_masked_in_the_words_of_a_sweep() -> None:
    task = ["method.r=1,2", "hydra.mode=MULTIRUN", "hydra.launcher.setup=['export HF_TOKEN=abc','export A=1']"]
    hydra = SimpleNamespace(
        overrides=SimpleNamespace(hydra=[], task=task), runtime=SimpleNamespace(config_sources=[SOURCE])
    )
    masked = "hydra.launcher.setup=***"
    assert sweep_words(hydra) == ["-m", "--config-dir", "conf_of_mine", "method.r=1,2", masked]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("""hydra.launcher.setup=['export PW="my words, with; all"']""", "hydra.launcher.setup=***"),
        ("+tracker.api_key=abc", "+tracker.api_key=***"),
        ("""+x.y={export:'MY_TOKEN="a b",c'}""", "+x.y={export:'MY_TOKEN=***"),
        ("task.file=/data/opensesame1/a.csv", "task.file=/data/***/a.csv"),
        ("method.projection_key=3", "method.projection_key=3"),
        ("trainer.max_tokens=512", "trainer.max_tokens=512"),
    ],
)
def test_a_secret_is_masked_by_its_key_and_by_its_value(monkeypatch: pytest.MonkeyPatch, word: str, shown: str) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "opensesame1")
    assert run_words([word]) in ([shown], [])  # hydra's and the tracker's say nothing of a run
    assert mask_word(word) == shown
    assert mask_values("401 for opensesame1") == "401 for ***"


@pytest.mark.parametrize("argument", ["+model._target_=os.system", "a={b:{_target_:x}}", "hydra.callbacks.x=y"])
def test_code_is_not_named(argument: str) -> None:
    with pytest.raises(ConfigError, match="settings only"):
        check_arguments([argument])
    check_arguments(["hydra/launcher=basic", "method.r=4"])


def test_an_unknown_setting_is_explained() -> None:
    message = "Could not override '{0}'.\nTo append to your config use +{0}=1e-3"
    assert "here it is optimizer.lr" in str(explain_unknown_setting(message.format("trainer.learning_rate")))
    assert "is added as +method.x=..." in str(explain_unknown_setting(message.format("method.x")))
    assert explain_unknown_setting("anything else") is None
