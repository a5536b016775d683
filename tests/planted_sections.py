"""Synthetic sweeps for the parts of a report: planted best rates under three rules of alpha, targets, probes, samples."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorabench.results.evidence import Evidence, gather
from lorabench.results.findings import Findings, find
from lorabench.results.sweep import load
from lorabench.store.records import Record, Store
from report_fixture import RANK_SWEEP, Planted, build

ANCHOR = 8  # r at which the three rules meet, with s = 2
RANKS = (1, 8, 64)
BEST = 4e-3  # at the anchor


def rule_sweep(
    root: Path,
    slopes: Sequence[float] = (0.0, -0.5, -0.25),
    *,
    noise: float = 0.0004,
    diverges: float = math.inf,
    **changes: Any,
) -> Store:
    """LoRA with alpha = 16, LoRA with alpha = 2r, rsLoRA with alpha = 16/√8. slopes: of log best rate on log r, in that order.
    diverges: the rate from which alpha = 2r diverges at rank 64."""
    cells = []
    for rule, slope in zip(("fixed", "2r", "root"), slopes, strict=True):
        for r in RANKS:
            if rule == "root" and r == ANCHOR:
                continue  # the same scale as LoRA there
            best = BEST * (r / ANCHOR) ** slope
            middle = round(math.log2(best / BEST))
            rates = [BEST * 2.0 ** (middle + k) for k in range(-2, 3)]
            alpha = {"fixed": 16.0, "2r": 2.0 * r, "root": 16 / math.sqrt(8)}[rule]
            label = {"alpha_rule": {"fixed": "16", "2r": "2r", "root": f"{alpha:g}/sqrt(r)"}[rule]}
            cells.append(Planted("lora", rates, best, 0.76, r=r, alpha=alpha, rslora=rule == "root", seed_sd=noise, label=label,
                                 diverges_at=diverges if (rule, r) == ("2r", 64) else math.inf))  # fmt: skip
    return build(root, cells, tune=(0, 1), **changes)


def target_sweep(root: Path, **changes: Any) -> Store:
    """Five sets of targets at r = 8; three at 1.9 million parameters."""
    rates, ranked = (1e-3, 2e-3, 4e-3), (("q", 0.70), ("v", 0.73), ("q+v", 0.74), ("mlp", 0.765), ("all", 0.77))
    sizes = {"q": 74_000, "v": 74_000, "q+v": 148_000, "mlp": 420_000, "all": 339_000}
    cells = [
        Planted("lora", rates, 2e-3, q, r=8, targets=t, seed_sd=0.003, label={"trainable": sizes[t]})
        for t, q in ranked
    ]  # fmt: skip
    matched = (("attention", 45, 0.745, 1_902_000), ("mlp", 36, 0.77, 1_902_100), ("all", 20, 0.775, 1_902_000))
    cells += [
        Planted("lora", rates, 2e-3, q, r=r, alpha=2.0 * r, targets=t, seed_sd=0.003, label={"trainable": n, "alpha_rule": "2r"})
        for t, r, q, n in matched
    ]  # fmt: skip
    return build(root, cells, resources={"trainable_parameters": None}, **changes)


def with_solo(store: Store, seconds: dict[str, float]) -> None:
    """Costs measured alone, by cell id; memory grows with them."""
    manifest = store.manifest()
    for c in manifest["cells"]:
        if c["id"] in seconds:
            c["solo"] = {
                "seconds": seconds[c["id"]] / 10,
                "steps": 10,
                "peak_memory_bytes": int(2**20 * 100 * seconds[c["id"]]),
            }
    store.write_manifest(manifest)


def with_probe(store: Store, *, tuned: bool = True, metric: str = "loss", before: float = 3.0) -> None:
    """A probe loss that rises with what a run learned: full fine-tuning forgets twice as much as LoRA."""
    for record in store.records():
        if record.status != "completed" or (record.role == "tune" and not tuned):
            continue
        learned = max(0.0, float(record.metrics["val/accuracy"]) - 0.6)
        share = {"full": 2.0, "head": 0.0}.get(record.config["method"]["name"], 1.0)
        changed = {
            f"probe/before/{metric}": before,
            f"probe/after/{metric}": before + share * learned,
            "probe/name": "wikipedia",
        }
        store.write(dataclasses.replace(record, metrics={**record.metrics, **changed}))


def with_samples(store: Store, cell: str, rows: Any) -> Record:
    """`samples.json` beside the first confirmation run of a cell."""
    run_id = next(c for c in store.manifest()["cells"] if c["id"] == cell)["runs"]["confirm"][0]
    path = store.run_dir(run_id) / "samples.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    record = store.read(run_id)
    assert record is not None
    return record


def opened(store: Store) -> tuple[Findings, Evidence]:
    sweep = load(store.root)
    return find(sweep), gather(sweep)


__all__ = [
    "BEST",
    "RANKS",
    "RANK_SWEEP",
    "opened",
    "rule_sweep",
    "target_sweep",
    "with_probe",
    "with_samples",
    "with_solo",
]
