"""Every shipped experiment composes, validates and dry-runs, and asks what its page says."""

import os
from pathlib import Path

import pytest

from lorabench import __main__ as entry

EXPERIMENTS = sorted(p.stem for p in (Path(__file__).resolve().parent.parent.parent / "conf/experiment").glob("*.yaml"))
RUNS = {"smoke": 6, "rank_sweep": 22, "alpha_sweep": 140, "target_sweep": 45, "lora_vs_full": 46, "prune_grid": 192,
        "planted_rank": 18, "variants": 120, "data_size": 48, "chitchat": 16}  # fmt: skip


# A hundred runs take their time to compose, and much data to read; what is said of them is checked for the others, too.
LARGE = {"prune_grid", "alpha_sweep", "variants", "data_size", "chitchat"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in EXPERIMENTS])
def test_every_experiment_dry_runs(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lorabench", f"+experiment={name}", "sweep.dry_run=true"])
    entry.main()
    out = capsys.readouterr()
    assert f"{RUNS[name]} runs in " in out.out + out.err
    assert os.listdir() == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_page_with_its_command(name, repo):
    page = (repo / "experiments" / f"{name}.md").read_text(encoding="utf-8")
    assert f"+experiment={name}" in page
    for part in ("Hypothesis", "Claim", "Verdict"):
        assert part.lower() in page.lower(), part
