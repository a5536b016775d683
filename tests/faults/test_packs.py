"""Packs that go wrong by themselves: too large for memory, a slice that diverges, a run that fails."""

from __future__ import annotations

import pytest

from lorabench.store.records import Store

WIDE = ["-m", "method.r=1,2,3,4", "sweep.name=s", "sweep.measure_solo=false", "report.enabled=false"]


def losses(store: Store) -> dict[str, float]:
    return {r.run_id: r.metrics["val/loss"] for r in store.records() if r.status == "completed"}


def test_packs_that_do_not_fit(fault, launcher, tmp_path):
    """out of memory, under two launchers"""
    assert launcher(folder=tmp_path / "wide", sweep=WIDE).wait()[0] == 0
    log = tmp_path / "starts"
    both = [launcher(sweep=WIDE, narrow=2, count=str(log)) for _ in range(2)]
    ends = [one.wait() for one in both]
    fault.tried += 1
    assert [code for code, _ in ends] == [0, 0], ends
    want, store = Store(tmp_path / "wide/sweeps/s"), Store(tmp_path / "sweeps/s")
    got = losses(store)
    fault.lost += [i for i in want.run_ids() if i not in got]
    assert got == pytest.approx(losses(want), abs=1e-10)
    starts = log.read_text().split()
    fault.doubled += [i for i in got if starts.count(i) > 2]  # once in the pack that did not fit, once in its half
    packs = {p["id"]: p for p in store.manifest()["packs"]}
    assert packs["p0"]["replaced"] == ["p0.0", "p0.1"] and len(packs) == 3
    for i in got:
        steps = [row["step"] for row in store.history(i) if "train/loss" in row]
        assert steps == sorted(set(steps)) and len(steps) == 12


def test_a_slice_that_is_not_a_number(fault, launcher, tmp_path):
    """a NaN slice in a pack of three"""
    sweep = [w for w in WIDE if not w.startswith("method")]
    assert launcher("method.r=2", "method.alpha=1e300,4,8", sweep=sweep).wait()[0] == 0
    assert launcher("method.r=2", "method.alpha=4,8", sweep=sweep, folder=tmp_path / "well").wait()[0] == 0
    fault.tried += 1
    store, well = Store(tmp_path / "sweeps/s"), Store(tmp_path / "well/sweeps/s")
    assert sorted(r.status for r in store.records()) == ["completed", "completed", "diverged"]
    got = losses(store)
    fault.lost += [i for i in well.run_ids() if i not in got]
    assert got == pytest.approx(losses(well), abs=1e-10)


def test_failed_runs_are_kept_until_a_retry_and_then_alone_train_again(fault, launcher, undisturbed, tmp_path):
    """runs that fail, retried by two launchers at once"""
    code, out = launcher(burning=4).wait()
    fault.tried += 1
    assert code == 1 and "the disk is on fire" in out and "start again with sweep.retry_failed=true" in out
    store = Store(tmp_path / "sweeps/s")
    before = {r.run_id: store.stamp(r.run_id) for r in store.records() if r.status == "completed"}
    assert 0 < len(before) < len(store.records())
    assert launcher().wait()[0] == 1, "kept until a retry is asked for"
    log = tmp_path / "starts"
    ends = [one.wait() for one in [launcher("sweep.retry_failed=true", count=str(log)) for _ in range(2)]]
    assert [code for code, _ in ends] == [0, 0], ends
    assert {i: store.stamp(i) for i in before} == before
    fault.compare(undisturbed, store.root, starts=log)
