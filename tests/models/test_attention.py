"""`model.attention=auto` asks the model's class what it offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from fixtures import runs as tiny
from lorabench.config.contracts.model import HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.models.transformers import Config
from lorabench.training.precision import resolve

LABELS = HeadSpec("AutoModelForSequenceClassification", ("south", "north"))
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
KINDS: dict[str, Any] = {
    "bert": lambda n: tf.BertConfig(vocab_size=n, **SIZES),
    "deberta-v2": lambda n: tf.DebertaV2Config(vocab_size=n, **SIZES),
    "mpnet": lambda n: tf.MPNetConfig(vocab_size=n, **SIZES),
    "bloom": lambda n: tf.BloomConfig(vocab_size=n, hidden_size=32, n_layer=1, n_head=2),
    "gemma2": lambda n: tf.Gemma2Config(vocab_size=n, head_dim=16, num_key_value_heads=1, **SIZES),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_long_task_trains_with_what_the_base_offers(tmp_path: Path, kind: str) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.minilm_folder())
    tf.AutoModel.from_config(KINDS[kind](len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = tiny.make_data(tmp_path / "data.csv", rows=20)
    run = tiny.make_run(tmp_path, data, **{"task.max_length": 512, "model.attention": "auto"})
    expected = "sdpa" if kind == "bert" else "eager"
    assert resolve(run).attention == expected
    base = Config(source=str(tmp_path)).load(LABELS, attention=resolve(run).attention)
    assert base.model.config._attn_implementation == expected
    asked = tiny.make_run(tmp_path, data, **{"model.attention": "sdpa"})
    if expected == "sdpa":
        assert resolve(asked).attention == "sdpa"
    else:
        with pytest.raises(ConfigError, match="this base offers eager alone; allowed: auto, eager"):
            resolve(asked)
