"""A record knows the processor it was trained with; a record older than that knowledge stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures import runs as tiny
from lorabench.config.errors import ExistingWork
from lorabench.store.records import Record
from lorabench.sweep.resume import check_drift
from lorabench.training import preparation


def test_another_processor_is_drift(tmp_path: Path) -> None:
    base, data = tiny.make_base(tmp_path / "base", "llama"), tiny.make_data(tmp_path / "data.csv", rows=40)
    run = tiny.make_run(base, data)
    about = {
        "data_fingerprint": preparation.load_data(run.task).fingerprint,
        "model_fingerprint": preparation.model_fingerprint(run),
    }
    old = Record(run.run_id, "tune", "completed", run.to_dict(), {}, provenance=dict(about))
    about["processor_fingerprint"] = preparation.processor_fingerprint(run)
    record = Record(run.run_id, "tune", "completed", run.to_dict(), {}, provenance=about)
    check_drift(record, run)
    (base / "preprocessor_config.json").write_text("{}")
    preparation.forget_data()
    check_drift(old, run)
    with pytest.raises(ExistingWork, match="the processor files are not those"):
        check_drift(record, run)
