"""Forgetting: the change of the probe, what is matched and how, and that the claims read the same probe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fixtures.planted_sweeps import opened, with_probe
from fixtures.sweeps import Planted, build
from lorabench.claims import weights as claims_weights
from lorabench.report import theme
from lorabench.report.section import Section
from lorabench.report.sections import forgetting as forgetting_faces
from lorabench.results import forgetting
from lorabench.results import forgetting as forgetting_
from lorabench.results.evidence import Evidence
from lorabench.results.findings import Findings

LORA, FULL = (
    Planted("lora", (5e-4, 1e-3, 2e-3, 4e-3), 2e-3, 0.76, r=8),
    Planted("full", (2.5e-5, 5e-5, 1e-4, 2e-4), 1e-4, 0.77),
)
CELLS = (LORA, dataclasses.replace(LORA, r=32, quality=0.765), FULL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Evidence]:
    """Full fine-tuning forgets 2 nats for each point of accuracy above .6, LoRA 1."""
    store = build(tmp_path_factory.mktemp("probe") / "s", CELLS, tune=(0, 1), study={"reference": "full-everything"})
    with_probe(store)
    return opened(store)


def part(f: Findings, e: Evidence) -> Section:
    made = forgetting_faces.section(f, e, theme.looks(f.sweep.cells))
    assert made is not None
    return made


def test_the_change_is_after_minus_before(made: tuple[Findings, Evidence]) -> None:
    found = forgetting.find_forgetting(*made)
    assert found is not None
    assert found.probe.key == "probe/after/loss" and found.probe.before == "probe/before/loss" and found.probe.less
    for c in found.cells:
        share = 2.0 if c.result.cell.method == "full" else 1.0
        learned = [float(x.metrics["val/accuracy"]) - 0.6 for x in c.result.runs]
        assert c.change.mean == pytest.approx(share * np.mean(learned))
        assert c.before == 3.0 and c.after == pytest.approx(3.0 + c.change.mean)


def test_cells_are_matched_where_the_target_passes_one_value(made: tuple[Findings, Evidence]) -> None:
    """The planted probe is a straight line in the target, so interpolation gives it exactly."""
    found = forgetting.find_forgetting(*made)
    assert found is not None and found.how == "rates" and found.value is not None
    matched = {c.result.id: c.matched for c in found.cells if c.matched}
    assert "full-everything" in matched and len(matched) > 1
    for cell, estimate in matched.items():
        share = 2.0 if cell == "full-everything" else 1.0
        assert estimate.mean == pytest.approx(share * (found.value - 0.6))
        assert estimate.seeds == 2


def test_passing() -> None:
    path = ((0.5, 0.1), (0.6, 0.3), (0.55, 0.9), (0.7, 1.0))
    assert forgetting.change_at(path, 0.55, 1.0) == pytest.approx(0.2)  # first
    assert forgetting.change_at(path, 0.65, 1.0) == pytest.approx(0.9 + 0.1 * 2 / 3)
    assert forgetting.change_at(path, 0.4, 1.0) is None  # begins beyond it
    assert forgetting.change_at(path, 0.8, 1.0) is None  # ends short of it
    assert forgetting.change_at(((2.0, 0.0), (1.0, 0.4)), 1.25, -1.0) == pytest.approx(0.3)  # less is better


def test_the_text_says_what_was_matched(made: tuple[Findings, Evidence]) -> None:
    f, e = made
    found = forgetting.find_forgetting(f, e)
    said = part(f, e)
    assert found is not None and found.value is not None
    text = " ".join(said.texts)
    assert f"Matched: validation accuracy of {f.metric.value(found.value, unit=True)}" in text
    assert "along the learning rates that were tuned" in text
    assert "wikipedia's loss" in text
    assert said.tables[0].columns[-1].title.startswith("at val accuracy")
    assert part(f, e).drawings == said.drawings
    assert len(said.drawings[0].figure.axes) == 2


def test_evaluations_of_a_run_serve_where_histories_have_the_probe(tmp_path: Path) -> None:
    store = build(tmp_path / "s", (LORA, FULL))
    with_probe(store, tuned=False)
    for record in store.records():
        if record.role == "confirm":
            share = 2.0 if record.config["method"]["name"] == "full" else 1.0
            store.reset_history(record.run_id)
            rows = [
                {"step": k, "val/accuracy": 0.5 + 0.05 * k, "probe/after/loss": 3.0 + share * 0.1 * k} for k in range(5)
            ]
            store.append_history(record.run_id, rows)
    found = forgetting.find_forgetting(*opened(store))
    assert found is not None and found.how == "evaluations" and found.value == pytest.approx(0.7)
    assert [c.matched.mean if c.matched else None for c in found.cells] == pytest.approx([0.4, 0.8])
    assert "the evaluations of the chosen runs" in " ".join(part(*opened(store)).texts)


def test_without_tuning_probes_only_the_margin_matches(tmp_path: Path) -> None:
    store = build(tmp_path / "s", CELLS, study={"reference": "full-everything", "margin": 0.05})
    with_probe(store, tuned=False)
    f, e = opened(store)
    found = forgetting.find_forgetting(f, e)
    assert found is not None and found.how is None and found.value is None
    text = " ".join(part(f, e).texts)
    assert "Not matched along rates or evaluations" in text
    assert "LoRA r = 32 is shown to be within the margin of full fine-tuning on the test accuracy" in text
    c, reference, estimate = forgetting.matched_differences(found, f)[0]
    assert estimate.mean == pytest.approx(c.change.mean - reference.change.mean)


def test_claims_read_the_same_probe(made: tuple[Findings, Evidence]) -> None:
    """The pair the claim judges is one of those shown, and its number is that of the page."""
    f, e = made
    found = forgetting.find_forgetting(f, e)
    assert found is not None and forgetting_.probe_key(e) == found.probe.key
    verdict = claims_weights.forgets_less(e)
    assert verdict.status == "holds"
    shown = {c.result.name: estimate for c, _, estimate in forgetting.matched_differences(found, f)}
    name = next(n for n in shown if f"{n} minus full fine-tuning" in verdict.reason)
    assert verdict.interval == pytest.approx(shown[name].interval())


def test_the_base_alone_is_no_forgetting(tmp_path: Path) -> None:
    store = build(tmp_path / "s", (LORA,), tune=())
    for record in store.records():
        store.write(dataclasses.replace(record, metrics={**record.metrics, "probe/before/loss": 3.0}))
    f, e = opened(store)
    assert forgetting_.probe_key(e) is None and forgetting.find_forgetting(f, e) is None


def test_an_accuracy_of_which_more_is_better_and_no_value_before(tmp_path: Path) -> None:
    store = build(tmp_path / "s", (LORA, FULL))
    for record in store.records():
        if record.role == "confirm":
            store.write(dataclasses.replace(record, metrics={**record.metrics, "probe/other/accuracy": 0.5}))
    f, e = opened(store)
    found = forgetting.find_forgetting(f, e)
    assert found is not None and found.probe.before is None and not found.probe.less
    said = part(f, e)
    assert "no value before it is recorded" in said.texts[0] and "a fall is forgetting" in said.texts[0]
    assert [r.texts[-1] for r in said.tables[0].rows] == ["50.0 ± 0.0", "50.0 ± 0.0"]


def test_a_probe_under_its_own_name(tmp_path: Path) -> None:
    """`probe/<name>/<metric>` with `probe/<name>/before` and `probe/<name>/examples` beside it."""
    store = build(tmp_path / "s", (LORA, FULL))
    for record in store.records():
        if record.role == "confirm":
            own = {"probe/plain/accuracy": 0.4, "probe/plain/before": 0.5, "probe/plain/examples": 200}
            store.write(dataclasses.replace(record, metrics={**record.metrics, **own}))
    f, e = opened(store)
    found = forgetting.find_forgetting(f, e)
    assert found is not None and forgetting_.probe_key(e) == "probe/plain/accuracy"
    assert (found.probe.name, found.probe.before, found.probe.less) == ("plain's", "probe/plain/before", False)
    assert [c.change.mean for c in found.cells] == pytest.approx([-0.1, -0.1])
    assert part(f, e).tables[0].rows[0].texts[-3:] == ("50.0", "40.0", "−10.0 ± 0.0")


def test_nothing_without_probes(tmp_path: Path) -> None:
    f, e = opened(build(tmp_path / "s", (LORA,)))
    assert forgetting_faces.section(f, e, theme.looks(f.sweep.cells)) is None
