"""Small bases made from config, with their layers known, and a loss a row: what adapter tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from lorabench.adapters import Stack
from lorabench.methods.plan import AdapterSpec, SlicePlan
from lorabench.models.base import BaseInfo, inventory

VOCAB, LABELS = 61, 3


def bert(*, dropout: float = 0.0, **more: object) -> tuple[nn.Module, BaseInfo]:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=LABELS,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    model = BertForSequenceClassification(config)
    return model.eval(), inventory(model, head=("classifier",))


def gpt2(*, dropout: float = 0.0) -> tuple[nn.Module, BaseInfo]:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config)
    return model.eval(), inventory(model, output=("lm_head",))


def llama(*, dropout: float = 0.0) -> tuple[nn.Module, BaseInfo]:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attention_dropout=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    return model.eval(), inventory(model, output=("lm_head",))


BASES: dict[str, Callable[..., tuple[nn.Module, BaseInfo]]] = {"bert": bert, "gpt2": gpt2, "llama": llama}


class ConvNet(nn.Module):
    """A base that is neither text nor transformer: plain, grouped, dilated and 1x1 convolutions, batch norm, a head."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm(8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.point = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.norm(self.stem(x)))))
        return self.head(self.point(torch.tanh(self.dilated(x))).mean((2, 3)))


def conv(norm: type[nn.Module] = nn.BatchNorm2d) -> tuple[nn.Module, BaseInfo]:
    torch.manual_seed(1)
    model = ConvNet(norm)
    return model.eval(), inventory(model, head=("head",))


def spec(r: int, **more: object) -> AdapterSpec:
    return AdapterSpec(**{"r": r, "scaling": 16.0 / max(r, 1), "alpha": 16.0, **more})  # type: ignore[arg-type]


def plan(
    info: BaseInfo,
    r: int,
    ends: Sequence[str],
    *,
    seed: int = 0,
    modules: tuple[str, ...] | None = None,
    **more: object,
) -> SlicePlan:
    """An adapter of rank r on the layers whose name ends like one of `ends`; r = 0: on none."""
    names = [x.name for x in info.layers if x.name.endswith(tuple(ends))] if r else []
    adapters = {name: spec(r, **more) for name in names}
    return SlicePlan(seed=seed, adapters=adapters, modules=info.head if modules is None else modules)


def token_batch(rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, tokens), generator=generator)
    return {"input_ids": ids, "label": torch.randint(0, LABELS, (rows,), generator=generator)}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One loss a row, [N]: cross-entropy of the label, or of the next tokens."""
    if "pixels" in batch:
        return F.cross_entropy(model(batch["pixels"]), batch["label"], reduction="none")
    mask = batch.get("attention_mask")
    logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, batch["label"], reduction="none")
    targets = batch["input_ids"][:, 1:]
    found = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return (found * mask[:, 1:]).sum(1) if mask is not None else found.sum(1)


def repeat(batch: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    return {key: torch.cat([value] * times) for key, value in batch.items()}


def shake(stack: Stack, scale: float = 0.3) -> None:
    """Give every slice trained-looking weights, each from its own generator: B is not zero any more."""
    for k in range(stack.size):
        generator = torch.Generator().manual_seed(100 + k)
        state = {
            name: value + scale * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            for name, value in stack.slice_state(k).items()
        }
        stack.load_slice(k, state)


def gradients(stack: Stack, k: int) -> dict[str, Tensor]:
    """Gradients of slice k, cropped like its state: the state is swapped for the gradients and read back."""
    for t in stack.named_trainables():
        assert t.parameter.grad is not None, t.name
        t.parameter.data, t.parameter.grad = t.parameter.grad, t.parameter.data
    found = {name: value.clone() for name, value in stack.slice_state(k).items()}
    for t in stack.named_trainables():
        t.parameter.data, t.parameter.grad = t.parameter.grad, t.parameter.data
    return found
