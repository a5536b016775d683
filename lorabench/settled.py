"""What a sweep has settled: the kind of device it trains on, and what `trainer.precision=auto` means in it.

Whoever trains first notes both in the manifest, `"settled": {"device": "cpu", "precision": "bf16"}`. They hold from then on,
whichever machine goes on: so no sweep compares runs of two precisions because two machines took part in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lorabench import prepare as prep
from lorabench.config import RunConfig
from lorabench.prepare import Resolved
from lorabench.records import Store
from lorabench.schema import ExistingWork


def settle(store: Store, run: RunConfig) -> None:
    """Note what this machine would use, unless runs have begun: then what they have. To be called under `Store.locked`."""
    manifest, device = store.manifest(), prep.resolve(run).device
    note = {"device": device, "precision": prep.auto_precision(device)}
    if store.run_ids():  # a run's folder is made as its training begins
        note = manifest.get("settled") or _recorded(store, note)
    if note != manifest.get("settled"):
        store.write_manifest(manifest | {"settled": note})


def _recorded(store: Store, note: dict[str, str]) -> dict[str, str]:
    """The same, where records say otherwise what most of them say: of a manifest that was lost, or has no note yet."""
    found: dict[str, Counter[str]] = {name: Counter() for name in note}
    for record in store.records():
        automatic = record.config.get("trainer", {}).get("precision") == "auto"
        for name in ("device", "precision") if automatic else ("device",):
            if value := record.provenance.get(name):
                found[name][str(value)] += 1
    return note | {name: values.most_common(1)[0][0] for name, values in found.items() if values}


def heed(store: Store, runs: Sequence[RunConfig], *, accept_drift: bool) -> str | None:
    """What to tell a user of what the sweep has settled and this machine would not have chosen, in one line.

    Raises `ExistingWork` where the sweep was begun on another kind of device, unless that is accepted.
    """
    trainer, note = runs[0].trainer, store.manifest().get("settled", {})
    device = prep.resolve(runs[0]).device
    then = note.get("device", device)
    if device != then and not accept_drift:
        raise ExistingWork(
            "trainer.accelerator", trainer.accelerator,
            f"{then}, on which runs of {store.root} were trained; it is {device} here, and results of two kinds of device "
            f"would be compared. Go on with {then} (trainer.accelerator={then}, where there is one), or with "
            f"sweep.accept_drift=true: the report then says which runs differ; another sweep.name trains all anew",
        )  # fmt: skip
    own, meant = prep.auto_precision(device), note.get("precision")
    if meant in (None, own) or all(run.trainer.precision != "auto" for run in runs):
        return None
    slow = ", slow here" if meant == "bf16" else ""
    return (
        f"{store.root}: trainer.precision=auto is {meant} as in the runs that are there{slow}; this machine's own choice "
        f"would be {own}, which trainer.precision={own} trains anew under another sweep.name"
    )


def precision(store: Store) -> str | None:
    """What `trainer.precision=auto` means in a sweep; None: nothing has trained yet."""
    found: str | None = store.manifest().get("settled", {}).get("precision")
    return found


def resolve(run: RunConfig, store: Store) -> Resolved:
    """What `auto` means for a run of this sweep."""
    return prep.resolve(run, precision(store))
