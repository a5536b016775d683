"""Stacked layers, inject and the stack's handle: a slice is what it would be alone, and the base is never touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fixtures.bases import BASES, bert, conv, gpt2, gradients, losses, plan, repeat, shake, spec, token_batch
from lorabench.adapters import SlicesMix, inject
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import BaseInfo, LayerInfo
from lorabench.config.errors import ConfigError
from lorabench.models.inventory import inventory

MIXED = {
    "bert": [(2, ["query", "value"]), (0, []), (5, ["query", "dense", "word_embeddings"]), (3, ["intermediate.dense"])],
    "gpt2": [(2, ["c_attn"]), (1, ["wte", "c_fc"]), (5, ["c_attn", "c_proj", "wte"])],
    "llama": [(2, ["q_proj", "v_proj"]), (4, ["gate_proj", "embed_tokens"]), (5, ["o_proj", "q_proj"])],
}


def mixed_plans(kind: str, info: BaseInfo) -> list[SlicePlan]:
    return [plan(info, r, ends, seed=k % 2) for k, (r, ends) in enumerate(MIXED[kind])]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


def one_step(model, info, plans, batch):
    """Losses [K, B] and each slice's gradients at shaken weights (shaken by the slice's seed, not its place)."""
    stack = inject(model, plans, info=info)
    for k, p in enumerate(plans):
        generator = torch.Generator().manual_seed(p.seed)
        state = stack.slice_state(k)
        noise = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in sorted(state.items())}
        stack.load_slice(k, {n: v + 0.3 * noise[n] for n, v in state.items()})
    found = losses(model, repeat(batch, len(plans)))
    found.sum().backward()
    grads = [gradients(stack, k) for k in range(len(plans))]
    stack.remove()
    return found.detach().view(len(plans), -1), grads


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_packed_gradients_equal_solo(kind):
    model, info = BASES[kind]()
    model.double()
    plans, batch = mixed_plans(kind, info), token_batch(3, 7)
    packed, packed_grads = one_step(model, info, plans, batch)
    for k, p in enumerate(plans):
        solo, (solo_grads,) = one_step(model, info, [p], batch)
        torch.testing.assert_close(packed[k], solo[0], rtol=0, atol=1e-10)
        assert packed_grads[k].keys() == solo_grads.keys()
        for name in solo_grads:
            torch.testing.assert_close(packed_grads[k][name], solo_grads[name], rtol=0, atol=1e-10)


def test_packed_convolutions_equal_solo():
    model, info = conv()
    model.double()
    ends = ["stem", "grouped", "dilated", "point"]
    plans = [plan(info, r, ends, seed=k) for k, r in enumerate([4, 0, 8])]
    batch = {"pixels": torch.randn(3, 3, 9, 7, dtype=torch.float64), "label": torch.tensor([0, 1, 2])}
    packed, packed_grads = one_step(model, info, plans, batch)
    for k, p in enumerate(plans):
        solo, (solo_grads,) = one_step(model, info, [p], batch)
        torch.testing.assert_close(packed[k], solo[0], rtol=0, atol=1e-10)
        for name in solo_grads:
            torch.testing.assert_close(packed_grads[k][name], solo_grads[name], rtol=0, atol=1e-10)


def test_initial_adapters_depend_on_seed_and_layer_alone():
    def starts(plans):
        model, info = bert()
        stack = inject(model, [plan(info, r, ["query"], seed=s) for r, s in plans], info=info)
        return [stack.slice_state(k) for k in range(len(plans))]

    packed = starts([(4, 7), (16, 1), (2, 3)])
    (alone,) = starts([(4, 7)])
    assert_same(packed[0], alone)
    layers = [v for n, v in alone.items() if n.endswith("lora_A")]
    assert not torch.equal(layers[0], layers[1])
    (other,) = starts([(4, 8)])
    assert all(not torch.equal(other[n], v) for n, v in alone.items() if "lora_B" not in n and "bias" not in n)


def test_starting_distributions():
    model, info = bert()
    big = [plan(info, 24, ["query"], seed=s, init=init) for s, init in enumerate(["kaiming", "gaussian", "orthogonal"])]
    stack = inject(model, big, info=info)
    kaiming, gaussian, orthogonal = (
        torch.cat([v for n, v in sorted(stack.slice_state(k).items()) if n.endswith("lora_A")]) for k in range(3)
    )
    assert kaiming.abs().max() <= 32**-0.5 and abs(float(kaiming.std()) - (3 * 32) ** -0.5) < 0.01
    assert abs(float(gaussian.std()) - 1 / 24) < 0.005
    assert float(orthogonal.std()) > 0
    for n, b in stack.slice_state(2).items():
        if n.endswith("lora_B"):
            assert b.abs().max() > 0 and (b @ stack.slice_state(2)[n.replace("_B", "_A")]).abs().max() < 1e-5
    assert all(not v.any() for k in (0, 1) for n, v in stack.slice_state(k).items() if n.endswith("lora_B"))


def test_embedding_starts_as_in_peft():
    model, info = gpt2()
    stack = inject(model, [plan(info, 4, ["wte"])], info=info)
    state = stack.slice_state(0)
    assert not state["transformer.wte.lora_A"].any() and abs(float(state["transformer.wte.lora_B"].std()) - 1) < 0.2


def test_a_new_head_is_drawn_from_the_seed_as_transformers_would():
    def head(seed, global_seed):
        model, info = bert(initializer_range=0.5)
        torch.manual_seed(global_seed)
        stack = inject(model, [plan(info, 2, ["query"], seed=seed), plan(info, 2, ["query"], seed=99)], info=info)
        return stack.slice_state(0)["classifier.weight"], stack.slice_state(0)["classifier.bias"]

    weight, bias = head(3, 0)
    assert torch.equal(weight, head(3, 5)[0]) and not torch.equal(weight, head(4, 0)[0])
    assert not bias.any() and 0.3 < float(weight.std()) < 0.7  # N(0, initializer_range), not torch's uniform


def test_full_fine_tuning_draws_its_head_like_everybody():
    model, info = bert()
    lora = inject(model, [plan(info, 2, ["query"], seed=3)], info=info)
    expected = lora.slice_state(0)["classifier.weight"].clone()
    lora.remove()
    full = inject(model, [SlicePlan(seed=3, full=True)], info=info)
    assert torch.equal(full.slice_state(0)["classifier.weight"], expected)
    assert all(p.requires_grad for p in model.parameters())
    assert sum(t.parameter.numel() for t in full.named_trainables()) == SlicePlan(seed=3, full=True).trainable(info)


def train(model, stack, batch, steps=3, lr=0.05):
    parameters = [t.parameter for t in stack.named_trainables()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model, batch).sum().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_frozen_means_frozen_and_unused_rows_stay_zero(kind):
    model, info = BASES[kind]()
    before = snapshot(model)
    stack = inject(model, mixed_plans(kind, info), info=info)
    train(model, stack, repeat(token_batch(2, 6), stack.size))
    trainable = {id(t.parameter) for t in stack.named_trainables()}
    assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in trainable)
    for layer in stack.layers:
        for k, r in enumerate(getattr(layer, "ranks", ())):
            assert not layer.lora_A[k, r:].any() and not layer.lora_B[k, :, r:].any()
    stack.remove()
    assert_same(before, snapshot(model))


def test_remove_is_exact_for_every_kind_of_training():
    for make in (
        lambda info: [plan(info, 3, ["query", "dense"])],
        lambda info: [SlicePlan(seed=0, full=True)],
        lambda info: [SlicePlan(seed=0, modules=info.head, biases=("bert.embeddings.LayerNorm", "bert.pooler.dense"))],
    ):
        model, info = bert(dropout=0.1)
        model.train()
        before, structure = snapshot(model), repr(model)
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        attention = model.config._attn_implementation
        stack = inject(model, make(info), info=info)
        stack.context.set(seeds=[0], step=0, examples=torch.arange(4))
        train(model, stack, token_batch(4, 6))
        stack.remove()
        assert_same(before, snapshot(model))
        assert repr(model) == structure and model.config._attn_implementation == attention
        assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
        assert all(p.grad is None for p in model.parameters())
        assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_nan_in_one_slice_leaves_its_neighbours_bit_identical():
    model, info = bert()
    stack = inject(model, mixed_plans("bert", info), info=info)
    batch = repeat(token_batch(2, 6), 4)

    def step():
        model.zero_grad()
        found = losses(model, batch)
        found.sum().backward()
        return found.detach().view(4, -1), [gradients(stack, k) for k in range(4)]

    clean, clean_grads = step()
    for t in stack.named_trainables():
        t.parameter.data[2] = torch.nan
    poisoned, poisoned_grads = step()
    assert poisoned[2].isnan().all()
    for k in (0, 1, 3):
        assert torch.equal(clean[k], poisoned[k])
        assert_same(clean_grads[k], poisoned_grads[k])


def test_trainable_counts_are_exact():
    model, info = bert()
    plans = mixed_plans("bert", info)
    stack = inject(model, plans, info=info)
    for k, p in enumerate(plans):
        assert sum(v.numel() for v in stack.slice_state(k).values()) == p.trainable(info)


def test_the_readmes_example_counts_65536():
    layer = LayerInfo("layer", "Linear", 4096, 4096, weight_numel=4096**2)
    assert spec(8).trainable(layer) == 65_536 == 8 * (4096 + 4096)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta"))
    p = SlicePlan(seed=0, adapters={"0": spec(8)})
    assert p.trainable(inventory(model)) == 65_536


def test_slice_state_round_trip_and_its_errors():
    model, info = bert()
    stack = inject(model, mixed_plans("bert", info), info=info)
    shake(stack)
    kept = [{n: v.clone() for n, v in stack.slice_state(k).items()} for k in range(4)]
    shake(stack)
    for k in range(4):
        stack.load_slice(k, kept[k])
        assert_same(kept[k], stack.slice_state(k))
    with pytest.raises(ValueError, match=r"slice 0 does not fit .*query\.lora_A"):
        stack.load_slice(0, {n: v for n, v in kept[0].items() if "query.lora_A" not in n})
    with pytest.raises(ValueError, match="does not fit"):
        stack.load_slice(0, {n: v[:1] for n, v in kept[0].items()})


def test_active_chooses_slices_and_none_is_the_plain_base():
    model, info = gpt2()
    batch = token_batch(2, 6)
    plain = losses(model, batch)
    stack = inject(model, mixed_plans("gpt2", info), info=info)
    shake(stack)
    together = losses(model, repeat(batch, 3)).view(3, -1)
    with stack.active([2]):
        torch.testing.assert_close(losses(model, batch), together[2], rtol=0, atol=1e-5)
    with stack.active([2, 0]):
        torch.testing.assert_close(losses(model, repeat(batch, 2)).view(2, -1), together[[2, 0]], rtol=0, atol=1e-5)
    with stack.active([]):
        assert torch.equal(losses(model, batch), plain)
    torch.testing.assert_close(losses(model, repeat(batch, 3)).view(3, -1), together)


def test_stacked_biases_equal_a_base_with_those_biases():
    names = ("bert.embeddings.LayerNorm", "bert.encoder.layer.0.attention.self.query", "bert.pooler.dense")
    model, info = bert()
    model.double()
    reference = copy.deepcopy(model)
    stack = inject(model, [SlicePlan(seed=k, modules=info.head, biases=names) for k in range(2)], info=info)
    shake(stack)
    batch = token_batch(3, 6)
    found = losses(model, repeat(batch, 2)).view(2, -1)
    for k in range(2):
        with torch.no_grad():
            for name, value in stack.slice_state(k).items():
                reference.get_parameter(name).copy_(value)
        torch.testing.assert_close(found[k], losses(reference, batch), rtol=0, atol=1e-10)


def test_stacked_biases_of_channels_first_layers():
    model, info = conv()
    model.double()
    reference = copy.deepcopy(model)
    plans = [SlicePlan(seed=k, modules=info.head, biases=("stem", "norm", "grouped")) for k in range(2)]
    stack = inject(model, plans, info=info)
    shake(stack)
    batch = {"pixels": torch.randn(2, 3, 8, 8, dtype=torch.float64), "label": torch.tensor([0, 1])}
    found = losses(model, repeat(batch, 2)).view(2, -1)
    with torch.no_grad():
        for name, value in stack.slice_state(1).items():
            reference.get_parameter(name).copy_(value)
    torch.testing.assert_close(found[1], losses(reference, batch), rtol=0, atol=1e-10)


def test_a_layer_may_carry_an_adapter_and_a_bias():
    model, info = bert()
    query = "bert.encoder.layer.0.attention.self.query"
    stack = inject(model, [SlicePlan(seed=0, adapters={query: spec(2)}, modules=info.head, biases=(query,))], info=info)
    losses(model, token_batch(2, 5)).sum().backward()
    names = {t.name for t in stack.named_trainables() if t.parameter.grad is not None}
    assert {f"{query}.lora_A", f"{query}.lora_B", f"{query}.bias"} <= names


def test_a_pretrained_module_that_trains_whole_starts_as_it_is():
    model, info = bert()
    weight = model.bert.pooler.dense.weight.clone()
    batch = token_batch(2, 5)
    stack = inject(model, [SlicePlan(seed=k, modules=("bert.pooler",)) for k in range(2)], info=info)
    assert torch.equal(stack.slice_state(1)["bert.pooler.dense.weight"], weight)
    with stack.active([]):
        plain = losses(model, batch)
    torch.testing.assert_close(losses(model, repeat(batch, 2)), torch.cat([plain, plain]))


def test_frozen_batch_norm_keeps_its_statistics_in_training_mode():
    model, info = conv()
    before = snapshot(model)
    stack = inject(model, [plan(info, 4, ["stem"]), plan(info, 2, ["stem"])], info=info)
    model.train()
    batch = {"pixels": torch.randn(4, 3, 8, 8), "label": torch.tensor([0, 1, 2, 0])}
    losses(model, batch).sum().backward()
    stack.remove()
    assert_same(before, snapshot(model))


def test_a_layer_without_a_batch_axis_is_refused_by_name():
    model, info = bert()
    inject(model, [plan(info, 2, ["position_embeddings"]) for _ in range(2)], info=info)
    with pytest.raises(SlicesMix, match=r"bert\.embeddings\.position_embeddings"):
        losses(model, token_batch(4, 5))


def test_a_bf16_base_keeps_its_weights_and_trains_float32_adapters():
    model, info = bert()
    model.bfloat16()
    before = snapshot(model)
    stack = inject(model, mixed_plans("bert", info), info=info)
    assert all(t.parameter.dtype == torch.float32 for t in stack.named_trainables())
    train(model, stack, repeat(token_batch(2, 6), 4))
    assert all(bool(t.parameter.isfinite().all()) for t in stack.named_trainables())
    stack.remove()
    assert_same(before, snapshot(model))


def test_gradient_checkpointing_gives_the_same_gradients():
    def grads(checkpoint):
        model, info = bert(dropout=0.1)
        stack = inject(model, [plan(info, r, ["query", "dense"], seed=r, dropout=0.2) for r in (2, 4)], info=info)
        stack.context.set(seeds=[0, 1], step=3, examples=torch.arange(4).repeat(2))
        if checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        losses(model, repeat(token_batch(4, 6), 2)).sum().backward()
        return [gradients(stack, k) for k in range(2)]

    for plain, checkpointed in zip(grads(False), grads(True), strict=True):
        assert_same(plain, checkpointed)


def test_stacked_modules_are_modules():
    """state_dict, device and dtype moves see them; models still read their layers' attributes."""
    model, info = bert()
    stack = inject(model, [plan(info, 2, ["query"])], info=info)
    query = model.bert.encoder.layer[0].attention.self.query
    assert query.in_features == 32 and query.weight is query.base.weight
    assert "bert.encoder.layer.0.attention.self.query.lora_A" in model.state_dict()
    kept = copy.deepcopy(model.state_dict())
    shake(stack)
    model.load_state_dict(kept)
    assert not query.lora_B.any()
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = query.nothing_of_the_kind


@pytest.mark.parametrize(
    "plans", [[SlicePlan(seed=0, full=True)] * 2, [SlicePlan(seed=0, modules=("classifier",)), SlicePlan(seed=0)], []]
)
def test_packs_that_cannot_be(plans):
    model, info = bert()
    with pytest.raises(AssertionError):
        inject(model, plans, info=info)


@pytest.mark.parametrize("own", ["lora", "full"])
def test_a_base_that_is_refused_is_as_it_was(own):
    """It is kept for the next pack, which must not find half of this one on it."""
    model, info = bert()
    before, parts = snapshot(model), [(name, type(m)) for name, m in model.named_modules()]
    model.layerdrop = 0.1  # found after all is wrapped
    with pytest.raises(ConfigError, match="cannot be keyed"):
        inject(model, [plan(info, 2, ["query"]) if own == "lora" else SlicePlan(seed=3, full=True)], info=info)
    assert [(name, type(m)) for name, m in model.named_modules()] == parts
    assert_same(before, snapshot(model))
    assert len({p.requires_grad for p in model.parameters()}) == 1


def test_inventory_names_kinds_and_counts_tied_weights_once():
    model, info = gpt2()
    kinds = {x.name: x.kind for x in info.layers}
    assert kinds["transformer.h.0.attn.c_attn"] == "Conv1D" and kinds["transformer.wte"] == "Embedding"
    c_attn = info.by_name["transformer.h.0.attn.c_attn"]
    assert (c_attn.in_features, c_attn.out_features, c_attn.bias_numel) == (32, 96, 96)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.parameters == sum(x.weight_numel + x.bias_numel for x in info.layers) - model.lm_head.weight.numel()
    assert (info.hidden_size, info.num_layers) == (32, 2)
    encoder = nn.TransformerEncoderLayer(8, 2)
    assert inventory(encoder).by_name["self_attn.out_proj"].kind == "NonDynamicallyQuantizableLinear"
