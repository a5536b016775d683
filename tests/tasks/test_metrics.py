"""Metrics against scikit-learn and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as reference

from lorabench.config.errors import ConfigError
from lorabench.tasks import metrics
from lorabench.tasks.text_classification import Config as Classification


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_classification_metrics_equal_scikit_learns(seed: int, classes: int) -> None:
    g = np.random.default_rng(seed)
    label = g.integers(0, classes, 200)
    prediction = np.where(g.random(200) < 0.4, label, g.integers(0, classes, 200))
    assert metrics.accuracy(label, prediction) == pytest.approx(reference.accuracy_score(label, prediction), abs=1e-12)
    assert metrics.macro_f1(label, prediction) == pytest.approx(
        reference.f1_score(label, prediction, average="macro"), abs=1e-12
    )
    assert metrics.mcc(label, prediction) == pytest.approx(reference.matthews_corrcoef(label, prediction), abs=1e-12)
    np.testing.assert_array_equal(metrics.confusion(label, prediction), reference.confusion_matrix(label, prediction))


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize(
    ("label", "prediction"),
    [
        ([0, 1, 2, 2], [0, 0, 0, 0]),  # one class said throughout
        ([1, 1, 1], [1, 1, 1]),  # one class met
        ([0, 0, 3], [5, 0, 3]),  # a class said that was never met; gaps between numbers
    ],
)
def test_edges_equal_scikit_learns(label: list[int], prediction: list[int]) -> None:
    y, said = np.array(label), np.array(prediction)
    assert metrics.mcc(y, said) == pytest.approx(reference.matthews_corrcoef(y, said), abs=1e-12)
    expected = reference.f1_score(y, said, average="macro", zero_division=0.0)
    assert metrics.macro_f1(y, said) == pytest.approx(expected, abs=1e-12)


def test_a_mean_loss_is_weighted_and_summed_in_float64() -> None:
    rows = {"loss_sum": np.array([1.0, 6.0], dtype=np.float32), "weight": np.array([1.0, 3.0], dtype=np.float32)}
    assert metrics.mean_loss(rows) == 7 / 4
    many = {"loss_sum": np.full(10**6, 0.1, dtype=np.float32), "weight": np.ones(10**6, dtype=np.float32)}
    assert metrics.mean_loss(many) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_perplexity() -> None:
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(1e4) == math.inf


# -- a user's own ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "def found(rows):\n    return np.mean(rows['prediction'][rows['label'] == 1] == 1)\n"
        "def cost(rows):\n    return 3\n"
        "cost.lower_is_better = True\n"
        "def broken(rows):\n    return rows['nothing']\n"
        "number = 4\n"
    )
    return str(path)


def test_a_metric_from_a_file(own: str) -> None:
    rows = {"label": np.array([1, 1, 0]), "prediction": np.array([1, 0, 0])}
    assert metrics.extra([f"{own}:found", f"{own}:cost"], rows, "task.extra_metrics") == {"found": 0.5, "cost": 3.0}
    assert Classification(file="rows.csv", extra_metrics=[f"{own}:found", f"{own}:cost"]).lower_is_better == (
        "loss",
        "perplexity",
        "cost",
    )


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("found", "a Python file and a function"),
        ("nowhere.py:found", "no such .py file"),
        ("{own}:absent", "no function named absent"),
        ("{own}:number", "no function named number"),
        ("{own}:", "a Python file and a function"),
    ],
)
def test_a_metric_that_is_not_there(own: str, spec: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as e:
        metrics.load_metric(spec.replace("{own}", own), "task.extra_metrics")
    assert e.value.key == "task.extra_metrics"


def test_a_metric_that_fails_names_itself(own: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"broken.*the function failed: KeyError"):
        metrics.extra([f"{own}:broken"], {}, "task.extra_metrics")
    torn = tmp_path / "torn.py"
    torn.write_text("def f(:\n")
    with pytest.raises(ConfigError, match="does not import: SyntaxError"):
        metrics.load_metric(f"{torn}:f", "task.extra_metrics")


def test_primary_metrics_are_checked(own: str) -> None:
    metrics.check_metrics("found", ("accuracy",), [f"{own}:found"], "task")
    with pytest.raises(ConfigError, match=r"task\.metric=auc: allowed: accuracy, found"):
        metrics.check_metrics("auc", ("accuracy",), [f"{own}:found"], "task")
    with pytest.raises(ConfigError, match="a metric of that name already"):
        metrics.check_metrics("found", ("found",), [f"{own}:found"], "task")


def test_the_commonest_label_as_a_baseline_of_every_bounded_metric() -> None:
    label = np.repeat([0, 1, 2], [6, 3, 1])
    always = np.zeros(10, dtype=int)
    found = metrics.majority_baselines({"a": 6, "b": 3, "c": 1, "d": 0})
    assert found["accuracy"] == pytest.approx(metrics.accuracy(label, always))
    assert found["macro_f1"] == pytest.approx(metrics.macro_f1(label, always))
    assert found["mcc"] == metrics.mcc(label, always) == 0
    assert metrics.majority_baselines({}) == {}
