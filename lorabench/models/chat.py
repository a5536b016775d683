"""A tokenizer's chat template: rendered on a fixed day, and where it ends a reply."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import Any

from lorabench.config.errors import ConfigError

Message = dict[str, str]
_DAY = "2025-01-01"
_CLOCK = re.compile(r"strftime_now\s*\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_PROBE = "lorabench-reply"  # stands for a reply where the text around one is looked for


def render(processor: Any, messages: Sequence[Message], *, day: str, prompt: bool) -> str:
    """Return messages in the tokenizer's chat template, whose clock stands still on `day` (YYYY-MM-DD).

    prompt: whether the beginning of a reply follows. Raises `ConfigError` where the template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        rendered: str = processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=_freeze(processor, day)
        )
    except TemplateError as e:
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        key = "task.prompt_column" if system is None else "task.system"
        asked = next((m["content"] for m in messages if m["role"] == "user"), "")[:60]
        fix = "" if system is None else "; null sends no system message"
        reason = f"the chat template of this base refuses the row with the prompt {asked!r}: {e}{fix}"
        raise ConfigError(key, system, reason) from e
    return rendered


def _freeze(processor: Any, day: str) -> str:
    """Return the chat template with `day` where it reads the clock. Raises `ConfigError` where that cannot be done."""
    moment = date.fromisoformat(day)
    template: str = _CLOCK.sub(lambda call: repr(moment.strftime(call["format"])), processor.get_chat_template())
    if re.search(r"strftime_now\s*\(", template):
        reason = "the chat template of this base reads the clock in a way that no day can be set for"
        raise ConfigError("task.template_date", day, f"{reason}; write its date into its chat_template.jinja")
    return template


def turn_end(processor: Any) -> str | None:
    """Return the token with which the chat template ends a reply, None where it ends one with none.

    It need not be the tokenizer's end token, which ends a text.
    """
    if not getattr(processor, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}]
    tail = render(processor, messages, day=_DAY, prompt=False).rpartition(_PROBE)[2]
    known = {*processor.all_special_tokens, *processor.get_added_vocab()}
    found = [(tail.index(token), -len(token), token) for token in known if token and token in tail]
    return min(found)[2] if found else None


def stop_tokens(processor: Any) -> list[int]:
    """Return the ids of the tokens that end a reply: the tokenizer's end token and the chat template's."""
    end = turn_end(processor)
    ids = [processor.eos_token_id, None if end is None else processor.convert_tokens_to_ids(end)]
    return sorted({x for x in ids if x is not None})
