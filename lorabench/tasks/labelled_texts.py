"""Texts, or pairs of texts, with a label each: reading, splitting and tokenizing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorabench.config.contracts.task import SPLITS, Encoded, Row, TaskData
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.tasks import encoding, files, metrics, separated, sources, split
from lorabench.tasks.text_task import TextTask

MAX_LABELS = 1000
MAX_SCORES = 20  # so many labels with decimals are classes at most, more are a scale
MIN_IDS = 10  # rows from which on a label for each is no class


@dataclass(frozen=True)
class LabelledTexts(TextTask):
    """The settings of a task on labelled texts: where rows come from, how many, and how they are split."""

    kind: str = knob("labelled_texts", help="the task's module")
    name: str = knob("texts", help="what tables call it")
    source: str = knob("file", help="where rows come from", choices=("tweets", "food_reviews", "bbc", "glue", "file"))
    subset: str | None = knob(None, help="the GLUE task")
    file: str | None = knob(None, help="csv, tsv, json, jsonl or parquet")
    val_file: str | None = knob(None, help="rows to validate on; null: split off `file`")
    test_file: str | None = knob(None, help="rows to test on; null: split off `file`")
    text_column: str = knob("text", help="column of the text")
    pair_column: str | None = knob(None, help="column of the second text of a pair")
    label_column: str = knob("label", help="column of the label")
    group_column: str | None = knob(
        None, help="column of what must not fall apart between splits, e.g. an author's id", added="0.1.0"
    )
    quoting: str = knob(
        "auto",
        help="of csv and tsv: whether quotation marks quote; auto: the lines decide, and what was assumed is said",
        choices=separated.QUOTING,
        added="0.1.0",
    )
    max_length: int = knob(128, help="tokens an example is cut at", low=4)
    train_examples: int | None = knob(
        None, help="null: all; chosen by content, a smaller set lies inside a larger", low=1
    )
    val_examples: int | None = knob(None, help="null: all", low=1)
    test_examples: int | None = knob(None, help="null: all", low=1)
    val_fraction: float = knob(0.1, help="share validated on where the source has no such split", above=0, high=0.5)
    test_fraction: float = knob(0.2, help="share tested on where the source has no such split", above=0, high=0.5)
    dedupe: bool = knob(True, help="keep one of equal texts (case, space; for tweets also addresses, @names, RT)")
    probe: Any = knob(None, help="another task, measured before and after: task@task.probe=<name>", added="0.1.0")
    probe_examples: int = knob(
        1000, help="of the probe: held-out examples at most, and as many to fit on", low=20, added="0.1.0"
    )
    probe_along: bool = knob(
        False, help="measure the probe at each evaluation of a confirmation run, too", added="0.1.0"
    )

    def validate(self, key: str) -> None:
        if self.source == "file" and not self.file:
            allowed = f"a file with a text and a label column ({', '.join(files.TABLE_SUFFIXES)})"
            raise ConfigError(f"{key}.file", self.file, allowed)
        if self.source == "glue" and self.subset not in sources.GLUE:
            raise ConfigError(f"{key}.subset", self.subset, f"allowed: {', '.join(sources.GLUE)}")
        super().validate(key)

    @property
    def paired(self) -> bool:
        """Whether an example is two texts."""
        return self.pair_column is not None or self.source == "glue" and sources.GLUE[str(self.subset)][1] is not None

    def load(self) -> TaskData:
        """Return rows {"text", "pair"?, "label", "example"} by split. Raises `ConfigError` for faults of the data."""
        said: list[str] = []
        rows, names = self._rows(said)
        total = len(rows)
        rows = [r for r in rows if r["text"].strip() and r["label"].strip()]
        notes: dict[str, Any] = {"source": self.source, "rows": total, "rows_without_text_or_label": total - len(rows)}
        notes |= {"read_as": said} if said else {}
        rows = split.identify(rows, ("text", "pair", "label"))
        if self.dedupe:
            rows, counts = split.deduplicate(rows, self._key)
            notes |= counts
            split.check_distinct(len(rows), counts["duplicates_removed"], "task.text_column", self.text_column)
        names = names or label_order({r["label"] for r in rows})
        check_spelling(names, self.label_column)
        self._check_labels(names)
        check_categories(names, len(rows), self.label_column)
        splits = split.split_rows(rows, self._group, val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        splits = split.limit(splits, self)
        self._check_trained(splits, names)
        for s in SPLITS:
            counts = Counter(r["label"] for r in splits[s])
            notes[s] = {"examples": len(splits[s]), "labels": {name: counts[name] for name in names}}
            notes[s]["majority"] = metrics.majority_baselines(counts)
        return TaskData(splits, split.fingerprint(splits), tuple(names), notes)

    def _rows(self, said: list[str]) -> tuple[list[Row], Sequence[str]]:
        """Read all rows, and the label names in the source's own order, empty where it has none; `said` takes what was assumed."""
        if self.source == "glue":
            return sources.glue(self.subset)
        if self.source != "file":
            return getattr(sources, self.source)(), ()
        assert self.file
        rows = self._file_rows(self.file, "task.file", None, said)
        for split_name, file in (("val", self.val_file), ("test", self.test_file)):
            rows += self._file_rows(file, f"task.{split_name}_file", split_name, said) if file else []
        return rows, ()

    def _file_rows(self, file: str, key: str, split_name: str | None, said: list[str]) -> list[Row]:
        columns = {"text_column": self.text_column, "label_column": self.label_column}
        columns |= {"pair_column": self.pair_column} if self.pair_column else {}
        columns |= {"group_column": self.group_column} if self.group_column else {}
        table = files.read_table(file, columns, key, quoting=self.quoting, said=said)
        rows = [
            {"text": t, "label": y.strip()} for t, y in zip(table["text_column"], table["label_column"], strict=True)
        ]
        for row, pair in zip(rows, table.get("pair_column", ()), strict=False):
            row["pair"] = pair
        for row, group in zip(rows, table.get("group_column", ()), strict=False):
            row["group"] = group
        return [row | {"split": split_name} for row in rows] if split_name else rows

    def _key(self, row: Row) -> str:
        """Return what rows must share to be duplicates."""
        normal = split.tweet_key if self.source == "tweets" else split.plain_key
        return normal(row["text"]) + "\x1f" + normal(row["pair"]) if row.get("pair") else normal(row["text"])

    def _group(self, row: Row) -> str:
        """Return what rows share that must lie in one split: `group_column`, near-duplicates of a tweet, or duplicates."""
        if row.get("group"):
            return str(row["group"])
        return split.tweet_group(row["text"]) if self.source == "tweets" else self._key(row)

    def _check_labels(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` where there are too few labels to classify, or too many."""
        got = f"{len(names)} label{'s' * (len(names) != 1)}" + (f" ({names[0]})" if len(names) == 1 else "")
        key = "task.label_column"
        if len(names) < 2:
            raise ConfigError(key, self.label_column, f"at least two labels are needed to classify; the data has {got}")
        if len(names) > MAX_LABELS:
            raise ConfigError(
                key, self.label_column, f"at most {MAX_LABELS} labels; the data has {got}: is it a number or an id?"
            )

    def _check_trained(self, splits: dict[str, list[Row]], names: Sequence[str]) -> None:
        """Raise `ConfigError` where a label does not occur in the training split."""
        sizes = ", ".join(f"{s} {len(splits[s])}" for s in SPLITS)
        trained = {r["label"] for r in splits["train"]}
        for name in names:
            if name not in trained:
                held = ", ".join(s for s in SPLITS if any(r["label"] == name for r in splits[s])) or "rows left out"
                allowed = (
                    f"the label {name!r} occurs in {held} but not in training ({sizes}): "
                    "add rows of it, take it out, or train on more"
                )
                raise ConfigError("task.label_column", self.label_column, allowed)

    def encode(self, data: TaskData, processor: Any) -> Encoded:
        """Return examples {"input_ids", "token_type_ids"?, "example", "group"} by split."""
        encoding.check_max_length(self.max_length, processor)
        splits, lengths, notes = {}, {}, {}
        for name, rows in data.splits.items():
            pairs = [r["pair"] for r in rows] if rows and "pair" in rows[0] else None
            tokens, full = encoding.tokenize(processor, [r["text"] for r in rows], pairs, self.max_length)
            splits[name] = [
                example | {"example": row["example"], "group": split.content_hash(self._group(row))}
                for example, row in zip(tokens, rows, strict=True)
            ]
            lengths[name] = [len(t["input_ids"]) for t in tokens]
            notes[name] = encoding.truncation_notes(full, self.max_length)
        return Encoded(splits, lengths, {"truncation": notes})


def label_order(labels: set[str]) -> list[str]:
    """Return labels in a fixed order: by number where all are whole numbers, else by name."""
    whole = all(x.removeprefix("-").isdecimal() for x in labels)
    return sorted(labels, key=(lambda x: (int(x), x)) if whole else (lambda x: (0, x)))


def check_spelling(names: Sequence[str], column: str) -> None:
    """Raise `ConfigError` where labels differ only in how they are written: "pos" and "POS", "1" and "1.0"."""
    alike: dict[str, str] = {}
    for name in names:
        try:
            key = repr(float(name))
        except ValueError:
            key = name.casefold()
        other = alike.setdefault(key, name)
        if other != name:
            allowed = f"the labels {other!r} and {name!r} differ only in how they are written; write them alike"
            raise ConfigError("task.label_column", column, allowed)


def check_categories(names: Sequence[str], rows: int, column: str) -> None:
    """Raise `ConfigError` where the labels are scores to regress on, or ids: one of its own for every row."""
    fractions = [x for x in names if _is_fraction(x)]
    if len(fractions) > MAX_SCORES:
        allowed = (
            f"{len(fractions):,} unlike numbers such as {fractions[0]}: scores, a regression, which is not trained"
        )
        raise ConfigError("task.label_column", column, f"{allowed} here; give classes, such as low and high")
    if len(names) == rows >= MIN_IDS:
        allowed = f"every one of the {rows:,} rows has a label of its own: is it an id? classes are wanted"
        raise ConfigError("task.label_column", column, allowed)


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except (ValueError, OverflowError):
        return False
