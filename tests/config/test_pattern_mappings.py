"""Mappings of names or regexes to numbers: the same from YAML, from a command line and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from lorabench.config import overrides
from lorabench.config.errors import ConfigError
from lorabench.config.runs import parse_run

CONF = str(Path(__file__).parents[2] / "conf")


def run_of(*words: str) -> Any:
    with initialize_config_dir(CONF, version_base="1.3"):
        return parse_run(compose("config", ["task=text_file", "task.file=a.csv", *words]), role="tune")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("{query:4}", {"query": 4}),
        (r"{.*\.query:4,value:2}", {r".*\.query": 4, "value": 2}),
        (r'"{layer\.[01]\..*(query|key): 4, value: 2}"', {r"layer\.[01]\..*(query|key)": 4, "value": 2}),
        (r'"{layer.\d{1,2}.query:4}"', {r"layer.\d{1,2}.query": 4}),
        ("{}", {}),
        ("null", {}),
    ],
)
def test_a_pattern_on_the_command_line(word: str, expected: dict[str, int]) -> None:
    run = run_of(f"method.rank_pattern={word}")
    assert run.method.rank_pattern == expected
    assert (run.run_id == run_of().run_id) == (not expected)


def test_alpha_patterns_and_texts_that_are_none() -> None:
    assert run_of("method.alpha_pattern={query:4}").method.alpha_pattern == {"query": 4.0}
    with pytest.raises(ConfigError, match=r"method\.rank_pattern=query: a mapping of names or regexes"):
        run_of("method.rank_pattern=query")


@pytest.mark.parametrize("key", ["query", r".*\.query", r"layer\.[01]\..*(query|key)", r"a.\d{1,2}", "x+y"])
def test_a_pattern_survives_being_written_as_an_override(key: str) -> None:
    word = f"method.rank_pattern={overrides.override_value({key: 4, 'value': 2})}"
    parsed = OverridesParser.create().parse_override(word).value()
    parsed = str(parsed) if not isinstance(parsed, dict) else parsed
    assert overrides.mapping(parsed, "method.rank_pattern") == {key: 4, "value": 2}
    assert run_of(word).method.rank_pattern == {key: 4, "value": 2}
