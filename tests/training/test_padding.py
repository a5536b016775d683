"""A base on which padding changes an example's loss is refused before anything is written; without padding it trains."""

from __future__ import annotations

import re

import pytest
import transformers as tf
from omegaconf import OmegaConf

from fixtures.runs import make_base, make_data, make_run, minilm_folder
from lorabench.config.errors import ConfigError
from lorabench.config.runs import parse
from lorabench.sweep.execute import execute
from lorabench.sweep.packs import Job, cell_label
from lorabench.training import precision, preparation
from lorabench.training.padding import check_padding


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "data.csv", 60)


def save(folder, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def xlnet(tmp_path_factory):
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_folder())
    config = tf.XLNetConfig(vocab_size=len(tokenizer), d_model=16, n_layer=1, n_head=2, d_inner=16)
    return save(tmp_path_factory.mktemp("xlnet"), tf.XLNetModel(config), tokenizer)


@pytest.fixture(scope="module")
def convbert(tmp_path_factory):
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_folder())
    config = tf.ConvBertConfig(
        vocab_size=len(tokenizer), hidden_size=16, embedding_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=16, max_position_embeddings=64, conv_kernel_size=9, initializer_range=0.5,
    )  # fmt: skip
    return save(tmp_path_factory.mktemp("convbert"), tf.ConvBertModel(config), tokenizer)


def check(base, data, **changes) -> None:
    run = make_run(base, data, **changes)
    prepared = preparation.prepare(run)
    loaded = preparation.load_base(run, prepared.head, precision.resolve(run))
    check_padding(run, loaded.model, prepared, pack_size=2)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("type_", ["32", "64"])
def test_bases_that_mask_padding_pass(tmp_path, data, kind, type_):
    check(make_base(tmp_path, kind), data, **{"trainer.precision": type_})


def test_convolutions_over_tokens_are_found(convbert, data):
    with pytest.raises(ConfigError, match=r"model\.source=.*padding changes no loss"):
        check(convbert, data)


def test_xlnet_is_refused_before_anything_is_written_and_trains_without_padding(xlnet, data, tmp_path):
    def job(**changes) -> Job:
        cfg = OmegaConf.create(
            {
                "model": {"kind": "transformers", "name": "tiny", "source": xlnet, "dropout": 0.0},
                "task": {"kind": "text_classification", "name": "words", "source": "file", "max_length": 32,
                         "file": str(data), "text_column": "text", "label_column": "label"},
                "method": {"name": "full"}, "optimizer": {},
                "trainer": {"max_steps": 1, "batch_size": 2, "accelerator": "cpu", "precision": "32"}, "seed": 0,
                "sweep": {"name": "s", "dir": str(tmp_path / "s"), "progress": False},
                "report": {"dir": str(tmp_path / "report")},
            }
        )  # fmt: skip
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value)
        run, settings = parse(cfg)
        return Job(run, settings, cell_label(run))

    with pytest.raises(ConfigError, match=r"model\.source=.*padding changes no loss") as caught:
        execute([job()])
    assert not (tmp_path / "s").exists()
    offered = OmegaConf.from_dotlist(
        re.findall(r"[a-z]+\.\w+=\w+", str(caught.value).partition("without padding: ")[2])
    )
    settings = {f"{section}.{key}": value for section, found in offered.items() for key, value in found.items()}
    assert len(settings) == 4
    (record,) = execute([job(**settings)])
    assert record.status == "completed", record.error
