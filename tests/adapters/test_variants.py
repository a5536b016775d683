"""LoRA's relatives against PEFT: same start and batches, same losses; files go both ways; merged answers as separate."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fixtures.bases import BASES, losses, repeat, shake, token_batch
from fixtures.runs import make_run
from lorabench.adapters import Stack, inject
from lorabench.adapters.files import load_slice, save_slice
from lorabench.adapters.merge import merge
from lorabench.adapters.product import AdaptedProduct, SharedProduct
from lorabench.config.components import load_component
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import BaseInfo
from lorabench.config.errors import ConfigError
from lorabench.training.module import PackModule

STEPS, RATE = 20, 3e-3
RATES = {"loraplus": 3e-4}  # A's; B's is 16 times that
TARGETS = {
    "bert": ["query", "value", "intermediate.dense", "layer.1.output.dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
}
DOWN = {"bert": ["layer.1.output.dense"], "llama": ["down_proj"], "gpt2": ["mlp.c_proj"]}
METHODS = ("dora", "pissa", "olora", "lorafa", "loraplus", "vera", "ia3")


def settings(method: str, kind: str, r: int = 4) -> dict[str, Any]:
    more = {"feedforward_modules": DOWN[kind]} if method == "ia3" else {"r": r}
    more |= {"alpha": 16} if method not in ("ia3", "vera") else {}
    return {"target_modules": TARGETS[kind], **more}


def plan_of(method: str, info: BaseInfo, kind: str, r: int = 4, seed: int = 0, **more: Any) -> SlicePlan:
    made = load_component("method", method, None)(**settings(method, kind, r), **more)
    made.validate("method")
    plan: SlicePlan = made.plan(info, seed=seed)
    return plan


def reference(method: str, kind: str, plan: SlicePlan) -> nn.Module:
    """PEFT's own model of the plan, on a fresh base."""
    model, info = BASES[kind]()
    common: dict[str, Any] = {
        "target_modules": list(plan.adapters), "modules_to_save": list(info.head) or None, "fan_in_fan_out": kind == "gpt2"
    }  # fmt: skip
    lora = {"r": 4, "lora_alpha": 16}
    config: Any = {
        "dora": lambda: LoraConfig(**common, **lora, use_dora=True),
        "pissa": lambda: LoraConfig(**common, **lora, init_lora_weights="pissa"),
        "olora": lambda: LoraConfig(**common, **lora, init_lora_weights="olora"),
        "lorafa": lambda: LoraConfig(**common, **lora),
        "loraplus": lambda: LoraConfig(**common, **lora),
        "vera": lambda: VeraConfig(**common, r=4),
        "ia3": lambda: IA3Config(
            **common, feedforward_modules=[n for n, s in plan.adapters.items() if s.kind == "ia3_input"]
        ),
    }[method]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def peft_name(ours: str) -> str:
    layer, _, part = ours.rpartition(".")
    known = {
        "lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight", "ia3_l": "ia3_l.default",
        "magnitude": "lora_magnitude_vector.default.weight", "vera_lambda_d": "vera_lambda_d.default",
        "vera_lambda_b": "vera_lambda_b.default",
    }  # fmt: skip
    return f"base_model.model.{layer}.{known.get(part, f'modules_to_save.default.{part}')}"


def copy_start(start: dict[str, Tensor], model: nn.Module, *, drawn: tuple[str, ...]) -> None:
    """What is drawn at random (A, a new head) goes over to PEFT's model; all else must be what PEFT starts from."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            theirs = own[peft_name(name)]
            if not name.endswith(drawn):
                torch.testing.assert_close(theirs.view(value.shape), value, rtol=1e-5, atol=1e-6)
            theirs.copy_(value.view(theirs.shape))


def optimizer_of(stack: Stack, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """lorabench's own, for two slices of one method."""
    change: dict[str, Any] = {"optimizer.lr": rate, "optimizer.schedule": "constant", "optimizer.warmup_ratio": 0.0}
    runs = [make_run(Path("unused"), Path("unused"), **change, seed=seed) for seed in (0, 5)]
    module = PackModule(model, stack, None, runs, total_steps=STEPS, rows=lambda k, rows: None)
    module.configure_optimizers()
    return module.packed


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_give_pefts_losses(method: str, kind: str) -> None:
    if (method, kind) == ("olora", "gpt2"):
        pytest.skip("PEFT's OLoRA does not turn Conv1D's weight round")
    model, info = BASES[kind]()
    ours, mate = plan_of(method, info, kind), plan_of(method, info, kind, r=8, seed=5)
    stack = inject(model, [ours, mate], info=info)
    start = {name: value.clone() for name, value in stack.slice_state(0).items()}
    theirs = reference(method, kind, ours)
    drawn = ("lora_A", *(f"{m}.{p}" for m in info.head for p in ("weight", "bias")))
    copy_start(start, theirs, drawn=drawn if method not in ("pissa", "olora") else drawn[1:])
    if method == "lorafa":
        for name, p in theirs.named_parameters():
            p.requires_grad_(p.requires_grad and ".lora_A." not in name)
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == ours.trainable(info)
    rate = RATES.get(method, RATE)
    if method == "loraplus":
        solo = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=16.0)  # type: ignore[arg-type]
    else:
        solo = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    packed = optimizer_of(stack, model, rate)
    found = []
    for i in range(STEPS):
        batch = token_batch(4, 8, seed=i)
        for optimizer in (packed, solo):
            optimizer.zero_grad()
        here, there = losses(model, repeat(batch, 2)), losses(theirs.base_model.model, batch)
        here.sum().backward()
        there.sum().backward()
        packed.step()
        solo.step()
        torch.testing.assert_close(here[:4], there, rtol=1e-5, atol=1e-5)
        found.append(float(there.detach().sum()))
    assert abs(found[0] - found[-1]) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_starts_as_the_base_and_frozen_parts_stay(method: str) -> None:
    model, info = BASES["llama"]()
    batch = token_batch(4, 8)
    plain = losses(model, batch).detach()
    stack = inject(model, [plan_of(method, info, "llama"), plan_of(method, info, "llama", r=8, seed=3)], info=info)
    torch.testing.assert_close(losses(model, repeat(batch, 2)), plain.repeat(2), rtol=1e-5, atol=1e-5)
    stack.remove()
    assert torch.equal(losses(model, batch).detach(), plain)


def trained(method: str, kind: str) -> tuple[nn.Module, BaseInfo, SlicePlan, dict[str, Tensor], Tensor]:
    """A slice with trained-looking weights: base, plan, exported state, and what it says to a batch."""
    model, info = BASES[kind]()
    stack = inject(model, [plan_of(method, info, kind)], info=info)
    shake(stack, 0.1)
    said = losses(model, token_batch(4, 8)).detach()
    state, plan = stack.export_slice(0)
    state = {name: t.clone() for name, t in state.items()}
    stack.remove()
    return model, info, plan, state, said


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_files_load_again_and_merge(tmp_path: Path, method: str, kind: str) -> None:
    model, info, plan, state, said = trained(method, kind)
    save_slice(tmp_path / "adapter", state, plan, info=info)
    again, plan_again = load_slice(tmp_path / "adapter")
    assert plan_again.adapters == plan.adapters and again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    done = merge(model, again, plan_again, keep=True)
    torch.testing.assert_close(losses(model, token_batch(4, 8)), said, rtol=1e-4, atol=1e-4)
    done.unmerge()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    stack = inject(model, [plan_again], info=info)
    stack.load_slice(0, again)
    torch.testing.assert_close(losses(model, token_batch(4, 8)), said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_what_is_written_here(tmp_path: Path, method: str, kind: str) -> None:
    _, info, plan, state, said = trained(method, kind)
    save_slice(tmp_path / "adapter", state, plan, info=info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(BASES[kind]()[0], str(tmp_path / "adapter"))
    torch.testing.assert_close(losses(loaded.base_model.model, token_batch(4, 8)), said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "vera", "ia3"])
def test_what_peft_wrote_loads_here(tmp_path: Path, method: str) -> None:
    model, info = BASES["llama"]()
    theirs = reference(method, "llama", plan_of(method, info, "llama"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    said = losses(theirs.base_model.model, token_batch(4, 8)).detach()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    state, plan = load_slice(tmp_path / "adapter")
    stack = inject(model, [plan], info=info)
    stack.load_slice(0, state)
    torch.testing.assert_close(losses(model, token_batch(4, 8)), said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["missing", "other"])
def test_a_vera_file_without_its_own_projection_is_refused(tmp_path: Path, change: str) -> None:
    _, info, plan, state, _ = trained("vera", "llama")
    save_slice(tmp_path / "adapter", state, plan, info=info)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["base_model.vera_A"]
    else:
        tensors["base_model.vera_A"] += 1
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="save_projection" if change == "missing" else "projection_prng_key"):
        load_slice(tmp_path / "adapter")


def test_pissa_is_saved_at_twice_the_rank_on_the_plain_base(tmp_path: Path) -> None:
    _, info, plan, state, _ = trained("pissa", "llama")
    save_slice(tmp_path / "adapter", state, plan, info=info)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 32, True)


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("pissa", {"dropout": 0.1}, "method.dropout=0.1: 0 for PiSSA"),
        ("dora", {"target_modules": ["embed_tokens"]}, "linear layers for method=dora"),
        ("loraplus", {"target_modules": ["embed_tokens"]}, "no embeddings"),
        ("vera", {"target_modules": []}, "non-empty"),
        ("ia3", {"feedforward_modules": ["up_proj"]}, "some of method.target_modules"),
    ],
)
def test_bad_settings_are_told(method: str, change: dict[str, Any], says: str) -> None:
    _, info = BASES["llama"]()
    made = load_component("method", method, None)(**{**settings(method, "llama"), **change})

    def plan() -> None:
        made.validate("method")
        made.plan(info, seed=0)

    with pytest.raises(ConfigError, match=says):
        plan()


@pytest.mark.parametrize("apart", [False, True], ids=["", "dropout"])
def test_the_shared_product_is_veras_formula(apart: bool) -> None:
    """Output and gradients, in float64, against autograd's own on W x + b * (B (l * (A d))) with the pair copied a slice."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, d, W, bias, A, B = draw(6, 5), draw(6, 5), draw(4, 5), draw(4), draw(3, 5), draw(4, 3)
    given = [t.requires_grad_() for t in (x, d, draw(2, 3), draw(2, 4))]
    x, d, l, b = given
    found = SharedProduct.apply(x, d if apart else None, W, bias, A, B, l, b)
    pairs = [(l[k, :, None] * A, b[k, :, None] * B) for k in range(2)]
    seen = d if apart else x
    expected = x @ W.T + bias + torch.cat([seen[3 * k : 3 * k + 3] @ a.T @ c.T for k, (a, c) in enumerate(pairs)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = draw(6, 4)
    for wanted, t in zip(torch.autograd.grad((expected * weight).sum(), given, allow_unused=True), given, strict=True):
        (mine,) = torch.autograd.grad((found * weight).sum(), t, retain_graph=True, allow_unused=True)
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def kept(run: Callable[[], Tensor]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """What is computed, and the shapes kept for its backward pass."""
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        return run(), shapes


def test_vera_keeps_no_copy_of_the_pair_a_slice() -> None:
    """Slices of one rank share it, those of another rank have another; a slice that has none is the base there."""
    model, info = BASES["llama"]()
    plans = [
        plan_of("vera", info, "llama", r=6, seed=0),
        plan_of("vera", info, "llama", r=6, seed=1),
        plan_of("vera", info, "llama", r=3),
    ]
    elsewhere = {name: spec for name, spec in plans[2].adapters.items() if "q_proj" not in name}
    stack = inject(model, [*plans, replace(plans[2], adapters=elsewhere)], info=info)
    shake(stack, 0.1)
    batch = token_batch(2, 8)
    said, shapes = kept(lambda: losses(model, repeat(batch, 4)))
    assert not [s for s in shapes if len(s) == 3 and s[0] in (3, 4) and s[1:] in ((6, 32), (32, 6))]
    assert {key[0] for key in stack.context.projections} == {6, 3}
    said.sum().backward()
    states = [{name: t.clone() for name, t in stack.slice_state(k).items()} for k in range(4)]
    grads = {t.name: t.parameter.grad.clone() for t in stack.named_trainables() if t.parameter.grad is not None}
    packed = said.detach().view(4, -1)
    plans = [*stack.plans]
    stack.remove()
    for k, (plan, state) in enumerate(zip(plans, states, strict=True)):
        solo = inject(model, [plan], info=info)
        solo.load_slice(0, state)
        alone = losses(model, batch)
        torch.testing.assert_close(alone.detach(), packed[k], rtol=1e-5, atol=1e-5)
        alone.sum().backward()
        for t in solo.named_trainables():
            own = t.parameter.grad
            if own is not None and t.name.endswith("vera_lambda_b"):
                torch.testing.assert_close(own[0], grads[t.name][k], rtol=1e-4, atol=1e-5)
        solo.remove()


def test_a_frozen_a_costs_no_gradient_and_no_input() -> None:
    """LoRA-FA's promise: of a layer's input [N, I] only the low products [K, M, r] are kept."""
    x, W = torch.randn(12, 40), torch.randn(24, 40)
    B, s = torch.randn(2, 24, 3, requires_grad=True), torch.ones(2)
    for trains in (True, False):
        A = torch.randn(2, 3, 40, requires_grad=trains)
        y, shapes = kept(lambda A=A: AdaptedProduct.apply(x, None, W, None, A, B, s))
        assert ((12, 40) in shapes) == trains
        y.sum().backward()
        assert (A.grad is None) != trains
        low = torch.bmm(x.view(2, 6, 40), A.detach().transpose(1, 2))
        torch.testing.assert_close(B.grad, torch.ones(2, 24, 6) @ low)
        B.grad = None


def test_lorafa_alone_has_no_gradient_of_a_and_beside_lora_its_own_is_dropped() -> None:
    for mates, expected in ((("lorafa", "lorafa"), None), (("lorafa", "lora"), "some")):
        model, info = BASES["llama"]()
        stack = inject(model, [plan_of(m, info, "llama", seed=n) for n, m in enumerate(mates)], info=info)
        losses(model, repeat(token_batch(2, 8), 2)).sum().backward()
        grads = {t.name: t.parameter.grad for t in stack.named_trainables()}
        assert all((g is None) == (expected is None) for name, g in grads.items() if name.endswith("lora_A"))
        assert all(g is not None for name, g in grads.items() if name.endswith("lora_B"))
