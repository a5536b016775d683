"""Whole sweeps give the run ids, numbers and reports they always gave, to the last bit on the machine they were made on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from golden_sweeps import COMMANDS, HERE, REPORTS, machine, numbers, report_hashes

from lorabench.report import render
from lorabench.report.directory import MARK
from lorabench.store.records import Store

MADE_ON = json.loads((HERE / "machine.json").read_text())
REFERENCES = sorted(p.name for p in (Path(__file__).resolve().parents[2] / "sweeps").glob("ref_*"))


def records(sweep: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: numbers(json.loads(p.read_text())) for p in sweep.glob("runs/*/run.json")}


def histories(sweep: Path) -> dict[str, list[dict[str, Any]]]:
    store = Store(sweep)
    return {run_id: list(store.history(run_id)) for run_id in store.run_ids()}


def without_later_settings(config: Any, then: Any) -> Any:
    """A config without the settings that there were not then.

    They are at their defaults, or the run would have another run_id, which is compared, too.
    """
    if not isinstance(then, dict):
        return config
    return {key: without_later_settings(config[key], then[key]) for key in then if key in config}


def close(value: Any, name: str = "") -> Any:
    """Nested numbers as approximations: another processor sums in another order.

    Losses agree to a thousandth. Of 48 examples or more, two may fall on the other side of a decision, and so the step that
    was best may be another one.
    """
    if isinstance(value, dict):
        return {key: ANY if key == "best_step" else close(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [close(one, name) for one in value]
    if not isinstance(value, float):
        return value
    return pytest.approx(value, rel=1e-3, abs=1e-4) if "loss" in name or name == "lr" else pytest.approx(value, abs=0.1)


@pytest.mark.parametrize("name", [pytest.param("mixed"), pytest.param("smoke", marks=pytest.mark.slow)])
def test_a_sweep_gives_the_numbers_it_always_gave(name, cli):
    code, out = cli(*COMMANDS[name], "sweep.progress=false", "report.enabled=false")
    assert code == 0, out
    expected, found = records(HERE / name), records(Path("sweeps", name))
    assert sorted(found) == sorted(expected), "run_ids changed"
    for run_id, record in found.items():
        record["config"] = without_later_settings(record["config"], expected[run_id]["config"])
    same_machine = machine() == MADE_ON
    assert found == (expected if same_machine else close(expected))
    before = histories(HERE / name)
    assert histories(Path("sweeps", name)) == (before if same_machine else close(before))


@pytest.mark.parametrize("name", COMMANDS)
def test_its_report_is_the_one_it_always_was(name, tmp_path):
    render(HERE / name, tmp_path / "report")
    assert report_hashes(tmp_path / "report") == json.loads(REPORTS.read_text())[name]


@pytest.mark.parametrize("name", REFERENCES)
def test_a_committed_report_is_rendered_byte_for_byte(name, repo, tmp_path):
    """But for pictures in PNG, whose compression is the library's own."""
    render(repo / "sweeps" / name, tmp_path / "report")
    for path in sorted((repo / "reports" / name).rglob("*")):
        if path.is_file() and path.suffix != ".png" and path.name != MARK:  # it lists the checksums of all
            fresh = tmp_path / "report" / path.relative_to(repo / "reports" / name)
            assert fresh.read_text() == path.read_text(), path.name
