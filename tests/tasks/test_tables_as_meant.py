"""Tables are read as the user meant: no line is lost in silence, and what was assumed is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorabench.config.errors import ConfigError
from lorabench.results.data_notes import data_caveats
from lorabench.tasks import files
from lorabench.tasks.causal_lm import Config as LanguageModelling
from lorabench.tasks.text_classification import Config as Classification

COLUMNS = {"t": "text", "y": "label"}


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows(n: int = 60) -> list[str]:
    return [f"text number {i}\t{'pos' if i % 2 else 'neg'}" for i in range(n)]


@pytest.mark.parametrize("closed", [False, True])
def test_a_text_that_begins_with_a_quotation_mark_swallows_no_rows(tmp_path: Path, closed: bool) -> None:
    lines = rows()
    lines[10] = f'"{lines[10]}'
    lines[30] = f'{lines[30]}"' if closed else lines[30]
    task = Classification(file=written(tmp_path / "a.tsv", "\n".join(["text\tlabel", *lines])))
    if closed:  # the last label alone would carry the mark: it is left to the user's eye
        table = files.read_table(str(task.file), COLUMNS, "task.file")
        assert len(table["t"]) == 60
        return
    data = task.load()
    assert sum(len(s) for s in data.splits.values()) == 60
    assert any(r["text"] == '"text number 10' for s in data.splits.values() for r in s)
    said = "a.tsv: quotation marks are read as plain characters (1 texts begin with one)"
    assert data.notes["read_as"] == [said]
    assert said in data_caveats(data.notes)


def test_quoted_texts_of_several_lines_are_said(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", 'text,label\n"one\ntwo, ""three""",a\n\nfour,b\n')
    said: list[str] = []
    assert files.read_table(file, COLUMNS, "task.file", said=said) == {
        "t": ['one\ntwo, "three"', "four"],
        "y": ["a", "b"],
    }
    assert said == ["a.csv: 4 lines are read as 3 rows: quoted texts span lines"]


def test_quotation_marks_that_contradict_each_other(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", 'text,label\n"one, two",a\n"three" four,b\n')
    with pytest.raises(ConfigError, match=r"line 3: .* task\.quoting=none"):
        files.read_table(file, COLUMNS, "task.file")
    file = written(tmp_path / "b.csv", 'text,label\n"one,a\ntwo",b\n')
    plain = files.read_table(file, COLUMNS, "task.file", quoting="none")
    assert plain == {"t": ['"one', 'two"'], "y": ["a", "b"]}
    standard = files.read_table(file, COLUMNS, "task.file", quoting="standard")
    assert standard == {"t": ["one,a\ntwo"], "y": ["b"]}


def test_rows_that_are_too_short_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    files.read_table(written(tmp_path / "a.csv", "text,label\none,a\ntwo\n"), COLUMNS, "task.file", said=said)
    assert said == ["a.csv: 1 of 2 rows have fewer fields than the head; what they lack is empty"]


def test_json_is_read_by_its_text_not_by_its_name(tmp_path: Path) -> None:
    items = [{"text": f"{i}", "label": "a"} for i in range(3)]
    lines, array = "\n".join(map(json.dumps, items)), json.dumps(items, indent=1)
    for name, text in (("a.json", lines), ("a.jsonl", array), ("b.json", array), ("b.jsonl", lines)):
        assert files.read_table(written(tmp_path / name, text), COLUMNS, "task.file")["t"] == ["0", "1", "2"], name


def test_messages_as_json_in_a_cell_are_no_text(tmp_path: Path) -> None:
    cell = json.dumps([{"role": "user", "content": "hi"}]).replace('"', '""')
    task = LanguageModelling(source="file", file=written(tmp_path / "a.csv", f'text\n"[not JSON"\n"{cell}"\n'))
    with pytest.raises(ConfigError, match=r"task\.text_column=text: .* row 2 of .* messages as JSON"):
        task.load()


def test_one_shared_instruction_needs_the_column_of_inputs(tmp_path: Path) -> None:
    items = [{"instruction": "Translate.", "input": f"in {i}", "output": f"out {i}"} for i in range(60)]
    file = written(tmp_path / "a.json", json.dumps(items))
    task = LanguageModelling(source="file", file=file, prompt_column="instruction", response_column="output")
    with pytest.raises(ConfigError, match=r"task\.prompt_column=instruction: 60 pairs share 1 of it.*input_column"):
        task.load()
    whole = LanguageModelling(
        source="file", file=file, prompt_column="instruction", response_column="output", input_column="input"
    ).load()
    assert all(whole.splits.values())
    assert whole.splits["train"][0]["prompt"].startswith("Translate.\n\nin ")


@pytest.mark.parametrize(("one", "other"), [("pos", "POS"), ("1", "1.0")])
def test_labels_that_differ_in_writing_only(tmp_path: Path, one: str, other: str) -> None:
    lines = [f"text {i},{(one, other, 'x')[i % 3]}" for i in range(60)]
    task = Classification(file=written(tmp_path / "a.csv", "\n".join(["text,label", *lines])))
    with pytest.raises(ConfigError, match=r"differ only in how they are written"):
        task.load()


@pytest.mark.parametrize(
    ("label", "why"), [("{i}.25", "a regression"), ("id{i}", "a label of its own"), ("{i}", "a label of its own")]
)
def test_scores_and_ids_are_no_labels(tmp_path: Path, label: str, why: str) -> None:
    lines = [f"text {i},{label.format(i=i)}" for i in range(60)]
    task = Classification(file=written(tmp_path / "a.csv", "\n".join(["text,label", *lines])))
    with pytest.raises(ConfigError, match=why) as e:
        task.load()
    assert e.value.key == "task.label_column"


def test_a_category_taken_for_the_text(tmp_path: Path) -> None:
    lines = [f"kind {i % 4},{i % 2}" for i in range(60)]
    task = Classification(file=written(tmp_path / "a.csv", "\n".join(["text,label", *lines])))
    with pytest.raises(ConfigError, match=r"task\.text_column=text: de-duplication left 4 of 60 rows.*dedupe=false"):
        task.load()


def test_a_group_lies_in_one_split(tmp_path: Path) -> None:
    lines = [f"text {i},{i % 2},author {i // 4}" for i in range(240)]
    file = written(tmp_path / "a.csv", "\n".join(["text,label,who", *lines]))
    data = Classification(file=file, group_column="who").load()
    groups = [{r["group"] for r in s} for s in data.splits.values()]
    assert all(groups) and len(set.union(*groups)) == sum(map(len, groups)) == 60


def test_a_cell_of_many_megabytes_is_refused_with_the_limit(tmp_path: Path) -> None:
    items = [{"text": "short", "label": "a"}, {"text": "x" * 5_000_001, "label": "b"}]
    file = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, items)))
    with pytest.raises(ConfigError, match=r"at most 5,000,000 characters a cell; row 2 of .* has 5,000,001; cut it"):
        files.read_table(file, COLUMNS, "task.file")


def test_sizes_that_do_not_fit_are_named_at_once(tmp_path: Path) -> None:
    lines = [f"text {i},{i % 2}" for i in range(60)]
    file = written(tmp_path / "a.csv", "\n".join(["text,label", *lines]))
    there = {name: len(part) for name, part in Classification(file=file).load().splits.items()}
    task = Classification(file=file, train_examples=9600, val_examples=2000, test_examples=4000)
    fit = " ".join(f"task.{name}_examples={n}" for name, n in there.items())
    with pytest.raises(ConfigError, match=rf"task\.train_examples=9600: more than there are, .*what fits: {fit} \("):
        task.load()
    fitted = Classification(file=file, **{f"{name}_examples": n for name, n in there.items()}).load()
    assert {name: len(part) for name, part in fitted.splits.items()} == there
