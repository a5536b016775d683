"""A loss is in nats where its task says so, and in nothing where the task says nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.planted_sweeps import rule_sweep
from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.report import render, theme
from lorabench.results import formatting, units
from lorabench.results.findings import find
from lorabench.results.sweep import Sweep, load
from lorabench.stats import estimates
from lorabench.store.records import Store

KINDS = {"text_classification": "nats", "causal_lm": "nats a token", "planted": "", "local": "", "no such kind": ""}


def of_kind(kind: str) -> list[Planted]:
    return [replace(cell, config={"task": {"kind": kind}}) for cell in RANK_SWEEP]


def with_units(store: Store, said: Any) -> Sweep:
    store.write_manifest({**store.manifest(), "units": said})
    return load(store.root)


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_of_the_records_says_it_where_the_manifest_does_not(kind: str, tmp_path: Path) -> None:
    f = find(load(build(tmp_path / "s", of_kind(kind), metric="loss", examples=100).root))
    said = KINDS[kind]
    assert units.unit(f.sweep, "loss") == said and units.unit(f.sweep, "accuracy") == ""
    assert f.metric.axis == (f"loss ({said})" if said else "loss")
    assert units.loss_axis(f.sweep, "validation") == (f"validation loss ({said})" if said else "validation loss")
    assert f.metric.size(0.02) == f"0.020 {said}".strip()


def test_the_manifest_goes_first(tmp_path: Path) -> None:
    store = build(tmp_path / "s", arrays=False)
    assert units.unit(with_units(store, {}), "loss") == ""
    assert units.unit(with_units(store, {"loss": "bits"}), "loss") == "bits"


def test_tasks_that_differ_have_no_unit_in_common(tmp_path: Path) -> None:
    cells = [*of_kind("planted")[:2], *RANK_SWEEP[2:]]
    assert units.unit(load(build(tmp_path / "s", cells, arrays=False).root), "loss") == ""


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kind", ["planted", "text_classification"])
def test_nothing_of_a_report_says_nats_of_what_has_none(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curves, heat map and tables; the figures' texts are asked from the figures, whose svg holds outlines."""
    texts: list[str] = []
    drawing = theme.render_drawing  # `undrawn`

    def heard(key: str, title: str, caption: str, alt: str, figure: Any) -> theme.Drawing:
        texts.extend([x.get_text() for x in figure.findobj(lambda artist: hasattr(artist, "get_text"))])
        return drawing(key, title, caption, alt, figure)

    monkeypatch.setattr(theme, "render_drawing", heard)
    store = rule_sweep(tmp_path / "s", metric="loss", examples=100)
    unit = {"planted": {}, "text_classification": {"loss": "nats"}}[kind]
    store.write_manifest({**store.manifest(), "units": unit})
    render(store.root, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert {"validation loss (nats)", "training loss (nats)"} <= set(texts) if unit else "nats" not in "".join(texts)
    assert ("nats" in page) == bool(unit)


def test_a_sweep_writes_down_what_its_task_says(cli: Any) -> None:
    fast = [
        "task.train_examples=64",
        "task.val_examples=32",
        "task.test_examples=32",
        "trainer.max_steps=2",
        "trainer.batch_size=4",
    ]
    argv = ["-m", "method.r=1,2", "sweep.name=s", "report.enabled=false", "sweep.measure_solo=false"]
    code, out = cli(*argv, *fast)
    assert code == 0, out
    assert Store("sweeps/s").manifest()["units"] == {"loss": "nats"}


def test_a_sentence_leaves_a_name_as_it_is():
    assert formatting.capital("rsLoRA r = 1 is") == "rsLoRA r = 1 is" and formatting.capital("the best") == "The best"


@pytest.mark.parametrize(
    ("name", "unit", "mean", "said"),
    [
        ("loss", "nats a token", 2.909, "a loss of 2.909 ± 0.100 nats a token"),
        ("loss", "", 2.909, "2.909 ± 0.100 loss"),
        ("accuracy", "", 0.709, "70.9 ± 10.0 % accuracy"),
    ],
)
def test_the_answer_says_what_its_number_is_in(name: str, unit: str, mean: float, said: str) -> None:
    from lorabench.report import answer

    metric = formatting.metric(name, lower_is_better=name == "loss", unit=unit)
    test = estimates.combine(mean, [((0.1 / estimates.quantile(0.975, 2.0)) ** 2, 2.0)], 3)
    assert answer.score_text(SimpleNamespace(metric=metric), SimpleNamespace(test=test)) == said  # type: ignore[arg-type]
