"""Fifty packs in one process: what a pack used is given back, so that resident memory stays flat within 5 %."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from fixtures.runs import make_base, make_data, make_run
from lorabench.config.runs import Pack
from lorabench.store.records import Store
from lorabench.training.train import train

PACKS, SETTLED = 50, 10  # the first packs fill caches and the allocator's pools


def resident() -> int:
    """Bytes in memory now, as the kernel counts them."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_over_fifty_packs(tmp_path: Path) -> None:
    base, data = make_base(tmp_path / "base", "bert"), make_data(tmp_path / "data.csv")
    store, seen = Store(tmp_path / "sweep"), []
    for i in range(PACKS):
        runs = [
            make_run(base, data, role="confirm", **{"method.r": r, "seed": i, "trainer.max_steps": 6, "trainer.precision": "32"})
            for r in (2, 4, 8)
        ]  # fmt: skip
        assert {r.status for r in train(Pack(f"p{i}", tuple(runs)), store)} == {"completed"}
        seen.append(resident())
    growth = seen[-1] / seen[SETTLED - 1] - 1
    assert growth < 0.05, f"{growth:.1%}: {[f'{s >> 20} MiB' for s in seen[SETTLED - 1 :: 8]]}"
