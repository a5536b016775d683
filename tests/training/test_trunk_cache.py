"""What a frozen trunk gives is served to a run as if it trained alone: whoever trained before it in the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fixtures.runs import make_base, make_data, make_run
from lorabench.adapters.trunk import Trunk
from lorabench.store.records import Store
from lorabench.training import preparation
from lorabench.training.train import Pack, train

SHORT = {"trainer.max_steps": 2, "trainer.precision": "32"}  # sees 8 of some 110 examples: not worth a pass over all


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return make_base(root / "bert", "bert"), make_data(root / "data.csv")


@pytest.mark.parametrize(
    ("before", "own"),
    [
        ({"trainer.max_steps": 30, "trainer.precision": "32"}, SHORT),
        (SHORT | {"trainer.precision": "bf16-mixed"}, SHORT),  # on the same float32 base
        (SHORT | {"trainer.eval_batch_size": 16}, SHORT),
    ],
    ids=["longer", "autocast", "other batches"],
)
def test_a_run_is_served_what_it_would_be_alone(
    places: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: dict[str, Any],
    own: dict[str, Any],
) -> None:
    served: list[Any] = []
    real = Trunk.serve

    def serve(self: Trunk, features: Any, batch: Any) -> Any:
        served.append(None if features is None else features.flat.clone())
        return real(self, features, batch)

    monkeypatch.setattr(Trunk, "serve", serve)
    found = {}
    for name, others in (("alone", []), ("after", [before])):
        preparation.forget_base()
        for i, changes in enumerate([*others, own]):
            store = Store(tmp_path / f"{name}{i}")
            served.clear()
            (record,) = train(Pack("p0", (make_run(*places, **{"method.name": "head", **changes}),)), store)
            assert (record.status, record.provenance["reused_blocks"]) == ("completed", 2), record.error
        found[name] = record.metrics, store.history(record.run_id), [t if t is None else t.tolist() for t in served]
    assert found["after"] == found["alone"]
    assert None in found["alone"][2]


def test_features_of_other_packs_go_when_they_are_many(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorabench.training import trunk_cache

    held: list[int] = []
    real = trunk_cache.TrunkCache._compute

    def compute(self: trunk_cache.TrunkCache, split: str) -> Any:
        made = real(self, split)
        held.append(len(self.session.base.features))
        return made

    monkeypatch.setattr(trunk_cache.TrunkCache, "_compute", compute)
    results = []
    for most in (trunk_cache.MAX_IDLE_BYTES, 0):
        monkeypatch.setattr(trunk_cache, "MAX_IDLE_BYTES", most)
        preparation.forget_base()
        for i, size in enumerate((16, 8, 16)):
            changes = {"method.name": "head", "trainer.eval_batch_size": size, "trainer.max_steps": 30}
            store = Store(tmp_path / f"{most}-{i}")
            (record,) = train(Pack("p0", (make_run(*places, **changes),)), store)
            results.append((record.metrics, store.history(record.run_id)))
    assert held == [0, 1, 2, 3, 0, 1, 0, 1, 0, 1]  # train and val of each; the third pack finds the first one's, or not
    assert results[:3] == results[3:]
