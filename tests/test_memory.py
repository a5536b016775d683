"""The dry run's memory estimate against what the reference sweep really took."""

from collections import defaultdict

from lorabench import prepare
from lorabench.config import RunConfig
from lorabench.memory import PeakMemory, estimate
from lorabench.records import Store


def test_estimates_lie_near_the_measured_peaks_of_the_reference_packs(repo):
    """Packs of adapters only: the peak of a small pack in a long process is what earlier packs left behind."""
    packs = defaultdict(list)
    for record in Store(repo / "sweeps/ref_rank_sweep").records():
        packs[record.provenance["pack"]].append(record)
    large = {name: records for name, records in packs.items() if len(records) > 3}
    assert len(large) == 4
    for name, records in large.items():
        runs = [RunConfig.from_dict(r.config) for r in records]
        info = prepare.layers(runs[0])
        plans = [prepare.plan(run, info) for run in runs]
        p = records[0].provenance
        guess = estimate(info, plans, runs[0], dtype=p["base_dtype"], device=p["device"])
        ratio = guess / records[0].resources["peak_memory_bytes"]
        assert 0.6 < ratio < 1.5, (name, [r.method.label() for r in runs], round(ratio, 2))


def test_a_peak_is_of_its_own_block():
    import numpy as np

    with PeakMemory("cpu") as outer:
        held = np.ones(40_000_000)  # 320 MB
        large = outer.peak()
        del held
    with PeakMemory("cpu") as memory:
        small = memory.peak()
    assert large - small > 200 * 10**6
