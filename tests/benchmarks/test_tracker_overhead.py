"""benchmarks/tracker_overhead.py: its servers are as bad as their names say, its ratios compare arms of one repeat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.wandb_server import KEY, WandbServer
from lorabench.trackers.wandb.server import Server, ServerUnavailable


@pytest.fixture
def overhead(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    import tracker_overhead

    monkeypatch.setattr(tracker_overhead, "PAUSE_BETWEEN_ARMS", 0.0)
    return tracker_overhead


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.mark.parametrize(
    ("arm", "words"),
    [("down", "Connection refused"), ("refusing", "HTTP 500"), ("slow", "nothing came"), ("absent", "nothing came")],
)
def test_a_bad_server_is_what_its_name_says_and_good_afterwards(
    arm: str, words: str, overhead: Any, server: WandbServer
) -> None:
    with overhead.served(arm, server, 2.0) as url, pytest.raises(ServerUnavailable, match=words):
        Server(url, KEY, "p", None, timeout=0.2).entity()
    with overhead.served("online", server, 2.0) as url:
        assert Server(url, KEY, "p", None).entity() == "me"


def test_ratios_are_of_one_repeat_beside_none_and_beside_a_good_server(overhead: Any) -> None:
    repeats = [
        {"none": {"seconds": 10.0}, "online": {"seconds": 11.0}, "slow": {"seconds": 22.0}},
        {"none": {"seconds": 20.0}, "online": {"seconds": 20.0}, "slow": {"seconds": 20.0}},
    ]
    found = overhead.ratios(repeats, ["none", "online", "slow"])
    assert set(found["none"]) == {"online", "slow"} and set(found["online"]) == {"slow"}
    assert found["none"]["slow"] == {"median": pytest.approx(1.6), "least": 1.0, "most": pytest.approx(2.2)}
    assert found["online"]["slow"]["median"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--arms", "slow", "down"], "one of them none or online"),
        (["--arms", "none"], "at least two"),
        (["--runs", "101"], "a multiple of 5"),
        (["--delay", "-1"], "--delay: at least 0"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], words: str, overhead: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(argv) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
