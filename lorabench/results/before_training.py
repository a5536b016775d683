"""What a base scored on the test data before anything trained."""

from __future__ import annotations

from lorabench.results.findings import Findings


def before_training(f: Findings) -> float | None:
    """Return the base's own test score in the metric of the tables; None where no record has it, or bases differ.

    Confirmation runs of language models record it (`base/<metric>`). Types of computation make a small difference.
    """
    key = f"base/{f.sweep.metric}"
    runs = [x for r in f.results.values() if r.role == "confirm" for x in r.runs]
    scores = [float(x.metrics[key]) for x in runs if x.metrics.get(key) is not None]
    places = {(str(x.config.get("model")), x.provenance.get("data_fingerprint")) for x in runs}
    return sum(scores) / len(scores) if scores and len(scores) == len(runs) and len(places) == 1 else None
