"""Adapters out and in, with PEFT itself as the judge: what one writes the other loads, with the same logits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from fixtures.adapters import ConvNet, base, head_of, info_of, logits, make_plan, random_state
from fixtures.runs import minilm_folder
from lorabench.adapters.files import load_slice, read_peft, save_slice
from lorabench.adapters.merge import merge
from lorabench.adapters.peft import to_peft
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import HeadSpec
from lorabench.config.errors import ConfigError

HEADS = {
    "bert": HeadSpec("AutoModelForSequenceClassification", ("a", "b", "c")),
    "gpt2-seq": HeadSpec("AutoModelForSequenceClassification", ("a", "b", "c")),
    "gpt2": HeadSpec("AutoModelForCausalLM"),
    "llama": HeadSpec("AutoModelForCausalLM"),
    "conv": None,
}
TARGETS = {
    "bert-attention": ("bert", ["query", "value"]),
    "bert-embedding": ("bert", ["word_embeddings", "query", "output.dense"]),
    "gpt2": ("gpt2", ["c_attn", "mlp.c_proj"]),  # transformers' Conv1D
    "gpt2-embedding": ("gpt2", ["wte", "c_attn"]),  # wte is tied to lm_head
    "gpt2-seq": ("gpt2-seq", ["c_attn"]),
    "llama": ("llama", ["q_proj", "v_proj", "down_proj"]),
    "conv": ("conv", ["stem", "down", "point"]),
}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks for it
embedding_saved = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
mixed_kinds = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
tied_target = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")


def written(folder: Path, kind: str, plan: SlicePlan) -> Path:
    model = base(kind)
    save_slice(folder, random_state(model, plan), plan, info=info_of(model, kind), run={}, head=HEADS[kind])
    return folder


def merged_logits(kind: str, folder: Path) -> torch.Tensor:
    """Through our reader and merge: no PEFT involved."""
    state, plan = load_slice(folder)
    model = base(kind)
    merge(model, state, plan)
    return logits(model)


def peft_logits(kind: str, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(base(kind), folder).eval())


def agree(a: torch.Tensor, b: torch.Tensor, kind: str) -> None:
    assert (a - b).abs().max() < 1e-5
    assert (a - logits(base(kind))).abs().max() > 1e-2  # the adapter does something


@mixed_kinds
@tied_target
@pytest.mark.parametrize("name", TARGETS)
def test_peft_loads_what_is_written_here(tmp_path: Path, name: str) -> None:
    kind, ends = TARGETS[name]
    model = base(kind)
    folder = written(tmp_path / "adapter", kind, make_plan(info_of(model), ends, modules=head_of(kind)))
    agree(peft_logits(kind, folder), merged_logits(kind, folder), kind)


def randomise(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)


def trained_by_peft(folder: Path, kind: str, **config: Any) -> torch.Tensor:
    """A PEFT folder, and the logits PEFT itself gives with it."""
    tasks = {"bert": "SEQ_CLS", "gpt2-seq": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "conv": None}
    model = get_peft_model(base(kind), LoraConfig(task_type=tasks[kind], **config)).eval()
    randomise(model)
    model.save_pretrained(folder)
    return logits(model)


FROM_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]}),
    "pooler saved whole": ("bert", {"target_modules": ["query"], "modules_to_save": ["pooler"]}),
    "all-linear": ("bert", {"r": 2, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj"]}),
    "regex": ("llama", {"r": 3, "target_modules": r"model\.layers\.1\..*(q|down)_proj"}),
    "some layers": ("llama", {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]}),
    "excluded": ("llama", {"target_modules": ["o_proj", "up_proj"], "exclude_modules": r".*layers\.0\..*"}),
    "patterns": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
                           "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3, "q_proj": 5}}),
    "patterns and rslora": ("llama", {"use_rslora": True, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "target_modules": ["k_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d, classifier": ("gpt2-seq", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "token embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding": ("bert", {"target_modules": ["word_embeddings", "position_embeddings"]}),
    "convolutions": ("conv", {"r": 4, "target_modules": ["stem", "down", "point"], "modules_to_save": ["head"]}),
}  # fmt: skip


@embedding_saved
@pytest.mark.parametrize("name", FROM_PEFT)
def test_what_peft_trained_loads_here(tmp_path: Path, name: str) -> None:
    kind, config = FROM_PEFT[name]
    theirs = trained_by_peft(tmp_path / "theirs", kind, **config)
    agree(theirs, merged_logits(kind, tmp_path / "theirs"), kind)
    # and on: written again from here, PEFT reads the same adapter
    adapter = read_peft(tmp_path / "theirs")
    save_slice(tmp_path / "ours", adapter.state, adapter.plan, info=info_of(base(kind)), head=HEADS[kind])
    agree(theirs, peft_logits(kind, tmp_path / "ours"), kind)


def test_grouped_convolution_keeps_pefts_tensors(tmp_path: Path) -> None:
    """Merging one is impossible (A reads all channels), in PEFT too; the file must still be PEFT's own."""
    with pytest.warns(UserWarning, match="groups > 1"):
        trained_by_peft(tmp_path / "theirs", "conv", r=8, target_modules=["grouped"])
    adapter = read_peft(tmp_path / "theirs")
    assert adapter.state["grouped.lora_A"].shape == (8, 16, 3, 3) and adapter.state["grouped.lora_B"].shape == (
        16,
        2,
        1,
        1,
    )
    _, tensors = to_peft(adapter.state, adapter.plan, info=info_of(base("conv")))
    before = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert set(tensors) == set(before) and all(torch.equal(tensors[k], before[k]) for k in before)
    with pytest.raises(ConfigError, match="grouped.*groups"):
        merge(base("conv"), adapter.state, adapter.plan)


@pytest.mark.parametrize("rslora", [False, True])
def test_own_rank_and_alpha_of_every_layer_survive(tmp_path: Path, rslora: bool) -> None:
    model = base("llama")
    plan = make_plan(info_of(model), ["q_proj", "v_proj", "o_proj"], alpha=16.0)
    adapters = {}
    for i, (name, spec) in enumerate(plan.adapters.items()):
        r, alpha = 1 + i, 16.0 if i % 2 else 10.5
        adapters[name] = replace(spec, r=r, alpha=alpha, scaling=alpha / math.sqrt(r) if rslora else alpha / r)
    plan = replace(plan, adapters=adapters)
    folder = written(tmp_path / "adapter", "llama", plan)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_rslora"] is rslora and len(config["rank_pattern"]) == 5
    agree(peft_logits("llama", folder), merged_logits("llama", folder), "llama")
    assert read_peft(folder).plan.adapters == adapters
    assert load_slice(folder)[1] == plan


def test_minilm_itself(tmp_path: Path) -> None:
    """Real weights, all-linear, a head: written here, read by PEFT, merged; the same logits three times."""
    import transformers as tf

    def fresh() -> Any:
        torch.manual_seed(0)
        return tf.AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=3).eval()

    def said(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(
                input_ids=torch.tensor([[101, 2023, 2003, 1037, 3231, 102], [101, 7592, 2088, 999, 1012, 102]])
            ).logits

    model = fresh()
    info = info_of(model, "bert")
    plan = make_plan(info, ["query", "key", "value", "dense"], r=8, alpha=2.0, modules=["classifier"], rslora=True)
    plan = replace(plan, adapters={n: s for n, s in plan.adapters.items() if "pooler" not in n})
    state = {k: t * 0.3 if ".lora_" in k else t for k, t in random_state(model, plan).items()}
    save_slice(tmp_path / "adapter", state, plan, info=info, head=HEADS["bert"])
    theirs = said(PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval())
    before = said(model)
    merge(model, *load_slice(tmp_path / "adapter"))
    assert (said(model) - theirs).abs().max() < 1e-5
    assert (before - theirs).abs().max() > 0.05


def test_a_scaling_of_neither_rule_becomes_an_alpha_of_its_own(tmp_path: Path) -> None:
    plan = make_plan(info_of(base("llama")), ["q_proj"])
    plan = replace(plan, adapters={n: replace(s, scaling=0.3 + i) for i, (n, s) in enumerate(plan.adapters.items())})
    folder = written(tmp_path / "adapter", "llama", plan)
    agree(peft_logits("llama", folder), merged_logits("llama", folder), "llama")


def test_a_name_that_ends_another_layers_name_targets_itself_alone(tmp_path: Path) -> None:
    class Nested(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ConvNet()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.inner(x)

    torch.manual_seed(0)
    model = Nested().requires_grad_(False)
    plan = make_plan(info_of(model), ["point"])
    plan = replace(plan, adapters={"point": replace(plan.adapters["point"], r=2), "stem": plan.adapters["point"]})
    config, _ = to_peft(random_state(model, plan), plan, info=info_of(model))
    made = get_peft_model(model, LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"}))
    adapted = {
        n.removeprefix("base_model.model."): m.r["default"] for n, m in made.named_modules() if hasattr(m, "lora_A")
    }
    assert adapted == {"point": 2, "stem": 4}


def test_a_head_that_did_not_train_is_not_promised_to_peft(tmp_path: Path) -> None:
    """PEFT's SEQ_CLS demands a classifier in the file; without one the adapter loads as a plain PeftModel."""
    folder = written(tmp_path / "adapter", "bert", make_plan(info_of(base("bert")), ["query"]))
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] is None
    agree(peft_logits("bert", folder), merged_logits("bert", folder), "bert")


@embedding_saved
def test_base_weights_that_peft_stored_along_are_told_apart(tmp_path: Path) -> None:
    trained_by_peft(tmp_path / "theirs", "llama", target_modules=["embed_tokens"])
    adapter = read_peft(tmp_path / "theirs")
    name = "model.embed_tokens.weight"
    assert list(adapter.carried) == [name]
    assert torch.equal(adapter.carried[name], base("llama").get_parameter(name))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("peft_type", "LOHA", "allowed: IA3, LORA, VERA"),
        ("peft_type", "IA3", "a layer needs ia3_l; it has lora_A, lora_B"),
        ("use_dora", True, "a layer needs lora_A, lora_B, magnitude"),
        ("bias", "all", "allowed: none"),
        ("init_lora_weights", "pissa", "allowed: True, False, gaussian"),
        ("layer_replication", [[0, 2]], "not supported here"),
        ("trainable_token_indices", [1], "not supported here"),
        ("lora_bias", True, "not supported here"),
        ("a_setting_of_tomorrow", 3, "not supported here"),
        ("lora_alpha", "8", "a number greater than 0"),
        ("lora_alpha", 0, "a number greater than 0"),
        ("rank_pattern", [1], "a mapping"),
        ("alpha_pattern", {"(": 1}, "a regular expression"),
        ("modules_to_save", "classifier", "a list of module names"),
        ("r", 5, "shapes of rank 5"),
    ],
)
def test_settings_that_mean_something_else_are_refused_by_name(
    tmp_path: Path, key: str, value: Any, allowed: str
) -> None:
    folder = written(tmp_path / "adapter", "llama", make_plan(info_of(base("llama")), ["q_proj"]))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as e:
        read_peft(folder)
    assert allowed in str(e.value) and str(path) in str(e.value)
    assert key in str(e.value) or key == "r"


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return written(
            tmp_path / "adapter", "bert", make_plan(info_of(base("bert")), ["query"], modules=["classifier"])
        )

    def test_exact_reload(self, folder: Path) -> None:
        plan = make_plan(info_of(base("bert")), ["query"], modules=["classifier"])
        state, read = load_slice(folder)
        expected = random_state(base("bert"), plan)
        assert read == plan and set(state) == set(expected)
        assert all(torch.equal(state[k], expected[k]) for k in expected)
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # all readable to whom the umask allows

    @pytest.mark.parametrize("kept", ["head", "bitfit", "full"])
    def test_what_peft_has_no_format_for(self, tmp_path: Path, kept: str) -> None:
        model = base("gpt2-seq")
        plan = {
            "head": SlicePlan(seed=3, modules=("score",)),
            "bitfit": SlicePlan(seed=3, modules=("score",), biases=("transformer.h.0.attn.c_attn", "transformer.ln_f")),
            "full": SlicePlan(seed=3, full=True),
        }[kept]
        state = dict(model.state_dict()) if kept == "full" else random_state(model, plan)
        save_slice(tmp_path / "adapter", state, plan, info=info_of(model))
        assert not (tmp_path / "adapter" / "adapter_config.json").exists()
        read, read_plan = load_slice(tmp_path / "adapter")
        assert read_plan == plan and all(torch.equal(read[k], state[k]) for k in state)

    def test_tied_weights_are_stored_once(self, tmp_path: Path) -> None:
        model = base("gpt2")
        state = dict(model.state_dict())
        assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
        save_slice(tmp_path / "adapter", state, SlicePlan(seed=0, full=True), info=info_of(model))
        assert "lm_head.weight" not in load_file(tmp_path / "adapter" / "weights.safetensors")
        read, _ = load_slice(tmp_path / "adapter")
        assert torch.equal(read["lm_head.weight"], state["lm_head.weight"])

    def test_replaced_whole_and_nothing_left_beside(self, folder: Path) -> None:
        (folder.parent / ".adapter.dead.tmp").mkdir()  # a writer that was killed
        plan = make_plan(info_of(base("bert")), ["value"], r=2, modules=["classifier"])
        written(folder, "bert", plan)
        assert load_slice(folder)[1] == plan
        assert [p.name for p in folder.parent.iterdir()] == ["adapter"]

    def test_a_failed_write_leaves_the_old_one(self, folder: Path) -> None:
        before = load_slice(folder)[1]
        plan = make_plan(info_of(base("bert")), ["value"])
        with pytest.raises(KeyError):
            save_slice(folder, {}, plan, info=info_of(base("bert")))
        assert load_slice(folder)[1] == before
        assert [p.name for p in folder.parent.iterdir()] == ["adapter"]

    def test_cut_between_the_two_renames(self, folder: Path) -> None:
        before = load_slice(folder)[1]
        folder.rename(folder.with_name(".adapter.old"))
        assert load_slice(folder)[1] == before
        written(folder, "bert", before)
        assert [p.name for p in folder.parent.iterdir()] == ["adapter"]

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "plan.json"])
    @pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
    def test_torn_and_foreign_files(self, folder: Path, name: str, damage: str) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(
            {"cut": raw[: len(raw) // 2], "foreign": b"\x80\x04PK\xff" * 50, "empty": b""}[damage]
        )
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            load_slice(folder)

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_missing_files(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=name):
            load_slice(folder)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="existing folder"):
            load_slice(tmp_path / "nothing")

    def test_pickles_are_refused_unopened(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ConfigError, match="adapter_model.bin.*can run code"):
            load_slice(folder)

    @pytest.mark.parametrize(
        "text", ["[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "plan": {"adapters": 3}}', "[" * 100_000]
    )
    def test_a_plan_that_is_none(self, folder: Path, text: str) -> None:
        (folder / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match=r"plan\.json"):
            load_slice(folder)

    def test_tensors_of_another_plan(self, folder: Path) -> None:
        saved = json.loads((folder / "plan.json").read_text())
        name = next(iter(saved["plan"]["adapters"]))
        saved["plan"]["adapters"][name]["r"] = 9
        (folder / "plan.json").write_text(json.dumps(saved))
        with pytest.raises(ConfigError, match=r"rank 9"):
            load_slice(folder)

    def test_a_layer_with_half_an_adapter(self, folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors.pop(next(k for k in tensors if "lora_B" in k))
        save_file(tensors, path)
        with pytest.raises(ConfigError, match="a layer needs lora_A, lora_B; it has lora_A"):
            load_slice(folder)
