"""The cache of encoded examples gives back what encoding gives, or nothing: never another thing, never an error."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fixtures import runs as tiny
from lorabench.config.contracts.task import Encoded, TaskData
from lorabench.models.pretrained import load_tokenizer
from lorabench.tasks import cache
from lorabench.tasks.cache import encode_cached
from lorabench.tasks.causal_lm import Config as LanguageModelling
from lorabench.tasks.text_classification import Config as Classification
from lorabench.training import preparation

MODEL = SimpleNamespace(kind="transformers")
KINDS = ("single", "pairs", "replies", "blocks", "paragraphs")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "encoded"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer in a folder of its own, with a chat template in its files."""
    made = load_tokenizer(tiny.minilm_folder())
    made.chat_template = "{% for m in messages %}[CLS] {{ m['content'] }} [SEP]{% endfor %}"
    made.save_pretrained(folder := tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(folder)


def make_task(kind: str, folder: Path) -> Any:
    rows = [
        (f"how is house {i}{' and so' * (i % 9)}", f"it is {'big ' * (i % 4)}so", "xyz"[i % 7 % 3]) for i in range(90)
    ]
    file = folder / "rows.csv"
    file.write_text("text,more,label\n" + "".join(",".join(row) + "\n" for row in rows))
    text = folder / "a.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says {'much ' * (i % 9)}about {i * 7}." for i in range(200)))
    made: Any = {
        "single": Classification(file=str(file), max_length=12),
        "pairs": Classification(file=str(file), pair_column="more", class_weights="balanced", max_length=12),
        "replies": LanguageModelling(
            source="file", file=str(file), prompt_column="text", response_column="more", max_length=16
        ),
        "blocks": LanguageModelling(source="text", file=str(text), max_length=16),
        "paragraphs": LanguageModelling(source="text", file=str(text), unit="paragraph", max_length=16),
    }[kind]
    made.validate("task")
    return made


def same(a: Encoded, b: Encoded) -> None:
    """Equal down to order, types and bits."""
    for x, y in ((a.lengths, b.lengths), (a.notes, b.notes)):
        assert json.dumps(x) == json.dumps(y)
    assert list(a.splits) == list(b.splits)
    for name in a.splits:
        assert len(a.splits[name]) == len(b.splits[name])
        for x, y in zip(a.splits[name], b.splits[name], strict=True):
            assert list(x) == list(y)
            for field, value in x.items():
                assert type(value) is type(y[field])
                if isinstance(value, np.ndarray):
                    assert (value.dtype, value.tobytes()) == (y[field].dtype, y[field].tobytes())
                    assert y[field].flags.writeable
                else:
                    assert value == y[field]


class Counted:
    """A task that counts how often it encodes, or must not."""

    def __init__(self, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, inner = 0, type(task).encode

        def encode(task: Any, data: TaskData, processor: Any) -> Encoded:
            self.calls += 1
            return inner(task, data, processor)

        monkeypatch.setattr(type(task), "encode", encode)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_equals_what_was_encoded(
    kind: str, tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(kind, tmp_path)
    data, counted = task.load(), Counted(task, monkeypatch)
    made, read = (encode_cached(task, MODEL, data, processor) for _ in range(2))
    assert counted.calls == 1
    assert all(made.splits.values())
    assert made is not read
    same(made, read)
    same(task.encode(data, processor), read)
    batches = [task.collate(e.splits["train"], processor) for e in (made, read)]
    assert all((batches[0][name] == batches[1][name]).all() for name in batches[0])


def test_every_process_but_the_first_reads(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.make_run(tiny.make_base(tmp_path / "base", "bert"), tiny.make_data(tmp_path / "data.csv"))
    counted = Counted(run.task, monkeypatch)
    made = preparation.prepare(run).encoded
    preparation.forget_data()  # as in another process
    same(made, preparation.prepare(run).encoded)
    assert counted.calls == 1
    assert [sorted(f.name for f in entry.iterdir()) for entry in root.iterdir()] == [
        [cache.ARRAYS_FILE, cache.NOTES_FILE]
    ]


def test_the_key_covers_what_examples_depend_on(
    tmp_path: Path, root: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("single", tmp_path)
    data = task.load()
    folder = tmp_path / "tokenizer"
    processor.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")

    def entries(task: Any = task, data: TaskData = data) -> int:
        """How many entries there are once these examples are cached."""
        encode_cached(task, MODEL, data, load_tokenizer(folder))
        return len(list(root.iterdir()))

    assert entries() == 1
    assert entries(task=dataclasses.replace(task, max_length=11)) == 2
    assert entries(data=dataclasses.replace(data, fingerprint="another")) == 3
    assert entries(data=dataclasses.replace(data, label_names=("z", "y", "x"))) == 4
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert entries() == 4, "weights do not count"
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d') }}")
    assert entries() == 5
    monkeypatch.setattr(cache, "date", SimpleNamespace(today=lambda: SimpleNamespace(isoformat=lambda: "another day")))
    assert entries() == 6
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert entries() == 7
    monkeypatch.setattr(cache, "code_fingerprint", lambda: "another")
    assert entries() == 8
    monkeypatch.setattr(cache.metadata, "version", lambda name: "another")
    assert entries() == 9


def test_code_of_the_users_own_and_processors_without_files_are_not_cached(
    tmp_path: Path, root: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("single", tmp_path)
    data, counted = task.load(), Counted(task, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for of, model, name in (
        (dataclasses.replace(task, kind="local"), MODEL, processor.name_or_path),
        (task, SimpleNamespace(kind="local"), processor.name_or_path),
        (task, MODEL, ""),
        (task, MODEL, "owner/name"),
    ):
        other = load_tokenizer(tiny.minilm_folder())
        other.name_or_path = name
        encode_cached(of, model, data, other)
    assert counted.calls == 4
    assert not root.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: (e / cache.ARRAYS_FILE).write_bytes((e / cache.ARRAYS_FILE).read_bytes()[:-50]),
        lambda e: (e / cache.ARRAYS_FILE).write_bytes(b""),
        lambda e: (e / cache.ARRAYS_FILE).unlink(),
        lambda e: np.savez(e / cache.ARRAYS_FILE, np.arange(3)),  # whole, but another's
        lambda e: (e / cache.NOTES_FILE).write_text((e / cache.NOTES_FILE).read_text()[:-50]),
        lambda e: (e / cache.NOTES_FILE).write_bytes(b"\xff\x00"),
        lambda e: (e / cache.NOTES_FILE).write_text("[]"),
        lambda e: (e / cache.NOTES_FILE).write_text((e / cache.NOTES_FILE).read_text().replace(e.name, "0" * 64)),
        lambda e: (e / cache.NOTES_FILE).write_text((e / cache.NOTES_FILE).read_text().replace('"input_ids", ', "")),
        lambda e: (e / cache.NOTES_FILE).unlink(),
    ],
)
def test_what_is_torn_or_foreign_is_made_again(
    damage: Any, tmp_path: Path, root: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("pairs", tmp_path)
    data, counted = task.load(), Counted(task, monkeypatch)
    made = encode_cached(task, MODEL, data, processor)
    (entry,) = root.iterdir()
    damage(entry)
    same(made, encode_cached(task, MODEL, data, processor))
    same(made, encode_cached(task, MODEL, data, processor))
    assert counted.calls == 2  # the second wrote it anew


@pytest.mark.parametrize("how", ["a file stands there", "disk full", "no right"])
def test_a_folder_that_cannot_be_written_means_no_cache(
    how: str, tmp_path: Path, root: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(how)

    if how == "a file stands there":
        root.parent.write_text("")
    else:
        monkeypatch.setattr(os, "fsync" if how == "disk full" else "replace", fail)
    task = make_task("pairs", tmp_path)
    data, counted = task.load(), Counted(task, monkeypatch)
    same(*(encode_cached(task, MODEL, data, processor) for _ in range(2)))
    assert counted.calls == 2
    assert not list(root.glob("*/*"))


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("pairs", tmp_path)
    data, counted = task.load(), Counted(task, monkeypatch)

    def fail(*_: Any) -> None:
        raise PermissionError

    made = encode_cached(task, MODEL, data, processor)
    monkeypatch.setattr(os, "utime", fail)
    same(made, encode_cached(task, MODEL, data, processor))
    assert counted.calls == 1


IDS = np.arange(3, dtype=np.int32)
EDGES = [
    {
        "ids": np.zeros(0, np.int32),
        "x": np.float64(1).item(),
        "n": -1,
        "big": 2**63 - 1,
        "target": np.ones(2, np.float32),
    },
    {"ids": IDS, "x": float("-inf"), "n": 0, "big": 0, "target": np.zeros(2, np.float32)},
]


class Given(Classification):
    """A task whose examples are given. calls: how often it was asked for them."""

    def __init__(self, encoded: Encoded) -> None:
        super().__init__(file="rows.csv")
        self.given, self.calls = encoded, 0

    def encode(self, data: TaskData, processor: Any) -> Encoded:
        self.calls += 1
        return self.given

    def cached(self, processor: Any, fingerprint: str = "") -> Encoded:
        """The examples, through the cache; each fingerprint has an entry of its own."""
        return encode_cached(self, MODEL, TaskData({}, fingerprint), processor)


def test_edges_come_back(processor: Any) -> None:
    splits = {"train": EDGES, "val": [], "odd / name": EDGES[:1]}
    task = Given(Encoded(splits, {"val": [], "train": [0, 3]}, {"a": None}))
    for _ in range(2):
        same(task.given, task.cached(processor))
    assert task.calls == 1


def test_lengths_that_are_left_out_are_the_tasks_work_units(processor: Any) -> None:
    task = Given(Encoded({"train": [{"input_ids": IDS}, {"input_ids": IDS[:1]}], "val": []}))
    assert task.cached(processor).lengths == task.cached(processor).lengths == {"train": [3, 1], "val": []}
    assert task.calls == 1


@pytest.mark.parametrize(
    "examples",
    [
        [{"x": 1}, {"x": 1.0}],
        [{"x": 1}, {}],
        [{"x": 1}, {"x": 1, "y": 2}],
        [{"x": 1, "y": 2}, {"y": 2, "x": 1}],
        [{"x": True}],
        [{"x": "text"}],
        [{"x": np.int64(1)}],
        [{"x": 2**63}],
        [{"x": IDS}, {"x": IDS.astype(np.int64)}],
        [{"x": IDS.astype(">i4")}],
        [{"x": IDS.reshape(1, 3)}],
        [{"x": np.array([{}])}],
        [{}],
    ],
)
def test_examples_that_would_not_come_back_as_they_are_are_not_kept(
    examples: list[dict[str, Any]], root: Path, processor: Any
) -> None:
    Given(Encoded({"train": examples}, {"train": [1]})).cached(processor)
    assert not root.exists()


@pytest.mark.parametrize("notes", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": {1}}])
def test_notes_that_are_no_json_are_not_kept(notes: dict[str, Any], root: Path, processor: Any) -> None:
    Given(Encoded({"train": EDGES}, {"train": [0, 3]}, notes)).cached(processor)
    assert not root.exists()


def test_the_entries_longest_unused_go(root: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Given(Encoded({"train": EDGES}, {"train": [0, 3]}))
    entries: dict[str, Path] = {}

    def use(name: str) -> None:
        before = set(root.glob("*"))
        task.cached(processor, name)
        for new in set(root.iterdir()) - before:
            entries[name] = new

    for age, name in enumerate("abc"):
        use(name)
        os.utime(entries[name], (1000 + age, 1000 + age))
    foreign = root / "somebody's"
    foreign.mkdir()
    (foreign / "file").write_bytes(bytes(10_000))
    size = sum(f.stat().st_size for f in entries["a"].iterdir())
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size + 10)
    use("a")  # read: now the youngest
    assert task.calls == 3
    use("d")
    assert set(root.iterdir()) == {entries["a"], entries["c"], entries["d"], foreign}
    monkeypatch.setattr(cache, "MAX_BYTES", 100)
    task.cached(processor, "b")  # more than the limit by itself: neither kept, nor do others go for it
    assert len(list(root.iterdir())) == 4


def _damage_and_ask(task: Given, processor: Any, root: Path, answers: Any) -> None:
    whole = True
    for _ in range(20):
        whole &= len(task.cached(processor).splits["train"]) == 400
        for entry in root.iterdir():
            (entry / cache.NOTES_FILE).unlink(missing_ok=True)
    answers.put(whole)


def test_processes_that_write_one_key_all_end_well(root: Path, processor: Any) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    task = Given(Encoded({"train": EDGES * 200}, {"train": [0, 3] * 200}))
    arguments = (task, processor, root, answers)
    processes = [context.Process(target=_damage_and_ask, args=arguments) for _ in range(3)]
    for p in processes:
        p.start()
    assert [answers.get(timeout=60) for _ in processes] == [True] * 3
    for p in processes:
        p.join()
    for _ in range(2):
        same(task.given, task.cached(processor))
    assert task.calls == 1
    (entry,) = root.iterdir()
    assert sorted(f.name for f in entry.iterdir()) == [cache.ARRAYS_FILE, cache.NOTES_FILE]


def test_the_cache_is_its_users_alone_and_trimming_follows_no_link(
    root: Path, tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("single", tmp_path)
    data = task.load()
    root.mkdir(parents=True, mode=0o755)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("years of work")
    (root / ("f" * 64)).symlink_to(outside)
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    cache._remove_unused(root)
    assert (root / ("f" * 64)).is_symlink() and (outside / "mine").exists()
    monkeypatch.undo()
    monkeypatch.setenv("LORABENCH_CACHE", str(root.parent))
    encode_cached(task, MODEL, data, processor)
    assert root.stat().st_mode & 0o777 == 0o700
    assert [p for p in root.iterdir() if not p.is_symlink()]
    elsewhere = tmp_path / "other"
    (elsewhere / "real").mkdir(parents=True)
    (elsewhere / "encoded").symlink_to(elsewhere / "real")
    monkeypatch.setenv("LORABENCH_CACHE", str(elsewhere))
    encode_cached(task, MODEL, data, processor)
    assert not list((elsewhere / "real").iterdir())
