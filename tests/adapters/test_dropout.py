"""Keyed dropout: a mask depends on (seed, step, layer, example, position, feature) and on nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, WhisperConfig, WhisperModel

from fixtures.bases import BASES, bert, losses, plan, token_batch
from lorabench.adapters import Context, SlicesMix, inject
from lorabench.adapters.dropout import keyed_dropout
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.errors import ConfigError
from lorabench.models.inventory import inventory


def context(seeds=(0,), examples=(1, 2, 3), step=0) -> Context:
    made = Context(len(seeds))
    made.set(seeds=list(seeds), step=step, examples=torch.tensor(examples).repeat(len(seeds)))
    return made


def masks(*shape, p=0.3, layer="layer", **keys):
    return keyed_dropout(torch.ones(shape), p, context(**keys), layer) != 0


def test_the_mean_and_the_scale():
    x = keyed_dropout(torch.ones(3, 200, 500), 0.1, context(), "layer")
    kept = (x != 0).double().mean()
    assert abs(float(kept) - 0.9) < 0.002  # 4 standard errors of 300,000 draws
    assert torch.equal(x[x != 0].unique(), torch.tensor([1 / 0.9]))


def test_draws_are_independent_over_every_axis():
    """No pair of rows, positions or neighbouring features agrees more often than chance."""
    keep = masks(3, 400, 400, p=0.5).double() - 0.5
    flat = [
        (keep[0] * keep[1]).mean(), (keep[:, 1:] * keep[:, :-1]).mean(), (keep[..., 1:] * keep[..., :-1]).mean(),
        (keep[..., 2:] * keep[..., :-2]).mean(), (keep[:, 1:, 1:] * keep[:, :-1, :-1]).mean(),
    ]  # fmt: skip
    assert max(abs(float(x)) for x in flat) < 0.25 * 5 / 400  # five standard errors of 160,000 products of ±1/2
    assert abs(float(keep.mean((0, 1)).std()) - 0.5 / 1200**0.5) < 0.003  # by feature: binomial spread, no stripes
    assert abs(float(keep.mean((0, 2)).std()) - 0.5 / 1200**0.5) < 0.003


@pytest.mark.parametrize(
    "other",
    [
        {"seeds": (1,)},
        {"step": 1},
        {"layer": "other"},
        {"examples": (4, 5, 6)},
        {"examples": (1 + 2**32, 2 + 2**32, 3 + 2**32)},
    ],
    ids=str,
)
def test_every_key_matters(other):
    assert 0.4 < float((masks(3, 50, 50) == masks(3, 50, 50, **other)).double().mean()) < 0.7  # chance: .58


def test_padding_pack_mates_and_order_do_not():
    long, short = masks(3, 9, 8), masks(3, 5, 8)
    assert torch.equal(long[:, :5], short)
    packed = masks(6, 9, 8, seeds=(7, 0))
    assert torch.equal(packed[3:], long) and not torch.equal(packed[:3], long)
    assert torch.equal(masks(3, 9, 8, examples=(3, 1, 2))[[1, 2, 0]], long)
    assert torch.equal(masks(1, 9, 8, examples=(2,))[0], long[1])


def test_attention_probabilities_are_keyed_by_head_query_and_key():
    large = masks(3, 4, 9, 9)
    assert torch.equal(large[:, :, :5, :5], masks(3, 4, 5, 5)) and torch.equal(large[:, :, :7, :7], masks(3, 4, 7, 7))


def test_flattened_tokens_are_told_apart():
    flat = masks(3 * 50, 8)
    assert not torch.equal(flat[:50], flat[50:100]) and not torch.equal(flat[0], flat[1])


def test_each_slice_has_its_own_probability():
    x = keyed_dropout(torch.ones(6, 100, 100), [0.0, 0.5], context(seeds=(0, 0)), "layer")
    assert bool((x[:3] == 1).all()) and abs(float((x[3:] != 0).double().mean()) - 0.5) < 0.02


def test_rows_that_are_not_examples():
    alone = keyed_dropout(torch.ones(5, 7, 8), 0.5, context(), "layer")  # time-major: a lone run may
    assert 0 < int((alone == 0).sum()) < alone.numel()
    with pytest.raises(SlicesMix, match="layer"):
        keyed_dropout(torch.ones(5, 7, 8), 0.5, context(seeds=(0, 1)), "layer")


def run(kind, plans_of, batch, *, seeds, step=0, dropout=0.2, examples=None):
    model, info = BASES[kind](dropout=dropout)
    model.double()
    stack = inject(model, plans_of(info), info=info)
    rows = len(batch["input_ids"]) // stack.size
    stack.context.set(
        seeds=seeds, step=step, examples=(torch.arange(rows) if examples is None else examples).repeat(stack.size)
    )
    model.train()
    return losses(model, batch).detach().view(stack.size, -1)


ENDS = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"]}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_models_own_dropout_does_not_see_padding_or_mates(kind):
    def one(info, seed=3):
        return plan(info, 4, ENDS[kind], seed=seed, dropout=0.3)

    batch = token_batch(3, 6)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    padded = {key: nn.functional.pad(value, (0, 4)) if value.dim() > 1 else value for key, value in batch.items()}
    both = {key: torch.cat([value] * 2) for key, value in padded.items()}
    solo = run(kind, lambda info: [one(info)], batch, seeds=[3])
    # Llama takes its softmax and norms in float32 whatever its type: how wide the padding is may move their last bits.
    atol = 1e-7 if kind == "llama" else 1e-10
    torch.testing.assert_close(run(kind, lambda info: [one(info)], padded, seeds=[3]), solo, rtol=0, atol=atol)
    packed = run(kind, lambda info: [plan(info, 2, ENDS[kind], seed=5), one(info)], both, seeds=[5, 3])
    torch.testing.assert_close(packed[1], solo[0], rtol=0, atol=atol)
    turned = {key: value.flip(0) for key, value in batch.items()}
    flipped = run(kind, lambda info: [one(info)], turned, seeds=[3], examples=torch.tensor([2, 1, 0]))
    torch.testing.assert_close(flipped[0].flip(0), solo[0], rtol=0, atol=1e-10)
    assert not torch.allclose(run(kind, lambda info: [one(info)], batch, seeds=[3], step=1), solo)


def test_evaluation_draws_nothing_and_needs_no_keys():
    model, info = bert(dropout=0.5)
    expected = losses(model, token_batch(2, 5))
    stack = inject(model, [plan(info, 0, [], modules=("bert.pooler",))], info=info)
    torch.testing.assert_close(losses(model.eval(), token_batch(2, 5)), expected)
    model.train()
    with pytest.raises(AssertionError, match="context.set"):
        losses(model, token_batch(2, 5))
    stack.remove()


def test_in_evaluation_a_model_runs_as_it_is(monkeypatch):
    """Looking at each of its calls is for masks: it would make an adapter's answers slower."""
    model, info = bert(dropout=0.5)
    inject(model, [plan(info, 2, ENDS["bert"])], info=info)

    def looked(*args):
        raise AssertionError("calls are looked at")

    monkeypatch.setattr("lorabench.adapters.dropout._KeyedCalls", looked)
    losses(model.eval(), token_batch(2, 5))
    with pytest.raises(AssertionError, match="looked at"):
        losses(model.train(), token_batch(2, 5))


def test_dropout_inside_a_head_that_trains_whole():
    class Head(nn.Sequential):
        pass

    def made():
        torch.manual_seed(0)
        model = nn.Module()
        model.head = Head(nn.Linear(8, 50), nn.Dropout(0.5), nn.Linear(50, 2))
        return model, inventory(model, head=("head",))

    x = torch.randn(3, 8)

    def outputs(seeds):
        model, info = made()
        stack = inject(model, [SlicePlan(seed=s, modules=("head",)) for s in seeds], info=info)
        stack.context.set(seeds=seeds, step=0, examples=torch.arange(3).repeat(len(seeds)))
        return model.train().head(torch.cat([x] * len(seeds)))

    torch.testing.assert_close(outputs([1, 2])[3:], outputs([2]))
    assert not torch.equal(outputs([1, 2])[:3], outputs([1, 2])[3:])


def encoder_decoder(kind):
    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 31}
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.2, decoder_start_token_id=0))
    return WhisperModel(
        WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            vocab_size=31,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            dropout=0.2,
            attention_dropout=0.2,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            apply_spec_augment=False,
        )
    )


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_models_that_call_dropout_as_a_function_are_keyed_too(kind):
    model = encoder_decoder(kind)
    stack = inject(model, [SlicePlan(seed=0, full=True)], info=inventory(model))
    ids = torch.arange(1, 13).view(2, 6)
    if kind == "t5":
        inputs = {"input_ids": ids, "decoder_input_ids": ids}
    else:
        inputs = {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": ids}
    model.train()

    def forward(step):
        stack.context.set(seeds=[0], step=step, examples=torch.arange(2))
        return model(**inputs)[0]

    assert torch.equal(forward(0), forward(0)) and not torch.allclose(forward(0), forward(1))


def test_randomness_that_cannot_be_keyed_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, dropout=0.1)
    with pytest.raises(ConfigError, match=r"model\.dropout=0\.1: 0 for this base.*self_attn \(MultiheadAttention\)"):
        inject(model, [SlicePlan(seed=0, full=True)], info=inventory(model))
