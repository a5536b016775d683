"""The dry run's memory estimate against what the reference sweep really took."""

import gc
import os
import signal
import threading
import time
import weakref
from collections import defaultdict
from dataclasses import replace

import pytest

from lorabench.config.runs import RunConfig
from lorabench.runtime.memory import PeakMemory, available_memory, freeze_heap, is_out_of_memory, release_memory
from lorabench.store.records import Store
from lorabench.sweep.memory import estimate_peak
from lorabench.training import preparation


def test_estimates_lie_near_the_measured_peaks_of_the_reference_packs(repo):
    """Packs of adapters only: the peak of a small pack in a long process is what earlier packs left behind."""
    packs = defaultdict(list)
    for record in Store(repo / "sweeps/ref_rank_sweep").records():
        packs[record.provenance["pack"]].append(record)
    large = {name: records for name, records in packs.items() if len(records) > 3}
    assert len(large) == 2
    for name, records in large.items():
        runs = [RunConfig.from_dict(r.config) for r in records]
        info = preparation.base_info(runs[0])
        plans = [preparation.slice_plan(run, info) for run in runs]
        p = records[0].provenance
        parts = p.get("part_tokens", 10**9)  # records from before there were parts: the whole pack went through at once
        guess = estimate_peak(info, plans, runs[0], dtype=p["base_dtype"], device=p["device"], part_tokens=parts)
        ratio = guess / records[0].resources["peak_memory_bytes"]
        assert 0.6 < ratio < 1.5, (name, [r.method.label() for r in runs], round(ratio, 2))


def test_an_estimate_counts_the_rows_and_lengths_that_there_are(repo):
    record = Store(repo / "sweeps/ref_rank_sweep").records()[0]
    run = RunConfig.from_dict(record.config)
    info = preparation.base_info(run)
    plans = [preparation.slice_plan(run, info)]

    def guess(batch_size, lengths):
        sized = replace(run, trainer=replace(run.trainer, batch_size=batch_size))
        return estimate_peak(info, plans, sized, dtype="float32", device="cpu", part_tokens=512, lengths=lengths)

    assert guess(5000, [20] * 297) == guess(297, [20] * 297) < guess(5000, [20] * 5000)
    assert guess(32, [1] * 297) < guess(32, [20] * 297) < guess(32, [64] + [20] * 296)
    assert guess(32, [64] * 297) == guess(32, None)  # as long as the task allows


def test_a_peak_is_of_its_own_block():
    import numpy as np

    with PeakMemory("cpu") as outer:
        held = np.ones(40_000_000)  # 320 MB
        large = outer.peak()
        del held
    with PeakMemory("cpu") as memory:
        small = memory.peak()
    assert large - small > 200 * 10**6


def test_ctrl_c_in_a_finalizer_is_heard_after_it():
    """Python prints and forgets what a finalizer raises. A second thread: a signal goes to any one that does not block it."""

    class Cycle:
        def __init__(self):
            self.me = self

        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Cycle()
        with pytest.raises(KeyboardInterrupt):
            release_memory()
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
        other.join()


class Loop:
    """Garbage that only a collection finds."""

    def __init__(self):
        self.me = self


def test_collections_leave_alone_what_stood_before_the_first_base():
    gc.unfreeze()
    before = Loop()
    seen = weakref.ref(before)
    del before
    freeze_heap()
    assert seen() is None, "what was garbage is not kept"
    kept = gc.get_freeze_count()
    assert kept > 10_000 and not any(x is Loop for x in gc.get_objects())
    after = Loop()
    seen = weakref.ref(after)
    freeze_heap()  # once a process: what came since may be a pack's
    assert gc.get_freeze_count() <= kept  # less where something of before is gone
    del after
    release_memory()
    assert seen() is None


def test_a_pack_is_collected_and_what_is_imported_is_not_looked_through(tmp_path):
    from fixtures.runs import make_base, make_data, make_run
    from lorabench.training.train import Pack, train

    gc.unfreeze()
    run = make_run(make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv"), **{"trainer.max_steps": 1})
    assert train(Pack("p0", (run,)), Store(tmp_path / "sweep"))[0].status == "completed"
    assert gc.get_freeze_count() > 10_000
    release_memory()
    assert not [x for x in gc.get_objects() if type(x).__name__ == "PackModule"]


def test_a_cell_measured_alone_is_collected_and_others_features_are_none_of_its_memory(tmp_path, monkeypatch):
    """Also where it is the first of its process. The peak is read by a stand-in that sees all tensors there are."""
    import torch

    from fixtures.runs import make_base, make_data, make_run
    from lorabench.training import train as training

    def tensors() -> int:
        release_memory()
        each = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if torch.is_tensor(x)
        }
        return sum(each.values())

    class Live(PeakMemory):
        def peak(self):
            return tensors()

    monkeypatch.setattr(training, "PeakMemory", Live)
    base, data, store = (
        make_base(tmp_path / "bert", "bert"),
        make_data(tmp_path / "data.csv"),
        Store(tmp_path / "sweep"),
    )
    lora = make_run(base, data, **{"trainer.max_steps": 20})
    head = make_run(base, data, **{"method.name": "head", "trainer.max_steps": 100})
    gc.unfreeze()
    first = training.measure_alone(lora, store, steps=3)["peak_memory_bytes"]
    left = tensors()
    assert not [x for x in gc.get_objects() if type(x).__name__ in ("PackModule", "PackedAdamW", "Session")]
    assert training.measure_alone(head, store, steps=3)["reused_blocks"] > 0
    assert tensors() > left, "the features stay with the base"
    assert training.measure_alone(lora, store, steps=3)["peak_memory_bytes"] == first


def test_a_failed_allocation_is_told_from_other_errors():
    import torch

    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))


def test_what_is_free_lies_below_what_there_is():
    import os

    assert 2**27 < available_memory("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
