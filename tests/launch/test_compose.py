"""What is composed and validated for a list of runs: once a setting, and to the same runs as one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabench.config.errors import ConfigError
from lorabench.launch import compose
from lorabench.launch.listing import list_jobs

WORDS = ["optimizer.lr=1e-3,2e-3,1", "sweep.tune_seeds=[0,1,2,3]", "sweep.name=many"]


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every validation of a composed config."""
    calls: list[str] = []
    make_job = compose.make_job

    def counted(*args, **kwargs):
        calls.append("make_job")
        return make_job(*args, **kwargs)

    monkeypatch.setattr(compose, "make_job", counted)
    return calls


def test_runs_that_differ_in_rate_and_seed_are_validated_once(tmp_path: Path, monkeypatch) -> None:
    calls = count_calls(monkeypatch)
    jobs = list_jobs("planted_rank", [*WORDS, f"sweep.dir={tmp_path / 's'}"]).jobs
    cells = {str(job.label) for job in jobs}
    assert len(jobs) == 12 * len(cells) and len(calls) == len(cells)
    calls.clear()
    monkeypatch.setattr(compose, "depends_on_numbers", lambda cfg: True)
    one_by_one = list_jobs("planted_rank", [*WORDS, f"sweep.dir={tmp_path / 's'}"]).jobs
    assert len(calls) == len(jobs)
    assert [job.run.run_id for job in one_by_one] == [job.run.run_id for job in jobs]
    assert one_by_one == jobs


def test_a_setting_that_follows_the_rate_or_the_seed_follows_it_in_every_run(tmp_path: Path) -> None:
    words = [*WORDS, f"sweep.dir={tmp_path / 's'}", "optimizer.weight_decay=${optimizer.lr}"]
    for job in list_jobs("planted_rank", words).jobs:
        assert job.run.optimizer.weight_decay == job.run.optimizer.lr


@pytest.mark.parametrize(("word", "key"), [("optimizer.lr=1e-3,0", "optimizer.lr"), ("seed=0,4294967296", "seed")])
def test_a_later_rate_or_seed_out_of_range_is_refused_by_name(word: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        list_jobs("planted_rank", [word, "sweep.name=many", f"sweep.dir={tmp_path / 's'}"])
    assert e.value.key == key
