"""A base's folder is what its files say: adapters beside it, quantized weights, vocabulary and positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from fixtures import runs as tiny
from lorabench.config.contracts.model import HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.models.transformers import Config
from lorabench.tasks.encoding import check_positions

LABELS = HeadSpec("AutoModelForSequenceClassification", ("south", "north"))
BODY = HeadSpec("AutoModel")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}


def change_config(folder: Path, **settings: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_a_whole_model(tmp_path: Path, name: str) -> None:
    base = tiny.make_base(tmp_path / "base", "bert")
    (base / name).write_text("{}")
    for act in (Config(source=str(base)).info, Config(source=str(base)).load):
        with pytest.raises(ConfigError, match=rf"beside the whole model there is {name}.*move these files away"):
            act(LABELS)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "a 4-bit bitsandbytes checkpoint"),
        ({"load_in_8bit": True}, "a 8-bit bitsandbytes checkpoint"),
        ({"quant_method": "gptq", "bits": 4}, "a 4-bit GPTQ checkpoint"),
        ({"quant_method": "awq", "bits": 4}, "a 4-bit AWQ checkpoint"),
        ({"quant_method": "fp8"}, "a fp8 checkpoint"),
    ],
)
def test_quantized_weights_are_named_and_refused(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    source = change_config(tiny.make_base(tmp_path / "base", "llama"), quantization_config=settings)
    with pytest.raises(ConfigError, match=f"{name}: not supported until quantized bases are"):
        Config(source=source).info(LABELS)


def test_a_tokenizer_longer_than_the_embedding_table(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", "bert")
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(base)
    config = Config(source=str(base))
    with pytest.raises(ConfigError, match=rf"ids up to {rows + 1}, its embedding table {rows} rows") as e:
        config.processor()
    assert f"resize_token_embeddings({rows + 2})" in str(e.value)
    model = tf.AutoModel.from_pretrained(base)
    model.resize_token_embeddings(rows + 2, mean_resizing=False)  # the hint, as typed
    model.save_pretrained(base)
    assert len(config.processor()) == rows + 2


def test_a_padding_token_without_a_row(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", "llama")
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    rows = len(tokenizer)
    change_config(base, pad_token_id=rows)
    assert Config(source=str(base)).info(LABELS).head == ("score",)  # the tokenizer's own has a row
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(ConfigError, match=f"ids up to {rows}, its padding token's {rows} among them"):
        Config(source=str(base)).processor()


MAKE: dict[str, Any] = {
    "bert": (lambda: tf.BertModel(tf.BertConfig(vocab_size=99, **SIZES)), 66),
    "roberta": (lambda: tf.RobertaModel(tf.RobertaConfig(vocab_size=99, pad_token_id=1, **SIZES)), 64),
    "opt": (
        lambda: tf.OPTModel(
            tf.OPTConfig(
                vocab_size=99,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
            )
        ),
        64,
    ),
    "bart": (
        lambda: tf.BartModel(
            tf.BartConfig(
                vocab_size=99,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                max_position_embeddings=64,
            )
        ),
        64,
    ),
}


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_the_longest_position_is_the_tables_less_its_offset(tmp_path: Path, kind: str) -> None:
    make, longest = MAKE[kind]
    model = make().eval()
    model.save_pretrained(tmp_path)
    info = Config(source=str(tmp_path)).info(BODY)
    check_positions({"train": [longest]}, info, 512)
    with pytest.raises(ConfigError, match=f"at most {longest}, the positions this base has") as e:
        check_positions({"train": [longest + 1]}, info, 512)
    assert e.value.key == "task.max_length"
    model(input_ids=torch.full((1, longest), 5))  # and the base itself agrees
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_what_a_processor_does_is_hashed(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", "llama")
    config = Config(source=str(base))
    seen = [config.processor_fingerprint()]
    for name, text in (
        ("preprocessor_config.json", '{"size": 3}'),
        ("preprocessor_config.json", '{"size": 4}'),
        ("chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}"),
        ("chat_template.jinja", "{% for m in messages %}<{{ m.content }}>{% endfor %}"),
    ):
        (base / name).write_text(text)
        seen.append(config.processor_fingerprint())
    assert len(set(seen)) == len(seen)
    (base / "README.md").write_text("nothing that acts")
    (base / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    assert config.processor_fingerprint() == seen[-1]  # other text, the same conversation


def test_a_template_with_todays_date_has_one_fingerprint(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", "llama")
    (base / "chat_template.jinja").write_text("{{ strftime_now('%f') }}")  # microseconds
    assert Config(source=str(base)).processor_fingerprint() == Config(source=str(base)).processor_fingerprint()
