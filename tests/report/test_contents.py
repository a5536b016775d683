"""What stands beside the comparison: claims the sweep speaks to. Weights: test_report_weights.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.sweeps import build
from lorabench.report import render


@pytest.mark.usefixtures("undrawn")
def test_claims_stand_in_every_face_of_the_report(tmp_path: Path) -> None:
    build(tmp_path / "s")
    render(tmp_path / "s", tmp_path / "r")
    for name in ("report.md", "report.html", "tables/claims.tex"):
        text = (tmp_path / "r" / name).read_text(encoding="utf-8")
        assert "factor of 2" in text, name
    assert "more claims were made under conditions" in (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    assert "What training added" not in (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
