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
from lorabench.models.build import load_tokenizer
from lorabench.tasks import cache as ec
from lorabench.tasks.causal_lm import Config as LanguageModelling
from lorabench.tasks.text_classification import Config as Classification
from lorabench.training import preparation as prepare

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
        "replies": LanguageModelling(source="file", file=str(file), prompt_column="text", response_column="more", max_length=16),
        "blocks": LanguageModelling(source="text", file=str(text), max_length=16),
        "paragraphs": LanguageModelling(source="text", file=str(text), unit="paragraph", max_length=16),
    }[kind]  # fmt: skip
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
    made, read = (ec.encode_cached(task, MODEL, data, processor) for _ in range(2))
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
    made = prepare.prepare(run).encoded
    prepare._prepared.clear()  # as in another process
    same(made, prepare.prepare(run).encoded)
    assert counted.calls == 1
    assert [sorted(f.name for f in entry.iterdir()) for entry in root.iterdir()] == [[ec.ARRAYS, ec.NOTES]]


def test_the_key_covers_what_examples_depend_on(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("single", tmp_path)
    data = task.load()
    folder = tmp_path / "tokenizer"
    processor.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")

    def key(task: Any = task, data: TaskData = data) -> Path | None:
        return ec._entry(task, MODEL, data, load_tokenizer(folder))

    first = key()
    found = {
        first,
        key(task=dataclasses.replace(task, max_length=11)),
        key(data=dataclasses.replace(data, fingerprint="another")),
        key(data=dataclasses.replace(data, label_names=("z", "y", "x"))),
    }
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert key() == first  # weights do not count
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d') }}")
    found.add(key())
    monkeypatch.setattr(ec, "date", SimpleNamespace(today=lambda: SimpleNamespace(isoformat=lambda: "another day")))
    found.add(key())
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    found.add(key())
    monkeypatch.setattr(ec, "code_fingerprint", lambda: "another")
    found.add(key())
    monkeypatch.setattr(ec.metadata, "version", lambda name: "another")
    found.add(key())
    assert len(found) == 9
    assert None not in found


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
        ec.encode_cached(of, model, data, other)
    assert counted.calls == 4
    assert not root.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: (e / ec.ARRAYS).write_bytes((e / ec.ARRAYS).read_bytes()[:-50]),
        lambda e: (e / ec.ARRAYS).write_bytes(b""),
        lambda e: (e / ec.ARRAYS).unlink(),
        lambda e: np.savez(e / ec.ARRAYS, np.arange(3)),  # whole, but another's
        lambda e: (e / ec.NOTES).write_text((e / ec.NOTES).read_text()[:-50]),
        lambda e: (e / ec.NOTES).write_bytes(b"\xff\x00"),
        lambda e: (e / ec.NOTES).write_text("[]"),
        lambda e: (e / ec.NOTES).write_text((e / ec.NOTES).read_text().replace(e.name, "0" * 64)),
        lambda e: (e / ec.NOTES).write_text((e / ec.NOTES).read_text().replace('"input_ids", ', "")),
        lambda e: (e / ec.NOTES).unlink(),
    ],
)
def test_what_is_torn_or_foreign_is_made_again(
    damage: Any, tmp_path: Path, root: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("pairs", tmp_path)
    data, counted = task.load(), Counted(task, monkeypatch)
    made = ec.encode_cached(task, MODEL, data, processor)
    (entry,) = root.iterdir()
    damage(entry)
    same(made, ec.encode_cached(task, MODEL, data, processor))
    same(made, ec.encode_cached(task, MODEL, data, processor))
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
    same(*(ec.encode_cached(task, MODEL, data, processor) for _ in range(2)))
    assert counted.calls == 2
    assert not list(root.glob("*/*"))


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("pairs", tmp_path)
    data, counted = task.load(), Counted(task, monkeypatch)

    def fail(*_: Any) -> None:
        raise PermissionError

    made = ec.encode_cached(task, MODEL, data, processor)
    monkeypatch.setattr(os, "utime", fail)
    same(made, ec.encode_cached(task, MODEL, data, processor))
    assert counted.calls == 1


IDS = np.arange(3, dtype=np.int32)
EDGES = [
    {"ids": np.zeros(0, np.int32), "x": np.float64(1).item(), "n": -1, "big": 2**63 - 1, "target": np.ones(2, np.float32)},
    {"ids": IDS, "x": float("-inf"), "n": 0, "big": 0, "target": np.zeros(2, np.float32)},
]  # fmt: skip


def test_edges_come_back(root: Path) -> None:
    made = Encoded({"train": EDGES, "val": [], "odd / name": EDGES[:1]}, {"val": [], "train": [0, 3]}, {"a": None})
    ec._write(root / ("0" * 64), made)
    read = ec._read(root / ("0" * 64))
    assert read is not None
    same(made, read)


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
def test_examples_that_would_not_come_back_as_they_are_are_not_kept(examples: list[dict[str, Any]], root: Path) -> None:
    ec._write(root / ("0" * 64), Encoded({"train": examples}, {"train": [1]}))
    assert not root.exists()


@pytest.mark.parametrize("notes", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": {1}}])
def test_notes_that_are_no_json_are_not_kept(notes: dict[str, Any], root: Path) -> None:
    ec._write(root / ("0" * 64), Encoded({"train": EDGES}, {"train": [0, 3]}, notes))
    assert not root.exists()


def test_the_entries_longest_unused_go(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Encoded({"train": EDGES}, {"train": [0, 3]})
    names = [letter * 64 for letter in "abcd"]
    for age, name in enumerate(names[:3]):
        ec._write(root / name, made)
        os.utime(root / name, (1000 + age, 1000 + age))
    foreign = root / "somebody's"
    foreign.mkdir()
    (foreign / "file").write_bytes(bytes(10_000))
    size = sum(f.stat().st_size for f in (root / names[0]).iterdir())
    monkeypatch.setattr(ec, "LIMIT", 3 * size + 10)
    assert ec._read(root / names[0]) is not None  # used: now the youngest
    ec._write(root / names[3], made)
    assert sorted(p.name for p in root.iterdir()) == sorted([names[0], names[2], names[3], foreign.name])
    monkeypatch.setattr(ec, "LIMIT", 100)
    ec._write(root / names[1], made)  # more than the limit by itself: neither kept, nor do others go for it
    assert len(list(root.iterdir())) == 4


def _hammer(entry: Path, answers: Any) -> None:
    made = Encoded({"train": EDGES * 200}, {"train": [0, 3] * 200})
    good = True
    for _ in range(20):
        ec._write(entry, made)
        read = ec._read(entry)
        good &= read is not None and len(read.splits["train"]) == 400
    answers.put(good)


def test_processes_that_write_one_key_all_end_well(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    entry = root / ("0" * 64)
    processes = [context.Process(target=_hammer, args=(entry, answers)) for _ in range(3)]
    for p in processes:
        p.start()
    assert [answers.get(timeout=60) for _ in processes] == [True] * 3
    for p in processes:
        p.join()
    assert sorted(f.name for f in entry.iterdir()) == [ec.ARRAYS, ec.NOTES]
