"""Merged against separate, in every weight type; what rounding costs is stated, and the way back is as good as stated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from fixtures.adapters import base, head_of, info_of, logits, make_plan, random_state
from lorabench.adapters import inject
from lorabench.adapters.merge import merge
from lorabench.analyze.updates import LayerUpdate
from lorabench.config.contracts.method import AdapterSpec, SlicePlan
from lorabench.config.errors import ConfigError

ENDS = {
    "bert": ["query", "value", "word_embeddings", "output.dense"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt2-seq": ["c_attn", "wpe"],
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "conv": ["stem", "down", "point", "head"],
}
UNITS = 24  # half-precision logits lie within this many units in the last place of the largest logit (measured: 16)


def plan_of(kind: str) -> SlicePlan:
    ends = [e for e in ENDS[kind] if e != "wpe"]  # a position table is read without a batch axis
    return make_plan(info_of(base(kind)), ends, modules=head_of(kind))


def separate(kind: str, state: dict[str, Tensor], plan: SlicePlan, dtype: torch.dtype) -> Tensor:
    model = base(kind).to(dtype)
    stack = inject(model, [plan], info=info_of(model, kind))
    stack.load_slice(0, state)
    return logits(model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("kind", ENDS)
def test_merged_answers_as_separate(kind: str, dtype: torch.dtype, bound: float) -> None:
    plan = plan_of(kind)
    state = random_state(base(kind), plan)
    model = base(kind).to(dtype)
    merge(model, state, plan)
    assert all(p.dtype == dtype for p in model.parameters())
    assert (logits(model) - separate(kind, state, plan, dtype)).abs().max() < bound
    assert (logits(base(kind)) - logits(model)).abs().max() > 0.05  # the adapter does something


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ENDS)
def test_in_half_precision_merged_is_as_good_as_separate(kind: str, dtype: torch.dtype) -> None:
    """Against float64 (with the base's own rounding to half precision counted in): at most three times the error of the
    separate adapter, whose rounding is as large, and at most `UNITS` units in the last place."""
    plan = plan_of(kind)
    state = random_state(base(kind), plan)
    exact = separate(kind, state, plan, torch.float64)
    model = base(kind).to(dtype)
    merge(model, state, plan)
    assert all(p.dtype == dtype for p in model.parameters())
    merged_error = float((logits(model) - exact).abs().max())
    assert merged_error <= 3 * float((separate(kind, state, plan, dtype) - exact).abs().max())
    assert merged_error <= UNITS * torch.finfo(dtype).eps / 2 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ENDS)
def test_errors_are_the_ones_stated(kind: str, dtype: torch.dtype) -> None:
    """Against W + scaling * B @ A in float64, written out per kind of layer; and unmerged within its bound."""
    plan = plan_of(kind)
    state = random_state(base(kind), plan)
    model = base(kind).to(dtype)
    before = weights(model)
    done = merge(model, state, plan)
    assert set(done.layers) == set(plan.adapters)
    for name, stated in done.layers.items():
        layer, spec = model.get_submodule(name), plan.adapters[name]
        a, b = state[f"{name}.lora_A"].double(), state[f"{name}.lora_B"].double()
        if isinstance(layer, nn.Conv2d):
            update = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
        else:
            update = b @ a
        if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
            update = update.T
        exact = before[f"{name}.weight"].double() + spec.scaling * update
        error = (layer.weight.double() - exact).abs().max()
        unit = torch.finfo(dtype).eps / 2
        assert stated.max_error == pytest.approx(float(error), rel=1e-6, abs=1e-14)
        assert stated.max_error <= unit * float(exact.abs().max()) * 1.01 + 1e-15
        assert stated.lost <= 200 * unit
    done.unmerge()
    after = weights(model)
    for name, stated in done.layers.items():
        difference = (after[f"{name}.weight"].double() - before[f"{name}.weight"].double()).abs().max()
        assert float(difference) <= stated.unmerge_bound
    others = [k for k in before if k.removesuffix(".weight") not in plan.adapters]
    assert all(torch.equal(before[k], after[k]) for k in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_originals_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    plan = plan_of("bert")
    model = base("bert").to(dtype)
    before = weights(model)
    done = merge(model, random_state(base("bert"), plan), plan, keep=True)
    assert {layer.unmerge_bound for layer in done.layers.values()} == {0.0}
    done.unmerge()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    done.unmerge()  # a second time changes nothing
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_an_update_below_half_a_unit_is_lost_and_said_to_be() -> None:
    plan = make_plan(info_of(base("llama")), ["q_proj"])
    state = {k: t * 1e-2 for k, t in random_state(base("llama"), plan).items()}
    small = merge(base("llama").to(torch.bfloat16), state, plan)
    assert min(layer.lost for layer in small.layers.values()) > 0.5  # most of the update is gone
    assert max(layer.lost for layer in merge(base("llama"), state, plan).layers.values()) < 0.01


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("how", ["adapted", "whole"])
@pytest.mark.parametrize("end", ["transformer.wte", "lm_head"])
def test_merging_into_a_tied_weight_unties_it_and_says_so(tmp_path: Path, end: str, how: str, keep: bool) -> None:
    model = base("gpt2")
    plan = make_plan(info_of(model), [end]) if how == "adapted" else SlicePlan(seed=0, modules=(end,))
    state = random_state(model, plan)
    expected = separate("gpt2", state, plan, torch.float32)
    before = weights(model)
    done = merge(model, state, plan, keep=keep)
    assert len(done.untied) == 1 and "no longer tied" in done.untied[0]
    assert model.lm_head.weight is not model.transformer.wte.weight and not model.config.tie_word_embeddings
    assert (logits(model) - expected).abs().max() < 1e-5
    model.save_pretrained(tmp_path)  # both weights must be in the file, and stay apart when it is read
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(again) - expected).abs().max() < 1e-5
    done.unmerge()
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_both_ends_of_a_tie_adapted() -> None:
    model = base("gpt2")
    plan = make_plan(info_of(model), ["wte", "lm_head"])
    state = random_state(model, plan)
    expected = separate("gpt2", state, plan, torch.float32)
    before = weights(model)
    done = merge(model, state, plan, keep=True)
    assert (logits(model) - expected).abs().max() < 1e-5
    done.unmerge()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_doras_row_of_zeros_stays_one() -> None:
    """As the row of a padding token is, where the output embedding is the input's."""
    model, name = base("llama"), "lm_head"
    model.get_submodule(name).weight.data[3] = 0
    plan = SlicePlan(seed=0, adapters={name: AdapterSpec(r=2, scaling=0.5, alpha=1.0, kind="dora")})
    stack = inject(model, [plan], info=info_of(model))
    layer = stack.layers[0]
    layer.lora_B.data.normal_()[:, 3] = 0  # where its gradient is zero it stays
    expected, state = logits(model), {key: t.clone() for key, t in stack.export_slice(0)[0].items()}
    stack.remove()
    own = {key.removeprefix(f"{name}."): t for key, t in state.items()}
    assert (
        LayerUpdate(plan.adapters[name], own).tuned_weight(model.get_submodule(name).weight.double()).isfinite().all()
    )
    merge(model, state, plan)
    assert (logits(model) - expected).abs().max() < 1e-5


def test_full_fine_tuning_keeps_a_tie() -> None:
    model = base("gpt2")
    state = {name: p + 0.01 for name, p in model.named_parameters()}
    assert merge(model, state, SlicePlan(seed=0, full=True)).untied == ()
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("what", ["head", "biases", "full"])
def test_slices_without_adapters(what: str) -> None:
    model = base("bert")
    layers = info_of(model).layers
    plan = {
        "head": SlicePlan(seed=0, modules=("classifier",)),
        "biases": SlicePlan(
            seed=0,
            modules=("classifier",),
            biases=tuple(x.name for x in layers if x.bias_numel and x.name != "classifier"),
        ),
        "full": SlicePlan(seed=0, full=True),
    }[what]
    if what == "full":
        state = {
            k: t + 0.01 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
            for k, t in model.named_parameters()
        }
    else:
        state = random_state(model, plan)
    before = weights(model)
    done = merge(model, state, plan)
    assert (logits(model) - separate("bert", state, plan, torch.float32)).abs().max() < 1e-5
    done.unmerge()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_slice_of_another_base_changes_nothing() -> None:
    model = base("llama")
    before = weights(model)
    plan = make_plan(info_of(model), ["q_proj", "v_proj"])
    state = random_state(model, plan)
    last = list(plan.adapters)[-1]
    cases = [
        (state | {f"{last}.lora_B": torch.zeros(5, 4)}, plan, "an adapter that was trained on this base"),
        (state | {f"{last}.lora_B": state[f"{last}.lora_B"] * float("nan")}, plan, "stay finite"),
        (
            state | {"lm_head.weight": torch.zeros(2, 2)},
            replace(plan, modules=("lm_head",)),
            "tensors that fit this base",
        ),
    ]
    other = make_plan(info_of(base("bert")), ["query"])
    cases.append((random_state(base("bert"), other), other, "none of this name"))
    for tensors, its_plan, text in cases:
        with pytest.raises(ConfigError, match=text):
            merge(model, tensors, its_plan, keep=True)
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_weights_that_would_overflow_are_refused() -> None:
    model = base("llama").half()
    plan = make_plan(info_of(model), ["q_proj"])
    state = {k: t * 1e4 for k, t in random_state(model, plan).items()}
    with pytest.raises(ConfigError, match="float16"):
        merge(model, state, plan, keep=True)
