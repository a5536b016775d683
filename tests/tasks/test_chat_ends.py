"""Replies end where the chat template ends them, and generation stops there; a template's clock stands still."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.runs import minilm_folder
from lorabench.config.errors import ConfigError
from lorabench.models.pretrained import end_tokens, load_tokenizer
from lorabench.tasks.causal_lm import Config as LanguageModelling

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    made = load_tokenizer(minilm_folder())
    made.eos_token = "[SEP]"
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def task(tmp_path: Path) -> LanguageModelling:
    rows = [{"q": f"what is {i}", "a": f"it is {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return LanguageModelling(source="file", file=str(tmp_path / "a.jsonl"), prompt_column="q", response_column="a")


def test_a_reply_ends_and_stops_at_the_templates_own_token(task: LanguageModelling, tokenizer: Any) -> None:
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    examples = task.encode(task.load(), tokenizer).splits["train"]
    assert {e["input_ids"][-1] for e in examples} == {turn}
    base = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert end_tokens(base, tokenizer) == sorted([turn, tokenizer.eos_token_id])


def test_a_template_without_an_end_gets_the_tokenizers(task: LanguageModelling, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("<|turn|>", "")
    examples = task.encode(task.load(), tokenizer).splits["train"]
    assert {e["input_ids"][-1] for e in examples} == {tokenizer.eos_token_id}


def test_the_clock_of_a_template_stands_still(task: LanguageModelling, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + TEMPLATE
    assert task.prompt_text("hi", tokenizer).startswith("01 Jan 2025 ")
    later = dataclasses.replace(task, template_date="2026-02-03")
    assert later.prompt_text("hi", tokenizer).startswith("03 Feb 2026 ")
    tokenizer.chat_template = "{{ strftime_now(f) }}"
    with pytest.raises(ConfigError, match=r"task\.template_date=2025-01-01: .* reads the clock"):
        task.prompt_text("hi", tokenizer)
    with pytest.raises(ConfigError, match=r"task\.template_date=today: a day"):
        dataclasses.replace(task, template_date="today").validate("task")


def test_a_template_that_refuses_a_system_turn(task: LanguageModelling, tokenizer: Any) -> None:
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + TEMPLATE
    strict = dataclasses.replace(task, system="be brief")
    with pytest.raises(ConfigError, match=r"task\.system=be brief: .* the prompt 'what is \d+': no system role; null"):
        strict.encode(strict.load(), tokenizer)


def test_whole_texts_end_where_asked(task: LanguageModelling, tokenizer: Any) -> None:
    plain = LanguageModelling(source="file", file=task.file, text_column="a", unit="paragraph", text_end=True)
    ended = plain.encode(plain.load(), tokenizer).splits["train"]
    without = dataclasses.replace(plain, text_end=False)
    examples = without.encode(without.load(), tokenizer).splits["train"]
    count = [[e["input_ids"].tolist().count(tokenizer.eos_token_id) for e in part] for part in (ended, examples)]
    assert count == [[n + 1 for n in count[1]], count[1]]
