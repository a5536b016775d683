"""Against PEFT: the same starts and batches give the same losses, targets resolve alike and counts agree."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fixtures.bases import BASES, conv, losses, plan, repeat, spec, token_batch
from lorabench.adapters import inject
from lorabench.config.contracts.method import SlicePlan
from lorabench.methods.lora import Config

R, ALPHA = 4, 16

# base, names that end like these get adapters, whole modules
CASES = {
    "Linear": ("bert", ["query", "value", "intermediate.dense"], ["classifier"]),
    "Linear of a decoder": ("llama", ["q_proj", "v_proj", "down_proj"], []),
    "Conv1D": ("gpt2", ["c_attn", "c_fc", "mlp.c_proj"], []),
    "Embedding": ("bert", ["word_embeddings"], ["classifier"]),
    "Conv2d": ("conv", ["stem", "grouped", "point"], ["head"]),
}


def make(kind: str) -> tuple[nn.Module, Any]:
    return conv(nn.Identity) if kind == "conv" else BASES[kind]()


def peft_of(model: nn.Module, **config: Any) -> nn.Module:
    with warnings.catch_warnings():  # advice on tied embeddings, fan_in_fan_out and merging grouped convolutions
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(**config))


def batch_of(kind: str, i: int) -> dict[str, Tensor]:
    if kind != "conv":
        return token_batch(4, 8, seed=i)
    generator = torch.Generator().manual_seed(i)
    return {"pixels": torch.randn(4, 3, 8, 8, generator=generator), "label": torch.tensor([0, 1, 2, 0])}


def peft_name(ours: str) -> str:
    """`layer.lora_A` -> what PEFT calls that parameter."""
    layer, _, part = ours.rpartition(".")
    if part not in ("lora_A", "lora_B"):
        return f"base_model.model.{layer}.modules_to_save.default.{part}"
    if layer.endswith("embeddings"):
        return f"base_model.model.{layer}.lora_embedding_{part[-1]}.default"
    return f"base_model.model.{layer}.{part}.default.weight"


def train(forward: Any, parameters: list[nn.Parameter], kind: str) -> list[Tensor]:
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    found = []
    for i in range(20):
        optimizer.zero_grad()
        rows = forward(batch_of(kind, i))
        rows.sum().backward()
        optimizer.step()
        found.append(rows.detach())
    return found


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_give_pefts_losses(case, use_rslora):
    kind, ends, whole = CASES[case]
    scaling = ALPHA / math.sqrt(R) if use_rslora else ALPHA / R
    model, info = make(kind)
    ours = plan(info, R, ends, scaling=scaling, modules=tuple(whole))
    mate = plan(info, 2 * R, ends, seed=5, modules=tuple(whole))  # a slice of another rank beside it
    stack = inject(model, [ours, mate], info=info)
    start = {name: value.clone() for name, value in stack.slice_state(0).items()}
    packed = train(lambda b: losses(model, repeat(b, 2)), [t.parameter for t in stack.named_trainables()], kind)

    reference = peft_of(
        make(kind)[0],
        r=R,
        lora_alpha=ALPHA,
        use_rslora=use_rslora,
        target_modules=list(ours.adapters),
        modules_to_save=whole or None,
    )
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            own = parameters[peft_name(name)]
            assert own.shape == value.shape and own.requires_grad
            own.copy_(value)
    trainable = [p for p in reference.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == ours.trainable(info) == sum(v.numel() for v in start.values())
    solo = train(lambda b: losses(reference.base_model.model, b), trainable, kind)

    for a, b in zip(packed, solo, strict=True):
        torch.testing.assert_close(a[:4], b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(solo[0], solo[-1], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", {"target_modules": "all-linear"}),
        ("gpt2", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": "all-linear"}),
        ("bert", {"target_modules": ["query", "output.dense"]}),
        ("bert", {"target_modules": r".*layer\.1\.attention.*(query|value)"}),
        ("llama", {"target_modules": ["q_proj", "o_proj"], "layers": [1]}),
        ("gpt2", {"target_modules": ["c_proj", "wte"], "rank_pattern": {"mlp.c_proj": 2, r"h\.0\.attn\.c_proj": 3}}),
        ("bert", {"target_modules": ["query", "key"], "alpha_pattern": {"layer.0.*query": 3.0, "key": 5.0}}),
        ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]}),
    ],
)
def test_targets_ranks_scalings_and_counts_are_pefts(kind, config):
    model, info = make(kind)
    ours = Config(r=R, alpha=ALPHA, **config)
    ours.validate("method")
    found = ours.plan(info, seed=0)
    theirs = dict(config)
    if "layers" in theirs:
        theirs["layers_to_transform"] = theirs.pop("layers")
    saved = [*theirs.pop("modules_to_save", []), *info.head]
    task = {"task_type": "SEQ_CLS"} if info.head else {}
    reference = peft_of(model, r=R, lora_alpha=ALPHA, modules_to_save=saved or None, **task, **theirs)
    layers = {n.removeprefix("base_model.model."): m for n, m in reference.named_modules() if isinstance(m, LoraLayer)}
    assert layers.keys() == found.adapters.keys()
    for name, layer in layers.items():
        assert layer.r["default"] == found.adapters[name].r
        assert layer.scaling["default"] == pytest.approx(found.adapters[name].scaling)
    assert sum(p.numel() for p in reference.parameters() if p.requires_grad) == found.trainable(info)


def test_grouped_convolutions_have_pefts_shapes():
    model, info = make("conv")
    stack = inject(model, [SlicePlan(seed=0, adapters={"grouped": spec(8)})], info=info)
    reference = peft_of(make("conv")[0], r=8, target_modules=["grouped"])
    shapes = {name: tuple(value.shape) for name, value in stack.slice_state(0).items()}
    assert shapes == {
        f"grouped.{part}": tuple(reference.get_parameter(f"base_model.model.grouped.{part}.default.weight").shape)
        for part in ("lora_A", "lora_B")
    }
