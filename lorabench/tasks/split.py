"""Which rows train, validate and test. Their content decides, never their order or a random generator."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lorabench.config.contracts.task import SPLITS, Row, Task
from lorabench.config.errors import ConfigError

NON_WORD = re.compile(r"[\W_]+")
ADDRESS_OR_NAME = re.compile(r"(?:https?://|www\.)\S+|(?<!\w)@\w+|^\W*rt\b(?=\s*@)")  # a leading RT, too
CUT_ADDRESS = re.compile(r" h(?:t(?:t(?:ps?)?)?)?$")  # what is left of an address at the end of a cut tweet
RETWEET_OF = re.compile(r"\brt\b\W*@\w+")
GROUP_CHARACTERS = 50  # near-duplicate tweets share this many at their beginning
HASH_RANGE = 2**63
MIN_DISTINCT = 10  # fewer different texts than these, most of them repeated, are categories


def content_hash(*parts: str) -> int:
    """Return a number below 2**63 that depends on the texts alone (SHA-256)."""
    data = b"\x1f".join(p.encode("utf-8", "surrogatepass") for p in parts)
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def plain_key(text: str) -> str:
    """Return the text without case and surplus white space; texts with equal keys are duplicates."""
    return " ".join(text.casefold().split())


def tweet_key(text: str) -> str:
    """Return a tweet without case, punctuation, addresses, @names and a leading RT: a retweet equals its original.

    Addresses that were cut at the end of a tweet go, too. A tweet with nothing else keeps its `plain_key`.
    """
    words = NON_WORD.sub(" ", ADDRESS_OR_NAME.sub(" ", text.casefold())).strip()
    return CUT_ADDRESS.sub("", words) or plain_key(text)


def tweet_group(text: str) -> str:
    """Return the first words of a tweet, or of the tweet it quotes (RT @name ...). Near-duplicates share them."""
    *_, quoted = RETWEET_OF.split(text.casefold())
    quoted = tweet_key(quoted)
    return (quoted if len(quoted) >= GROUP_CHARACTERS else tweet_key(text))[:GROUP_CHARACTERS]


def identify(rows: Iterable[Row], fields: Sequence[str]) -> list[Row]:
    """Return the rows with their id, "example": a hash of `fields`, and of a number where rows are equal."""
    seen: Counter[int] = Counter()
    out = []
    for row in rows:
        parts = [str(row.get(f) or "") for f in fields]
        base = content_hash(*parts)
        seen[base] += 1
        out.append(row | {"example": base if seen[base] == 1 else content_hash(*parts, str(seen[base]))})
    return out


def deduplicate(rows: Sequence[Row], key: Callable[[Row], str]) -> tuple[list[Row], dict[str, int]]:
    """Keep one row of each group of equal `key`: one of the commonest label, and of those the one of the smallest id.

    Rows of an official validation or test split all stay, so that results remain comparable with published ones. A row
    to train on that equals one of them is removed. Returns the rows and counts for the notes.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    kept, conflicts = [], 0
    for group in groups.values():
        if len(group) == 1:
            kept.append(group[0])
            continue
        official = [r for r in group if r.get("split") in ("val", "test")]
        labels = Counter(r.get("label") for r in group)
        conflicts += len(labels) > 1
        if official:
            kept.extend(official)
        else:
            kept.append(min(group, key=lambda r: (-labels[r.get("label")], r["example"])))
    return kept, {"duplicates_removed": len(rows) - len(kept), "label_conflicts": conflicts}


def check_distinct(kept: int, removed: int, key: str, column: str | None) -> None:
    """Raise `ConfigError` where de-duplication left a handful of rows: the column is a category, no text.

    key, column: the setting that named the column, and its value.
    """
    if kept < MIN_DISTINCT and removed > kept:
        allowed = f"de-duplication left {kept} of {kept + removed:,} rows, as few different texts are in it"
        raise ConfigError(
            key, column, f"{allowed}: name the column of the texts, or keep equal ones: task.dedupe=false"
        )


def split_rows(
    rows: Sequence[Row], group: Callable[[Row], str], *, val_fraction: float, test_fraction: float
) -> dict[str, list[Row]]:
    """Return rows by split, each sorted by a hash of the ids.

    A row that names its "split" goes there. For the others the hash of their group decides: a group is never divided,
    and a row keeps its split when others come or go. A split that some rows name gets no others.
    """
    marked = {row.get("split") for row in rows}
    test = 0.0 if "test" in marked else test_fraction
    val = 0.0 if "val" in marked else val_fraction
    out: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        split = row.get("split")
        if split in (None, "train"):
            u = content_hash("split", group(row)) / HASH_RANGE
            split = "test" if u < test else "val" if u < test + val else "train"
        out[split].append(row)
    return {name: sorted(members, key=_order) for name, members in out.items()}


def _order(row: Row) -> tuple[int, int]:
    return content_hash("order", str(row["example"])), row["example"]


def take(rows: Sequence[Any], n: int | None, key: str) -> list[Any]:
    """Return the first n rows, so that a smaller subset lies inside a larger one; None: all.

    key: the setting that n comes from. Raises `ConfigError` where there are fewer.
    """
    if n is not None and n > len(rows):
        raise ConfigError(key, n, f"at most {len(rows)}, as many as there are; null takes all")
    return list(rows[:n])


def limit(splits: dict[str, list[Any]], task: Task) -> dict[str, list[Any]]:
    """Cut splits to `train_examples`, `val_examples` and `test_examples`. Raises `ConfigError` where one is empty."""
    check_not_empty(splits, task)
    sizes = {"train": task.train_examples, "val": task.val_examples, "test": task.test_examples}
    over = {f"task.{s}_examples": (n, len(splits[s])) for s in SPLITS if (n := sizes[s]) and n > len(splits[s])}
    if len(over) > 1:
        (key, (n, _)), *_ = over.items()
        fit = " ".join(f"{name}={there}" for name, (_, there) in over.items())
        raise ConfigError(key, n, f"more than there are, in {len(over)} settings; what fits: {fit} (null takes all)")
    return {name: take(rows, sizes[name], f"task.{name}_examples") for name, rows in splits.items()}


def check_not_empty(splits: dict[str, list[Any]], task: Task) -> None:
    """Raise `ConfigError` where a split has no examples."""
    settings = {
        "train": ("train_examples", task.train_examples),
        "val": ("val_fraction", task.val_fraction),
        "test": ("test_fraction", task.test_fraction),
    }
    sizes = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
    for name, rows in splits.items():
        if not rows:
            key, value = settings[name]
            raise ConfigError(f"task.{key}", value, f"no examples are left for {name} ({sizes}): more rows are needed")


def fingerprint(splits: dict[str, list[Row]]) -> str:
    """Return the SHA-256 of the ids of every split. It does not depend on the order of the rows."""
    total = hashlib.sha256()
    for name, rows in sorted(splits.items()):
        total.update(name.encode())
        for example in sorted(r["example"] for r in rows):
            total.update(example.to_bytes(8, "big"))
    return total.hexdigest()
