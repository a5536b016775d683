"""Methods: settings, the layers they target on each base, exact counts, and the errors of bad input."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    Phi3Config,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from fixtures.bases import bert, conv, gpt2, llama
from lorabench.config.contracts.model import BaseInfo
from lorabench.config.errors import ConfigError
from lorabench.config.runs import parse_component
from lorabench.methods import bitfit, full, head, ia3, lora
from lorabench.models.inventory import inventory


def distilbert() -> tuple[nn.Module, BaseInfo]:
    with torch.device("meta"):
        model = DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
        )
    return model, inventory(model, head=("pre_classifier", "classifier"))


BASES = {"bert": bert, "gpt2": gpt2, "llama": llama, "distilbert": distilbert}


def layers_of(kind: str, **config) -> set[str]:
    """Targeted layers of the first block, without its prefix."""
    _, info = BASES[kind]()
    names = lora.Config(r=2, **config).plan(info, seed=0).adapters
    return {name.split(".0.", 1)[1] for name in names if ".0." in name}


BERT_MLP = {"intermediate.dense", "output.dense"}
LLAMA_MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("bert", "q+v", {"attention.self.query", "attention.self.value"}),
        ("bert", "o", {"attention.output.dense"}),
        ("bert", "mlp", BERT_MLP),
        (
            "bert",
            "q+k+v+o",
            {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"},
        ),
        ("bert", "o+mlp", BERT_MLP | {"attention.output.dense"}),
        ("bert", ["query"], {"attention.self.query"}),
        ("bert", ["output.dense"], {"attention.output.dense", "output.dense"}),
        ("bert", r".*self\.(query|key)", {"attention.self.query", "attention.self.key"}),
        ("gpt2", "attention", {"attn.c_attn", "attn.c_proj"}),
        ("gpt2", "o", {"attn.c_proj"}),
        ("gpt2", "mlp", {"mlp.c_fc", "mlp.c_proj"}),
        ("gpt2", "all", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("gpt2", "all-linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("llama", "q+v", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("llama", "attention", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        ("llama", "mlp", LLAMA_MLP),
        ("distilbert", "q+v", {"attention.q_lin", "attention.v_lin"}),
        ("distilbert", "o", {"attention.out_lin"}),
        ("distilbert", "mlp", {"ffn.lin1", "ffn.lin2"}),
    ],
)
def test_targets(kind, target, expected):
    assert layers_of(kind, target_modules=target) == expected


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES = {
    "bert": BertConfig(**SIZES),
    "deberta": DebertaV2Config(**SIZES),
    "vit": ViTConfig(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "neox": GPTNeoXConfig(**SIZES),
    "modernbert": ModernBertConfig(**SIZES),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "t5": T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"),
    "whisper": WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_covers_every_linear_layer_of_the_blocks(family):
    with torch.device("meta"):
        info = inventory(AutoModel.from_config(FAMILIES[family]))
    attention, mlp, both = (
        set(lora.Config(r=1, target_modules=t).plan(info, seed=0).adapters) for t in ("attention", "mlp", "all")
    )
    blocks = {x.name for x in info.layers if x.kind == "Linear" and ".0." in f".{x.name}"}
    assert both == blocks and attention | mlp == blocks and not attention & mlp


def test_portable_words_never_reach_the_head_or_the_pooler():
    _, info = bert()
    names = lora.Config(r=1, target_modules="all").plan(info, seed=0).adapters
    assert not {n for n in names if "pooler" in n or "classifier" in n}
    assert "bert.pooler.dense" in lora.Config(r=1).plan(info, seed=0).adapters  # all-linear takes it, as PEFT does


@pytest.mark.parametrize(
    ("kind", "config", "text"),
    [
        ("bert", {"target_modules": ["query", "q_proj"]}, "'q_proj' matches no layer of this base; names that exist: "),
        ("bert", {"target_modules": ["q_proj"]}, "query, key, value, output.dense, intermediate.dense, pooler.dense"),
        ("bert", {"target_modules": "q_proj"}, r"method.target_modules=q_proj: 'q_proj' matches no layer"),
        ("bert", {"target_modules": "query"}, "A string is a regex for the whole name; a list means suffixes: [query]"),
        ("bert", {"target_modules": ["classifier"]}, "'classifier' matches no layer"),
        ("bert", {"target_modules": ["LayerNorm"]}, "bert.embeddings.LayerNorm is LayerNorm"),
        (
            "gpt2",
            {"target_modules": "q+v"},
            "method.target_modules=q+v: 'q' matches no layer of this base; names that exist: "
            "wte, wpe, c_attn, attn.c_proj, mlp.c_proj, c_fc, lm_head",
        ),
        (
            "bert",
            {"r": 33, "target_modules": ["query"]},
            "method.r=33: at most 32: layer bert.encoder.layer.0.attention.self.query is 32×32",
        ),
        (
            "llama",
            {"r": 20, "target_modules": ["k_proj"]},
            "method.r=20: at most 16: layer model.layers.0.self_attn.k_proj is 32×16",
        ),
        ("llama", {"r": 4096}, "method.r=4096: at most 16: layer model.layers.0.self_attn.k_proj"),  # for all at once
        ("bert", {"rank_pattern": {"query": 40}}, "method.rank_pattern=40: at most 32"),
        (
            "bert",
            {"rank_pattern": {"nothing": 4}},
            "method.rank_pattern={'nothing': 4}: 'nothing' matches no targeted layer",
        ),
        ("bert", {"alpha_pattern": {"key": 4.0}, "target_modules": ["query"]}, "'key' matches no targeted layer"),
        (
            "bert",
            {"layers": [1, 2]},
            "method.layers=[1, 2]: indices of blocks that hold targeted layers (0 to 1); not [2]",
        ),
        (
            "bert",
            {"modules_to_save": ["nowhere"]},
            "method.modules_to_save=['nowhere']: 'nowhere' is no module of this base",
        ),
    ],
)
def test_what_does_not_fit_the_base(kind, config, text):
    _, info = BASES[kind]()
    with pytest.raises(ConfigError) as caught:
        lora.Config(**config).plan(info, seed=0)
    assert text in str(caught.value)


def test_what_does_not_fit_a_convolution():
    _, info = conv()
    with pytest.raises(ConfigError, match=r"method\.r=2: a multiple of 4, the groups of layer grouped"):
        lora.Config(r=2, target_modules=["grouped"]).plan(info, seed=0)
    with pytest.raises(ConfigError, match=r"method\.init=orthogonal: kaiming or gaussian: layer stem"):
        lora.Config(r=2, target_modules=["stem"], init="orthogonal").plan(info, seed=0)


def test_scalings_patterns_and_layers():
    _, info = bert()
    config = lora.Config(
        r=4,
        alpha=8,
        use_rslora=True,
        target_modules="q+v",
        layers=[1],
        rank_pattern={"value": 16},
        alpha_pattern={"value": 2.0},
    )
    plan = config.plan(info, seed=7)
    specs = {name.rpartition(".")[2]: spec for name, spec in plan.adapters.items()}
    assert len(plan.adapters) == 2 and all(".layer.1." in name for name in plan.adapters)
    assert specs["query"].scaling == 8 / math.sqrt(4) and specs["value"].scaling == 2 / math.sqrt(16)
    assert (specs["value"].r, specs["value"].alpha, plan.seed, plan.modules) == (16, 2.0, 7, ("classifier",))
    assert lora.Config(r=4, alpha=8, target_modules="q").plan(info, seed=0).adapters.popitem()[1].scaling == 2.0


def section(cfg):
    """A method's settings as the real configuration reads them."""
    return parse_component(cfg, "method")


def method(**fields):
    return section(OmegaConf.create({"method": {"name": "lora", **fields}}))


def test_alpha_rules_become_numbers_so_that_equal_runs_are_equal():
    assert method(r=8, alpha="2r") == method(r=8, alpha=16) == method(r=8, alpha="16") == method(r=8, alpha=16.0)
    assert (
        method(r=8, alpha="r").alpha == 8.0
        and method(r=8, alpha="0.5r").alpha == 4.0
        and method(r=3, alpha="2*r").alpha == 6.0
    )
    again = method(
        r=8, alpha="2r", target_modules=["query"], layers=[0], rank_pattern={"query": 4}, alpha_pattern={"query": 3}
    )
    assert method(**{k: v for k, v in dataclasses.asdict(again).items() if k != "name"}) == again
    assert type(again.alpha_pattern["query"]) is float and type(again.target_modules) is list


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "method.r=0: must be at least 1"),
        ({"r": 1.5}, "method.r=1.5"),
        ({"alpha": 0}, "method.alpha=0.0: must be greater than 0"),
        ({"alpha": -2}, "method.alpha=-2.0: must be greater than 0"),
        ({"alpha": "-2r"}, "method.alpha=-2r: a number above 0, or a multiple of the rank such as 2r"),
        ({"alpha": "large"}, "method.alpha=large: a number above 0"),
        ({"alpha": True}, "method.alpha=True: a number above 0"),
        ({"alpha": "nan"}, "method.alpha=nan: must be a finite number"),
        ({"alpha": None}, "method.alpha=None: a number above 0"),
        ({"dropout": 1.0}, "method.dropout=1.0: must be at most"),
        ({"target_modules": []}, "method.target_modules=[]: a non-empty list of names, or a string"),
        ({"target_modules": None}, "method.target_modules=None"),
        ({"target_modules": ["query", 3]}, "method.target_modules=['query', 3]"),
        ({"target_modules": "(query"}, "method.target_modules=(query: a valid regular expression"),
        ({"rank_pattern": {"(": 4}}, "method.rank_pattern=(: a valid regular expression"),
        ({"rank_pattern": {"query": 0}}, "method.rank_pattern={'query': 0}: values above 0"),
        ({"alpha_pattern": {"query": -1}}, "method.alpha_pattern={'query': -1.0}: values above 0"),
        ({"layers": []}, "method.layers=[]: indices of blocks, or null for all"),
        ({"init": "zeros"}, "method.init=zeros: allowed: kaiming, gaussian, orthogonal"),
        ({"init": "orthogonal", "r": 3}, "method.r=3: even for init=orthogonal"),
        ({"rank": 4}, "method.rank=4: unknown key; allowed: name, r, alpha"),
        ({"name": "magic"}, "method.name=magic: allowed: bitfit, dora, full, head, ia3, lora, lorafa"),
    ],
)
def test_bad_settings_name_the_key_the_value_and_what_is_allowed(fields, text):
    with pytest.raises(ConfigError) as caught:
        method(**fields)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["lora", "rslora", "full", "bitfit", "head"])
def test_shipped_files_compose(repo, name):
    cfg = OmegaConf.create({"method": OmegaConf.load(repo / "conf" / "method" / f"{name}.yaml")})
    method = section(cfg)
    assert set(cfg.method) == {f.name for f in dataclasses.fields(method)}
    assert method.label().keys() == {"method", "r", "alpha", "targets"}
    if name in ("lora", "rslora"):
        assert method == lora.Config(use_rslora=name == "rslora")


def test_labels():
    assert lora.Config(r=4, target_modules=["query", "value"]).label() == {
        "method": "LoRA",
        "r": 4,
        "alpha": 16.0,
        "targets": "query+value",
    }
    assert lora.Config(use_rslora=True).label() == {"method": "rsLoRA", "r": 8, "alpha": 16.0, "targets": "all-linear"}


def test_bitfit_trains_every_bias_and_the_head():
    model, info = bert()
    plan = bitfit.Config().plan(info, seed=0)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias") and "classifier" not in n)
    assert plan.trainable(info) == biases + sum(p.numel() for p in model.classifier.parameters())
    with pytest.raises(ConfigError, match=r"method\.name=bitfit: another method: this base has no biases"):
        bitfit.Config().plan(llama()[1], seed=0)


def test_head_only_and_full_count_exactly():
    model, info = bert()
    assert head.Config().plan(info, seed=0).trainable(info) == 32 * 3 + 3
    assert head.Config(modules_to_save=["pooler"]).plan(info, seed=0).modules == ("classifier", "bert.pooler")
    assert full.Config().plan(info, seed=0).trainable(info) == sum(p.numel() for p in model.parameters())
    _, decoder = gpt2()
    with pytest.raises(
        ConfigError, match=r"method\.modules_to_save=None: names of modules to train: this base has no new head"
    ):
        head.Config().plan(decoder, seed=0)
    assert head.Config(modules_to_save=["ln_f"]).plan(decoder, seed=0).modules == ("transformer.ln_f",)


def test_who_may_share_a_base():
    groups = {m.Config.pack_group for m in (lora, bitfit, head)}
    assert full.Config.pack_group is None and len(groups) == 3
    varying = {f.name for f in dataclasses.fields(lora.Config) if f.metadata["varies"]}
    assert {f.name for f in dataclasses.fields(lora.Config)} - varying == {"name", "modules_to_save"}
    varying = {f.name for f in dataclasses.fields(ia3.Config) if f.metadata["varies"]}
    assert "feedforward_modules" not in varying  # a layer is scaled on one side for all slices of a pack


def test_methods_import_without_torch(repo):
    code = "import sys, lorabench.methods.lora, lorabench.methods.bitfit; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repo)


class TestMatchedParameters:
    """On MiniLM-L6, r = 45 on attention, 36 on the MLP and 20 on both train as much: 829,440."""

    def run(self, **settings: object) -> object:
        from hydra import compose, initialize_config_dir

        from lorabench.launch.command_line import config_dir
        from lorabench.launch.job import make_job

        overrides = [f"{key}={value}" for key, value in {"task.train_examples": 32, **settings}.items()]
        with initialize_config_dir(config_dir(), version_base=None):
            return make_job(compose("config", overrides=overrides), name="x", experiment=None).run

    @pytest.mark.parametrize(("target", "r"), [("attention", 45), ("mlp", 36), ("all", 20)])
    def test_the_rank_that_matches(self, target: str, r: int) -> None:
        settings = {"method.target_modules": target}
        matched = self.run(**settings, **{"method.match_parameters": 829_440, "method.alpha": "2r"})
        assert matched.method.r == r and matched.method.alpha == 2 * r
        plain = self.run(**settings, **{"method.r": r, "method.alpha": "2r"})
        assert matched.run_id == plain.run_id

    def test_a_number_no_rank_comes_near(self) -> None:
        with pytest.raises(ConfigError, match=r"method.match_parameters=1000: a number near a multiple of 41472"):
            self.run(**{"method.target_modules": "all", "method.match_parameters": 1000})

    def test_a_number_beyond_the_layers(self) -> None:
        with pytest.raises(ConfigError, match="method.r"):
            self.run(**{"method.target_modules": "all", "method.match_parameters": 40_000_000})
