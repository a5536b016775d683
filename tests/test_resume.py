"""A pack killed at any instant goes on from its last checkpoint, and what it leaves equals what an undisturbed one leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorabench.prepare import Pack
from lorabench.records import Store
from lorabench.train import Listener, train
from tiny import make_base, make_data, make_run


class Killed(BaseException):
    """As sudden as a signal: nothing of ours catches it."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return make_base(root / "bert", "bert", dropout=0.1), make_data(root / "data.csv", rows=60)


COMMON = {
    "trainer.max_steps": 7,
    "trainer.eval_interval": 3,
    "trainer.precision": "32",
    "trainer.checkpoint_interval": 2,
}


def pack_of(places: tuple[Path, Path], *runs: dict[str, Any], prune: bool = False, **common: Any) -> Pack:
    made = [make_run(*places, **{**COMMON, **common, **own}) for own in runs or ({},)]
    return Pack("p0", tuple(made), prune=prune)


def mixed(places):
    ranks = ({"method.r": 1}, {"method.r": 4, "seed": 1}, {"method.r": 2, "optimizer.lr": 2e-2})
    return pack_of(places, *ranks, **{"model.dropout": 0.1, "method.dropout": 0.2})


PACKS: dict[str, Callable[[Any], Pack]] = {"mixed": mixed}


def left(store: Store, pack: Pack) -> dict[str, Any]:
    """All that a pack leaves and that must not depend on how often it was killed."""
    found: dict[str, Any] = {}
    for run_id in pack.run_ids:
        record = store.read(run_id)
        assert record is not None
        assert record.status != "failed", record.provenance["trace"]
        folder = store.run_dir(run_id)
        counted = {k: record.resources[k] for k in ("steps", "examples", "tokens")}
        found[run_id] = {
            "record": (record.status, record.metrics, record.error, counted, record.provenance["stopped"]),
            "history": (folder / "history.jsonl").read_bytes(),
            "files": {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("adapter/*")},
            "arrays": {k: (v.dtype, v.tobytes()) for k, v in (store.arrays(run_id, "test") or {}).items()},
        }
    return found


def killed(pack: Pack, store: Store, at: int) -> None:
    def step(now: int, total: int) -> None:
        if now == at:
            raise Killed

    with pytest.raises(Killed):
        failed = train(pack, store, Listener(step=step))
        pytest.fail(failed[0].provenance["trace"])


@pytest.mark.parametrize("kind", PACKS)
def test_killed_at_every_step(places, tmp_path, kind):
    pack = PACKS[kind](places)
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    train(pack, whole)
    for at in range(1, 8):
        killed(pack, cut, at)
    (first, *_) = train(pack, cut)
    assert first.provenance["resumed"], "it went on from a checkpoint"
    assert left(cut, pack) == left(whole, pack)
