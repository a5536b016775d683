"""Language modelling of plain text, or of replies to prompts that are masked out of the loss.

Shape letters: N examples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lorabench.config.contracts.model import HeadSpec
from lorabench.config.contracts.task import Encoded, Row, StepOutput, TaskData
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.models import chat
from lorabench.tasks import encoding, files, metrics, separated, sources, split
from lorabench.tasks.metrics import ExtensibleMetrics
from lorabench.tasks.text_task import TextTask
from lorabench.tasks.token_loss import IGNORE, token_losses

if TYPE_CHECKING:
    from torch import Tensor, nn

MIN_STYLE_PROMPTS = 20  # to fit and score a classifier of styles
MIN_GROUPS = 3  # one for each split
SECTION_BLOCKS = 8  # plain text is split into train, val and test in sections of about so many blocks


@dataclass(frozen=True)
class Config(ExtensibleMetrics, TextTask):
    """Language modelling of chit-chat replies, news, plain text, or a table of texts or prompts with responses."""

    kind: str = knob("causal_lm", help="the task's module", choices=("causal_lm",))
    name: str = knob("language modelling", help="what tables call it")
    source: str = knob(
        "text", help="text: plain text files; file: a table", choices=("chitchat", "bbc", "text", "file")
    )
    file: str | None = knob(None, help="a text file, a folder of them, or a csv, tsv, json, jsonl or parquet file")
    text_column: str = knob("text", help="column of the text, where there are no prompts")
    prompt_column: str | None = knob(None, help="column of the prompt; with response_column")
    response_column: str | None = knob(None, help="column of the response")
    group_column: str | None = knob(
        None, help="column of what must not fall apart between splits, e.g. a dialogue's id"
    )
    input_column: str | None = knob(
        None, help="column of what the prompt is about, put below it, as in Alpaca's files", added="0.1.0"
    )
    quoting: str = knob(
        "auto",
        help="of csv and tsv: whether quotation marks quote; auto: the lines decide, and what was assumed is said",
        choices=separated.QUOTING,
        added="0.1.0",
    )
    unit: str = knob(
        "block", help="an example of plain text: a full block of tokens, or a paragraph", choices=("block", "paragraph")
    )
    system: str | None = knob(None, help="system message of the chat template; null: the template's own")
    template_date: str = knob(
        "2025-01-01", help="the day that a chat template which writes the date is told, YYYY-MM-DD", added="0.1.0"
    )
    text_end: bool = knob(
        False,
        help="put the tokenizer's end token after each whole text, so that generation learns to end",
        added="0.1.0",
    )
    max_length: int = knob(128, help="tokens of a block; longer pairs and paragraphs are cut", low=8)
    train_examples: int | None = knob(
        None, help="null: all; chosen by content, a smaller set lies inside a larger", low=1
    )
    val_examples: int | None = knob(None, help="null: all", low=1)
    test_examples: int | None = knob(None, help="null: all", low=1)
    val_fraction: float = knob(0.1, help="share validated on", above=0, high=0.5)
    test_fraction: float = knob(0.2, help="share tested on", above=0, high=0.5)
    dedupe: bool = knob(True, help="keep one of equal texts or pairs (case, space)")
    metric: str = knob("loss", help="primary metric: loss, perplexity, token_accuracy or one of extra_metrics")
    extra_metrics: list[str] = knob([], help="your own: my_metrics.py:function")
    probe: Any = knob(None, help="another task, measured before and after: task@task.probe=<name>", added="0.1.0")
    probe_examples: int = knob(
        1000, help="of the probe: held-out examples at most, and as many to fit on", low=20, added="0.1.0"
    )
    probe_along: bool = knob(
        False, help="measure the probe at each evaluation of a confirmation run, too", added="0.1.0"
    )
    style_prompts: int = knob(
        0,
        help="held-out prompts replied to, to see how far replies move towards the data's style; 0: off",
        low=0,
        added="0.1.0",
    )

    own_metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    units: ClassVar[dict[str, str]] = {"loss": "nats a token"}

    def validate(self, key: str) -> None:
        if self.source in ("text", "file") and not self.file:
            kinds = files.TEXT_SUFFIXES if self.source == "text" else files.TABLE_SUFFIXES
            raise ConfigError(f"{key}.file", self.file, f"a file to read ({', '.join(kinds)})")
        if (self.prompt_column is None) != (self.response_column is None):
            missing = "prompt_column" if self.prompt_column is None else "response_column"
            raise ConfigError(f"{key}.{missing}", None, "prompt_column and response_column go together")
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise ConfigError(f"{key}.template_date", self.template_date, "a day, such as 2025-01-01") from None
        if self.input_column and not self.prompt_column:
            raise ConfigError(f"{key}.input_column", self.input_column, "null without prompt_column")
        super().validate(key)
        if self.style_prompts and (self.style_prompts < MIN_STYLE_PROMPTS or not self.has_replies):
            allowed = f"0, or at least {MIN_STYLE_PROMPTS} on prompts with responses"
            raise ConfigError(f"{key}.style_prompts", self.style_prompts, allowed)

    @property
    def has_replies(self) -> bool:
        return self.source == "chitchat" or self.source == "file" and self.prompt_column is not None

    @property
    def _has_blocks(self) -> bool:
        """Whether an example is a block of `max_length` tokens, cut out of plain text."""
        return not self.has_replies and self.unit == "block"

    # -- data -------------------------------------------------------------------------------------------------------

    def load(self) -> TaskData:
        """Return rows {"prompt", "response"} or {"text"}, with "group" and "example", by split.

        A dialogue, a paragraph or a section of text lies in one split only. Raises `ConfigError` for bad data.
        """
        fields = ("prompt", "response") if self.has_replies else ("text",)
        said: list[str] = []
        rows = self._rows(said)
        total = len(rows)
        rows = [r for r in rows if all(r[f].strip() for f in fields)]
        notes: dict[str, Any] = {"source": self.source, "rows": total, "rows_without_text": total - len(rows)}
        notes |= {"read_as": said} if said else {}
        rows = split.identify(rows, fields)
        if self.dedupe:
            rows, counts = split.deduplicate(rows, lambda r: "\x1f".join(split.plain_key(r[f]) for f in fields))
            notes["duplicates_removed"] = counts["duplicates_removed"]
            key = "response_column" if self.has_replies else "text_column"
            if self.source == "file":
                split.check_distinct(len(rows), counts["duplicates_removed"], f"task.{key}", getattr(self, key))
        self._check_groups(rows)
        splits = split.split_rows(rows, self._group, val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        if not self._has_blocks:  # blocks are counted once there are tokens
            splits = split.limit(splits, self)
        notes |= {name: {"examples": len(members)} for name, members in splits.items()}
        return TaskData(splits, split.fingerprint(splits), (), notes)

    def _check_groups(self, rows: Sequence[Row]) -> None:
        """Raise `ConfigError` where many pairs share so few prompts that they cannot be split."""
        groups = len({self._group(r) for r in rows})
        if self.has_replies and groups < MIN_GROUPS <= len(rows):
            key = "group_column" if self.group_column else "prompt_column"
            allowed = f"{len(rows):,} pairs share {groups} of it, and one lies in one split whole: name the column of"
            fix = "what the prompt is about (task.input_column), or of another group (task.group_column)"
            raise ConfigError(f"task.{key}", getattr(self, key), f"{allowed} {fix}")

    def _rows(self, said: list[str]) -> list[Row]:
        """Read all rows of the source; `said` takes what was assumed. Raises `ConfigError`."""
        if self.source == "chitchat":
            return sources.chitchat()
        if self.source == "bbc":
            return [{"text": row["text"], "group": ""} for row in sources.bbc()]
        assert self.file
        if self.source == "text":
            texts = files.read_texts(self.file, "task.file")
            size = SECTION_BLOCKS * self.max_length * 4 if self.unit == "block" else 0
            return [{"text": part, "group": ""} for text in texts.values() for part in sections(text, size)]
        columns = (
            {"prompt_column": self.prompt_column, "response_column": self.response_column} if self.has_replies else {}
        )
        columns = columns or {"text_column": self.text_column}
        columns |= {"group_column": self.group_column} if self.group_column else {}
        columns |= {"input_column": self.input_column} if self.input_column else {}
        named = {k: v for k, v in columns.items() if v is not None}
        table = files.read_table(self.file, named, "task.file", quoting=self.quoting, said=said)
        if below := table.pop("input_column", None):
            pairs = zip(table["prompt_column"], below, strict=True)
            table["prompt_column"] = ["\n\n".join(x for x in pair if x.strip()) for pair in pairs]
        fields = {name.removesuffix("_column"): values for name, values in table.items()}
        fields.setdefault("group", [""] * len(next(iter(fields.values()))))
        return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]

    def head(self, data: TaskData) -> HeadSpec:
        return HeadSpec("AutoModelForCausalLM")

    # -- examples ---------------------------------------------------------------------------------------------------

    def encode(self, data: TaskData, processor: Any) -> Encoded:
        """Return examples {"input_ids", "start", "example", "group"} by split.

        "start" is the first token that counts in the loss. Examples without a token to predict are left out.
        """
        encoding.check_max_length(self.max_length, processor)
        splits, notes = {}, {}
        for name, rows in data.splits.items():
            encode = self._encode_pairs if self.has_replies else self._encode_texts
            examples = encode(rows, processor)
            notes[name] = encoding.truncation_notes(np.asarray([e.pop("full") for e in examples]), self.max_length)
            splits[name] = [e for e in examples if len(e["input_ids"]) > max(e["start"], 1)]
        if self._has_blocks:
            splits = split.limit(splits, self)
        split.check_not_empty(splits, self)
        lengths = {name: [len(e["input_ids"]) for e in examples] for name, examples in splits.items()}
        return Encoded(splits, lengths, {"truncation": notes})

    def _encode_pairs(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        """Return one example a pair; "full" is its number of tokens before the cut."""
        prompts = [self.prompt_text(r["prompt"], processor) for r in rows]
        end = chat.turn_end(processor) or processor.eos_token or ""
        replies = [self._reply_text(r, prompt, end, processor) for r, prompt in zip(rows, prompts, strict=True)]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        both = [processor(texts, **options)["input_ids"] if texts else [] for texts in (prompts, replies)]
        self._check_ends(both[1], end, processor)
        return [join(p, r, self.max_length) | self._ids(row) for p, r, row in zip(*both, rows, strict=True)]

    def _check_ends(self, replies: Sequence[list[int]], end: str, processor: Any) -> None:
        """Raise `ConfigError` where an encoded reply does not end with a token that generation stops at."""
        stops = chat.stop_tokens(processor) if end else []
        if end and any(ids and ids[-1] not in stops for ids in replies):
            allowed = (
                f"replies that end with a token to stop at; this base's tokenizer makes no single token of {end!r}"
            )
            raise ConfigError("task.response_column", self.response_column, allowed)

    def _group(self, row: Row) -> str:
        """Return the group of a row: its dialogue, else its prompt or text.

        A group lies in one split, and counts as one draw of the test set.
        """
        group: str = row["group"] or split.plain_key(row["prompt" if self.has_replies else "text"])
        return group

    def _ids(self, row: Row) -> dict[str, int]:
        return {"example": row["example"], "group": split.content_hash(self._group(row))}

    def _encode_texts(self, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
        """Return one example a paragraph, or the blocks of `max_length` tokens that a text is cut into."""
        texts = [r["text"] + self._text_end(r["text"], processor) for r in rows]
        if not self._has_blocks:
            tokens, full = encoding.tokenize(processor, texts, None, self.max_length)
            return [
                {"input_ids": t["input_ids"], "start": 0, "full": n, **self._ids(r)}
                for t, r, n in zip(tokens, rows, full.tolist(), strict=True)
            ]
        tokens, _ = encoding.tokenize(processor, texts, None, 10**9, special=False)
        out = []
        for t, row in zip(tokens, rows, strict=True):
            for i in range(0, len(t["input_ids"]), self.max_length):
                ids = t["input_ids"][i : i + self.max_length]
                example = split.content_hash(str(row["example"]), str(i))
                out.append({"input_ids": ids, "start": 0, "full": len(ids), **self._ids(row), "example": example})
        return out

    def _text_end(self, text: str, processor: Any) -> str:
        """Return the end token that a whole text is to get, or an empty text. Raises `ConfigError` without one."""
        if not self.text_end:
            return ""
        end: str | None = processor.eos_token
        if not end:
            raise ConfigError("task.text_end", True, "false: this base's tokenizer has no end token")
        return "" if text.endswith(end) else end

    def prompt_text(self, text: str, processor: Any) -> str:
        """Return what the base reads before its reply: the text in the tokenizer's chat template.

        Without a template it is the tokenizer's begin token, where it has one, the text and a line break.
        """
        if not getattr(processor, "chat_template", None):
            return f"{encoding.begin_token(processor)}{text}\n"
        return chat.render(processor, self._messages(text), day=self.template_date, prompt=True)

    def _messages(self, text: str) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": text}]

    def _reply_text(self, row: Row, prompt: str, end: str, processor: Any) -> str:
        """Return the reply with the token that ends it. What a template adds after that is no part of the answer."""
        if not getattr(processor, "chat_template", None):
            return row["response"] + end
        messages = [*self._messages(row["prompt"]), {"role": "assistant", "content": row["response"]}]
        whole = chat.render(processor, messages, day=self.template_date, prompt=False)
        reply = whole[len(prompt) :] if whole.startswith(prompt) else row["response"] + end
        return reply[: reply.rindex(end) + len(end)] if end and end in reply else reply.rstrip() + end

    def encode_text(self, text: str, processor: Any, pair: str | None = None) -> dict[str, Any]:
        """Return one example of a prompt to reply to, or of plain text to go on with; none of it counts in a loss."""
        prompt = self.prompt_text(text, processor) if self.has_replies else text
        ids = processor(prompt, add_special_tokens=not self.has_replies, verbose=False)["input_ids"]
        return {"input_ids": np.asarray(ids, dtype=np.int32), "start": len(ids), "example": split.content_hash(text)}

    def collate(self, examples: Sequence[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `labels` [N, T] (-100 where nothing counts); `example` [N]."""
        batch = encoding.collate_tokens(examples, processor)
        labels = [e["input_ids"].astype(np.int64) for e in examples]
        for row, e in zip(labels, examples, strict=True):
            row[: e["start"]] = IGNORE
        batch["labels"] = encoding.pad(labels, IGNORE)
        return batch

    # -- loss and metrics -------------------------------------------------------------------------------------------

    def step(self, model: nn.Module, batch: dict[str, Tensor]) -> StepOutput:
        """Return the summed cross-entropy of each example's target tokens; the weight is their number."""
        loss_sum, tokens, correct = token_losses(model, encoding.model_inputs(batch), batch["labels"])
        rows = {"example": batch["example"], "tokens": tokens, "correct_tokens": correct}
        return StepOutput(loss_sum, tokens.to(loss_sum.dtype), rows)

    def metrics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        """Return loss (nats a token), perplexity, token_accuracy, tokens and the user's own, from arrays [N]."""
        loss, tokens = metrics.mean_loss(rows), float(rows["tokens"].sum())
        return {
            "loss": loss,
            "perplexity": metrics.perplexity(loss),
            "token_accuracy": float(rows["correct_tokens"].sum()) / tokens,
            "tokens": tokens,
        } | metrics.extra(self.extra_metrics, rows, "task.extra_metrics")


def join(prompt: list[int], reply: list[int], max_length: int) -> dict[str, Any]:
    """Join the token ids of prompt and reply into one example of at most `max_length` tokens.

    The prompt loses its beginning first; the reply then loses its end, but not below half of `max_length`.
    Returns "input_ids" (int32 [T]), "start" of the reply, and "full", the tokens before the cut.
    """
    full = len(prompt) + len(reply)
    reply = reply[: max(max_length - len(prompt), max_length // 2)]
    prompt = prompt[max(0, len(prompt) + len(reply) - max_length) :]
    return {"input_ids": np.asarray(prompt + reply, dtype=np.int32), "start": len(prompt), "full": full}


def sections(text: str, size: int) -> list[str]:
    """Cut text at blank lines into parts of at least `size` characters, at any line once a part is twice as long.

    Size 0 gives paragraphs.
    """
    out, part, length = [], [], 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        length += len(line)
        if length >= size and not line.strip() or size and length >= 2 * size:
            out.append("".join(part))
            part, length = [], 0
    return [s for s in (x.strip("\n") for x in [*out, "".join(part)]) if s.strip()]
