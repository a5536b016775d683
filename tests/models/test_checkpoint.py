"""What a checkpoint lacks, holds in another shape or holds for nobody: only a task's head may be new."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from fixtures import runs as tiny
from lorabench.config.contracts.model import HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.models.transformers import Config
from lorabench.training import preparation

LABELS = HeadSpec("AutoModelForSequenceClassification", ("south", "north"))
LM = HeadSpec("AutoModelForCausalLM")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Change the tensors of a folder's weight file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


DOWN = "layers.1.mlp.down_proj.weight"
FFN = "encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("llama", lambda t: t.pop(DOWN), rf"lack 1: model\.{DOWN}"),
        ("bert", lambda t: t.pop(FFN), rf"lack 1: bert\.{FFN}"),
        ("bert", lambda t: t.update({FFN: torch.zeros(32, 40)}), rf"hold in another shape 1: bert\.{FFN}"),
        (
            "bert",
            lambda t: t.update({"encoder.layer.2.output.dense.weight": torch.zeros(32, 48)}),
            r"hold beyond what config\.json describes 1: .*encoder\.layer\.2",
        ),
        ("bert", lambda t: t.pop("pooler.dense.bias"), r"lack 1: bert\.pooler\.dense\.bias"),  # half a pooler is torn
    ],
    ids=["decoder lacks", "encoder lacks", "another shape", "a layer too many", "half a pooler"],
)
def test_tensors_that_do_not_fit_the_body(tmp_path: Path, kind: str, change: Any, text: str) -> None:
    config = Config(source=str(rewrite(tiny.make_base(tmp_path / "base", kind), change)))
    for act in (config.info, config.load):
        with pytest.raises(ConfigError, match=text) as e:
            act(LABELS)
        assert e.value.key == "model.source"


def test_harmless_extras_are_left_out_and_said(tmp_path: Path) -> None:
    extras = {"bert.embeddings.position_ids": torch.arange(64)[None], "cls.predictions.bias": torch.zeros(5)}
    base = tiny.make_base(tmp_path / "base", "bert")
    rewrite(base, lambda t: t.update({f"bert.{k}": t.pop(k) for k in list(t)} | extras))
    config = Config(source=str(base))
    expected = ("left out of its files, as parts this task does not use: cls", "new head: classifier, drawn at random")
    assert config.info(LABELS).notes == config.load(LABELS).info.notes == expected


@pytest.mark.parametrize("names", [("south", "north"), ("South", "North"), ("north", "south"), ("a", "b", "c")])
def test_a_trained_head_is_kept_when_its_labels_are_the_tasks(tmp_path: Path, names: tuple[str, ...]) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.make_base(tmp_path / "base", "bert"))
    config = tf.AutoConfig.from_pretrained(tmp_path / "base", num_labels=len(names))
    config.id2label = dict(enumerate(names))
    torch.manual_seed(3)
    model = tf.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    kept = tuple(n.lower() for n in names) == LABELS.label_names

    ours = Config(source=str(tmp_path / "classifier"))
    base = ours.load(LABELS)
    assert base.info == ours.info(LABELS)
    assert base.notes["files"] == [
        "kept head: classifier, whose labels are the task's" if kept else "new head: classifier, drawn at random"
    ]
    loaded = base.model.classifier.weight
    assert (loaded.shape == model.classifier.weight.shape and torch.equal(loaded, model.classifier.weight)) == kept
    assert torch.equal(loaded, ours.load(LABELS).model.classifier.weight)
    assert torch.equal(base.model.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_labels_of_a_file_are_those_of_its_config(tmp_path: Path) -> None:
    base = tiny.make_decoder(tmp_path / "base", "llama")
    assert "id2label" not in json.loads((base / "config.json").read_text())
    assert Config(source=str(base)).info(LM).notes == ()


def test_the_command_refuses_before_anything_is_written_and_says_what_is_new(
    tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    base, data = tiny.make_base(tmp_path / "base", "bert"), tiny.make_data(tmp_path / "data.csv", rows=60)
    columns = ("task.text_column=text", "task.label_column=label", "task.max_length=32")
    args = ("model=hf", f"model.source={base}", "task=text_file", f"task.file={data}", *columns, "trainer.max_steps=2")
    code, said = cli(*args, "sweep.dry_run=true")
    assert code == 0, said
    assert "new head: classifier, drawn at random" in " ".join(said.split())
    rewrite(base, lambda t: t.pop(FFN))
    preparation.forget_data()  # as another process
    code, said = cli(*args)
    assert code == 2
    assert f"lack 1: bert.{FFN}" in "".join(said.split("\n"))
    assert not (tmp_path / "sweeps").exists()
