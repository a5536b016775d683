"""A long command says in a log that it works, and how far it is."""

from __future__ import annotations

import pytest

from lorabench.runtime import progress_lines
from lorabench.runtime.progress_lines import ProgressLines


def test_lines_where_it_takes_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with ProgressLines("measuring", "layers", enabled=True) as lines:
        lines.tick(1, 10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_lines, "SECONDS_BEFORE", 0.0)
    monkeypatch.setattr(progress_lines, "SECONDS_BETWEEN", 0.0)
    with ProgressLines("measuring", "layers", enabled=True) as lines:
        lines._timer.join()
        for done in (1, 10):  # the end says itself
            lines.tick(done, 10)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "measuring ..." and second.startswith("measuring: 1 of 10 layers, about ")


def test_nothing_beside_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_lines, "SECONDS_BETWEEN", 0.0)
    with ProgressLines("measuring", "layers", enabled=False) as lines:
        lines.tick(1, 10)
    assert capsys.readouterr().err == ""
