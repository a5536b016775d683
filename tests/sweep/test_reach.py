"""What of a base no adapter can reach, such as fused experts, is said: in a dry run, in the record, in the report."""

from __future__ import annotations

import io

import pytest
import transformers as tf
from omegaconf import OmegaConf
from rich.console import Console

from fixtures.runs import make_data, minilm_folder
from lorabench.config.runs import parse
from lorabench.models.inventory import inventory
from lorabench.report.cautions import _data_warnings
from lorabench.results.data_notes import reach_caveat
from lorabench.results.findings import find
from lorabench.results.sweep import load
from lorabench.sweep import progress
from lorabench.sweep.execute import execute
from lorabench.sweep.packs import Job, cell_label


def mixtral(vocabulary: int):
    config = tf.MixtralConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return tf.MixtralForCausalLM(config)


def test_experts_and_their_router_are_counted_exactly():
    experts = 2 * (4 * (2 * 32) * 16 + 4 * 16 * 32)  # layers x (gate_up_proj [E, 2I, H] + down_proj [E, H, I])
    routers = 2 * 4 * 16
    assert inventory(mixtral(61)).beyond_adapters == experts + routers
    assert (
        inventory(tf.BertModel(tf.BertConfig(vocab_size=61, hidden_size=16, num_attention_heads=2))).beyond_adapters
        == 0
    )


def test_small_shares_are_not_said():
    assert reach_caveat(9, 1000) is None and reach_caveat(None, 1000) is None and reach_caveat(0, 0) is None
    assert (reach_caveat(250, 1000) or "").startswith("25 % of the base's parameters (250 of 1,000)")


@pytest.fixture
def base(tmp_path):
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_folder())
    mixtral(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_dry_run_record_and_report_say_the_share(base, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_told", set())

    def job(**sweep) -> Job:
        cfg = OmegaConf.create(
            {
                "model": {"kind": "transformers", "name": "moe", "source": str(base)},
                "task": {"kind": "text_classification", "name": "words", "source": "file", "max_length": 32,
                         "file": str(make_data(tmp_path / "data.csv", 60)), "text_column": "text", "label_column": "label"},
                "method": {"name": "lora", "r": 2}, "optimizer": {},
                "trainer": {"max_steps": 1, "batch_size": 2, "accelerator": "cpu", "precision": "32"}, "seed": 0,
                "sweep": {"name": "s", "dir": str(tmp_path / "s"), "progress": False, **sweep},
                "report": {"dir": str(tmp_path / "report")},
            }
        )  # fmt: skip
        run, settings = parse(cfg)
        return Job(run, settings, cell_label(run))

    said = io.StringIO()
    execute([job(dry_run=True)], console=Console(file=said, width=400))
    (record,) = execute([job()])
    line = reach_caveat(record.resources["beyond_adapters"], record.resources["total_parameters"])
    assert line and f"moe: {line}" in said.getvalue()
    assert line[1:] in " ".join(_data_warnings(find(load(tmp_path / "s"))))
