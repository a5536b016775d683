"""The probe refuses bases whose slices see each other, names the layer, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from fixtures.bases import BASES, LABELS, bert, conv, losses, plan, repeat, spec, token_batch
from lorabench.adapters import SlicesMix, check_slices_independent, inject
from lorabench.config.contracts.method import SlicePlan
from lorabench.models.inventory import inventory

ENDS = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc", "wte"], "llama": ["q_proj", "up_proj"]}


def probed(model, info, ends, batch, *, ranks=(2, 4, 1), **more):
    """Probe three slices; batch: all their rows."""
    stack = inject(model, [plan(info, r, ends, seed=k, **more) for k, r in enumerate(ranks)], info=info)
    stack.context.set(seeds=list(range(len(ranks))), step=0, examples=torch.arange(len(batch["label"])))
    check_slices_independent(model, stack, lambda: losses(model, batch))
    return stack


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_bases_that_keep_slices_apart(kind, dropout):
    model, info = BASES[kind](dropout=dropout)
    probed(model, info, ENDS[kind], token_batch(6, 5), dropout=dropout)


def test_a_frozen_batch_norm_is_fine():
    model, info = conv()
    batch = {"pixels": torch.randn(6, 3, 8, 8), "label": torch.tensor([0, 1] * 3)}
    probed(model, info, ["stem", "point"], batch)


def test_everything_is_as_it_was():
    model, info = bert(dropout=0.1)
    model.train()
    model.bert.pooler.eval()
    stack = inject(model, [plan(info, r, ["query"], seed=r) for r in (2, 4)], info=info)
    stack.context.set(seeds=[0, 1], step=0, examples=torch.arange(2).repeat(2))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    random = torch.get_rng_state()
    check_slices_independent(model, stack, lambda: losses(model, repeat(token_batch(2, 5), 2)))
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.grad is None for p in model.parameters())
    assert model.training and not model.bert.pooler.training and torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


class Recurrent(nn.Module):
    """[N, T] token ids -> logits; `mix` says what goes wrong between the layers."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.mix = mix
        self.embed = nn.Embedding(61, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)
        self.head = nn.Linear(16, LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None):
        x = self.embed(input_ids)
        if self.mix == "time-major":
            x = torch.tanh(self.first(x.transpose(0, 1))).transpose(0, 1)
        else:
            x = torch.tanh(self.first(x))
        if self.mix == "batch statistics":
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        if self.mix == "routing":
            x = self.route(x)
        if self.mix == "scan over rows":
            x = x.cumsum(0)
        if self.mix == "reversed scan":
            x = x.flip(0).cumsum(0).flip(0)
        logits = self.head(torch.tanh(self.second(x)).mean(1))
        return type("Output", (), {"logits": logits})

    def route(self, x: Tensor) -> Tensor:
        """Tokens go through the second layer, an expert, where their first feature says so."""
        flat = x.flatten(0, 1)
        chosen = flat[:, 0] > 0
        out = flat.clone()
        out[chosen] = self.second(flat[chosen])
        return out.view_as(x)


@pytest.mark.parametrize(
    ("mix", "layer"),
    [
        ("time-major", "first"),
        ("batch statistics", "norm"),
        ("routing", "second"),
        ("scan over rows", "second"),
        ("reversed scan", "first"),  # seen by the slices before the poisoned one: none; their gradients tell
    ],
)
def test_what_mixes_is_named(mix, layer):
    torch.manual_seed(0)
    model = Recurrent(mix)
    with pytest.raises(SlicesMix) as caught:
        probed(model, inventory(model, head=("head",)), ["first", "second"], token_batch(6, 9))
    assert caught.value.layer == layer


def test_the_same_layers_without_mixing_pass():
    model = Recurrent("nothing")
    probed(model, inventory(model, head=("head",)), ["first", "second", "embed"], token_batch(6, 9))


def test_position_embeddings_have_no_batch_axis():
    model, info = bert()
    with pytest.raises(SlicesMix, match=r"bert\.embeddings\.position_embeddings"):
        probed(model, info, ["position_embeddings"], token_batch(6, 6))


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32, experts_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    return model, inventory(model, output=("lm_head",))


def test_a_mixture_of_experts_may_pack_adapters_outside_its_experts():
    """Each token finds its way back to its row, so the probe lets it pass; packed equals solo says it is right to."""
    model, info = mixtral()
    model.double()
    batch = token_batch(6, 8)
    stack = probed(model, info, ["q_proj"], batch)
    packed = losses(model, batch)
    stack.remove()
    solo = inject(model, [plan(info, 4, ["q_proj"], seed=1)], info=info)
    own = {key: value[2:4] for key, value in batch.items()}
    torch.testing.assert_close(losses(model, own), packed[2:4], rtol=0, atol=1e-10)
    solo.remove()


def test_adapters_inside_experts_are_refused():
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    info = inventory(model, output=("lm_head",))
    names = [x.name for x in info.layers if "expert_" in x.name and x.kind == "Linear"]
    assert names
    batch = token_batch(6, 8)

    def forward():
        ids = batch["input_ids"]
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").sum(1)

    stack = inject(
        model, [SlicePlan(seed=k, adapters={n: spec(r) for n in names}) for k, r in enumerate((2, 4, 1))], info=info
    )
    stack.context.set(seeds=[0, 1, 2], step=0, examples=torch.arange(6))
    with pytest.raises(SlicesMix, match="expert"):
        check_slices_independent(model, stack, forward)


def test_one_slice_needs_no_probe():
    model = Recurrent("batch statistics")
    stack = probed(model, inventory(model, head=("head",)), ["first"], token_batch(2, 6), ranks=(2,))
    assert stack.size == 1
