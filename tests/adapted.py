"""Small bases held in memory, and random slices for them: what the tests of adapter files, merging and banks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from lorabench.methods.plan import AdapterSpec, SlicePlan
from lorabench.models.base import BaseInfo, inventory

VOCAB, HIDDEN = 64, 32
IDS = torch.tensor([[2, 5, 9, 11, 3, 7], [2, 8, 8, 40, 21, 3], [4, 1, 60, 33, 2, 9]])


class ConvNet(nn.Module):
    """Dense, strided, 1x1 and grouped convolutions, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.point = nn.Conv2d(12, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem, self.down, self.point, self.grouped):
            x = torch.tanh(conv(x))
        return self.head(x.mean((2, 3)))


def base(kind: str) -> nn.Module:
    """bert (3 labels), gpt2, llama, gpt2-seq (3 labels) or conv; the same weights each time, frozen, in eval mode."""
    torch.manual_seed(11)
    off = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "bert":
        model: Any = tf.BertForSequenceClassification(tf.BertConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=32, num_labels=3, initializer_range=0.2))  # fmt: skip
    elif kind.startswith("gpt2"):
        config = tf.GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=32, num_labels=3, **off
        )
        model = tf.GPT2ForSequenceClassification(config) if kind == "gpt2-seq" else tf.GPT2LMHeadModel(config)
    elif kind == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=32, initializer_range=0.2, **off))  # fmt: skip
    else:
        model = ConvNet()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """What a base says to a fixed batch of three."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, ConvNet):
        images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        return model(images.to(inner.head.weight.dtype)).double()
    return model(input_ids=IDS).logits.double()


def make_plan(
    info: BaseInfo,
    ends: Sequence[str],
    *,
    r: int = 4,
    alpha: float = 8.0,
    modules: Sequence[str] = (),
    rslora: bool = False,
) -> SlicePlan:
    """Adapters of one rank and alpha on the layers whose name ends with one of `ends`."""
    names = [layer.name for layer in info.layers if any(f".{layer.name}".endswith(f".{end}") for end in ends)]
    assert names
    scaling = alpha / math.sqrt(r) if rslora else alpha / r
    return SlicePlan(
        seed=0, adapters={n: AdapterSpec(r=r, scaling=scaling, alpha=alpha) for n in names}, modules=tuple(modules)
    )


def random_state(model: nn.Module, plan: SlicePlan, seed: int = 0) -> dict[str, Tensor]:
    """What a trained slice might hold: every factor non-zero, whole modules moved."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    layers = inventory(model).by_name
    for name, spec in plan.adapters.items():
        layer, module = layers[name], model.get_submodule(name)
        a, b = (spec.r, layer.in_features), (layer.out_features, spec.r)
        if isinstance(module, nn.Conv2d):
            a, b = (*a, *module.kernel_size), (layer.out_features, spec.r // module.groups, 1, 1)  # type: ignore[assignment]
        state[f"{name}.lora_A"] = torch.randn(a, generator=g) * 0.2
        state[f"{name}.lora_B"] = torch.randn(b, generator=g) * 0.2
    for module_name in plan.modules:
        for key, p in model.get_submodule(module_name).named_parameters():
            state[f"{module_name}.{key}"] = p.detach() + torch.randn(p.shape, generator=g) * 0.2
    for name in plan.biases:
        bias = model.get_parameter(f"{name}.bias")
        state[f"{name}.bias"] = bias.detach() + torch.randn(bias.shape, generator=g) * 0.2
    return state


def head_of(kind: str) -> tuple[str, ...]:
    return {"bert": ("classifier",), "gpt2-seq": ("score",)}.get(kind, ())


def info_of(model: nn.Module, kind: str = "") -> BaseInfo:
    return inventory(model, head=head_of(kind))
