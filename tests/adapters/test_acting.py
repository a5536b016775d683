"""An adapter that changes nothing, or stands for a layer it cannot stand for, is named; one that acts passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM, MambaConfig, MambaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperForCausalLM

from fixtures.bases import BASES, LABELS, bert, conv, losses, plan, token_batch
from lorabench.adapters import IdleAdapters, check_adapters_act, inject
from lorabench.config.contracts.method import AdapterSpec, SlicePlan
from lorabench.models.inventory import inventory


def check(model, info, ends, batch, *, ranks=(2,), **more):
    stack = inject(model, [plan(info, r, ends, seed=k, **more) for k, r in enumerate(ranks)], info=info)
    try:
        stack.context.set(seeds=list(range(len(ranks))), step=0, examples=torch.arange(len(batch["label"])))
        check_adapters_act(model, stack, [lambda: losses(model, batch)])
    finally:
        stack.remove()


def refused(*args, **more) -> IdleAdapters:
    with pytest.raises(IdleAdapters) as caught:
        check(*args, **more)
    return caught.value


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("ends", [["query", "dense"]])
def test_starts_of_which_each_tensor_or_one_moves(init, ends):
    model, info = bert(dropout=0.1)
    check(model, info, ends, token_batch(4, 5), ranks=(2, 4), init=init)


@pytest.mark.parametrize("kind", ["dora", "vera", "ia3", "ia3_input"])
def test_every_kind_of_adapter(kind):
    model, info = bert()
    layers = [x for x in info.layers if x.name.endswith("query")]
    spec = AdapterSpec(r=4, scaling=1.0, alpha=4.0, kind=kind, projection=(0, 32, 32))
    stack = inject(model, [SlicePlan(seed=0, adapters={x.name: spec for x in layers})], info=info)
    stack.context.set(seeds=[0], step=0, examples=torch.arange(4))
    check_adapters_act(model, stack, [lambda: losses(model, token_batch(4, 5))])


@pytest.mark.parametrize(("kind", "ends"), [("gpt2", ["c_attn", "wte"]), ("llama", ["q_proj", "up_proj"])])
def test_decoders_and_embeddings(kind, ends):
    model, info = BASES[kind]()
    check(model, info, ends, token_batch(4, 5))


def test_convolutions():
    model, info = conv()
    check(model, info, ["stem", "point"], {"pixels": torch.randn(4, 3, 8, 8), "label": torch.tensor([0, 1, 0, 1])})


def test_mamba_reads_a_weight_and_calls_no_layer():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()
    found = refused(model, inventory(model), ["dt_proj", "in_proj"], token_batch(2, 6))
    assert found.idle == ["backbone.layers.0.mixer.dt_proj"] and not found.bypassed
    assert found.acting == ["backbone.layers.0.mixer.in_proj"]


def test_whispers_cross_attention_is_unused_without_an_encoder():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=61, d_model=16, decoder_layers=1, decoder_attention_heads=2, encoder_layers=1, decoder_ffn_dim=16,
        encoder_attention_heads=2, encoder_ffn_dim=16, max_target_positions=16, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    model = WhisperForCausalLM(config).eval()
    found = refused(model, inventory(model), ["q_proj", "fc1"], token_batch(2, 6))
    assert found.idle == ["model.decoder.layers.0.encoder_attn.q_proj"]


class Rounded(nn.Linear):
    """As BitNet: the product is of the signs of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.sign(), self.bias)


class Router(nn.Linear):
    """As Llama 4's: gives weights and logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Odd(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.plain, self.odd = nn.Embedding(61, 16), nn.Linear(16, 16), layer
        self.head = nn.Linear(16, LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None):
        y = self.odd(torch.tanh(self.plain(self.embed(input_ids))))
        if isinstance(self.odd, Router):
            weights, logits = y
            y = weights * logits
        return type("Output", (), {"logits": self.head(y.mean(1))})


@pytest.mark.parametrize("layer", [Rounded, Router])
def test_a_linear_with_a_forward_of_its_own(layer):
    torch.manual_seed(0)
    model = Odd(layer(16, 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = refused(model, inventory(model), ["plain", "odd"], token_batch(2, 6))
    assert found.bypassed == ["odd"] and found.acting == ["plain"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_forward_of_its_own_that_is_the_plain_product_passes():
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = FalconForCausalLM(config).eval()
    check(model, inventory(model, output=("lm_head",)), ["query_key_value", "dense"], token_batch(2, 6))


class Padded(nn.Conv2d):
    """As EfficientNet's "same" convolutions: it pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def test_a_convolution_with_a_forward_of_its_own_is_no_plain_one():
    layers = inventory(nn.Sequential(Padded(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3))).layers
    assert [x.kind for x in layers] == ["Padded", "Conv2d"]


class Experts(nn.Module):
    """Tokens go to the first of two experts."""

    def __init__(self, chosen: bool) -> None:
        super().__init__()
        self.embed, self.head, self.chosen = nn.Embedding(61, 16), nn.Linear(16, LABELS), chosen
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None):
        x = self.embed(input_ids)
        x = self.experts[0](x) if self.chosen else x
        return type("Output", (), {"logits": self.head(x.mean(1))})


def test_experts_that_no_token_reached_are_not_idle_while_another_acts():
    model = Experts(chosen=True)
    check(model, inventory(model), ["0", "1"], token_batch(2, 6))
    model = Experts(chosen=False)
    assert len(refused(model, inventory(model), ["0", "1"], token_batch(2, 6)).idle) == 2
