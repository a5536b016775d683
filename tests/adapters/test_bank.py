"""Several adapters on one base: each answers as if it were alone, the base is not touched and not read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fixtures.adapters import IDS, base, info_of, logits, make_plan, random_state
from lorabench.adapters.bank import Bank
from lorabench.adapters.files import save_slice
from lorabench.adapters.merge import merge
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.errors import ConfigError


def slices(kind: str, model: nn.Module) -> dict[str, tuple[dict[str, Tensor], SlicePlan]]:
    """Three slices of other ranks, targets, modules and biases."""
    info = info_of(model, kind)
    if kind == "bert":
        plans = {
            "small": make_plan(info, ["query"], r=2, modules=["classifier"]),
            "large": make_plan(info, ["query", "value", "word_embeddings"], r=8, modules=["classifier"]),
            "plain": make_plan(info, ["output.dense"], r=3),
            "biases": SlicePlan(seed=0, modules=("classifier",), biases=("bert.encoder.layer.0.output.dense",)),
        }
    else:
        plans = {
            "small": make_plan(info, ["q_proj"], r=2),
            "large": make_plan(info, ["q_proj", "down_proj", "embed_tokens"], r=8, rslora=True),
        }
    return {name: (random_state(model, plan, seed), plan) for seed, (name, plan) in enumerate(plans.items())}


def alone(kind: str, state: dict[str, Tensor], plan: SlicePlan) -> Tensor:
    model = base(kind)
    merge(model, state, plan)
    return logits(model)


@pytest.fixture(params=["bert", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def filled(kind: str) -> tuple[Bank, dict[str, Tensor]]:
    model = base(kind)
    bank = Bank(model, info_of(model, kind))
    made = slices(kind, model)
    for name, (state, plan) in made.items():
        bank.add(name, state, plan)
    return bank, {name: alone(kind, state, plan) for name, (state, plan) in made.items()}


def test_each_adapter_answers_as_if_alone(kind: str) -> None:
    bank, expected = filled(kind)
    for name in [*bank.names, *reversed(bank.names)]:
        with bank.use(name) as model:
            assert (logits(model) - expected[name]).abs().max() < 1e-5
    with bank.use(None) as model:
        assert torch.equal(logits(model), logits(base(kind)))
    assert torch.equal(logits(bank.model), logits(base(kind)))


def test_rows_of_one_batch_by_different_adapters(kind: str) -> None:
    bank, expected = filled(kind)
    expected |= {None: logits(base(kind))}  # type: ignore[dict-item]
    for names in (["small", None, "large"], ["large", "large", "small"], [None, None, "small"], ["small"] * 3):
        with bank.rows(names) as model:
            found = logits(model)
        for row, name in enumerate(names):
            assert (found[row] - expected[name][row]).abs().max() < 1e-5, (names, row)  # type: ignore[index]


def test_neighbours_are_computed_together() -> None:
    bank, _ = filled("llama")
    with bank.rows(["small"] * 4 + [None] * 2) as model:
        assert bank._stack_of_all().context.active == (1, 1, 0)
        model(input_ids=IDS.repeat(2, 1))


def test_switching_moves_no_weights(kind: str) -> None:
    bank, _ = filled(kind)
    with bank.use("small"):
        pass
    before = {n: (p.data_ptr(), p._version) for n, p in bank.model.named_parameters()}
    for name in [*bank.names, None] * 5:
        with bank.use(name) as model:
            logits(model)
    assert {n: (p.data_ptr(), p._version) for n, p in bank.model.named_parameters()} == before


def test_the_base_comes_back_bit_for_bit(kind: str) -> None:
    bank, _ = filled(kind)
    with bank.use("large"):
        pass
    bank.close()
    fresh = base(kind).state_dict()
    now = bank.model.state_dict()
    assert set(now) == set(fresh) and all(torch.equal(now[k], fresh[k]) for k in fresh)


def test_removed_and_added_again(kind: str) -> None:
    bank, expected = filled(kind)
    with bank.use("small"):
        pass
    bank.remove("small")
    with bank.use("large") as model:
        assert (logits(model) - expected["large"]).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="loaded: large"), bank.use("small"):
        pass
    state, plan = slices(kind, base(kind))["small"]
    bank.add("small", state, plan)
    with bank.use("small") as model:
        assert (logits(model) - expected["small"]).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_from_folders_ours_and_pefts(tmp_path: Path) -> None:
    model = base("llama")
    plan = make_plan(info_of(model), ["q_proj"])
    state = random_state(model, plan)
    save_slice(tmp_path / "ours", state, plan, info=info_of(model))
    theirs = get_peft_model(
        base("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "v_proj"])
    ).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path / "theirs")
    bank = Bank(model, info_of(model))
    bank.add("ours", tmp_path / "ours")
    bank.add("theirs", tmp_path / "theirs")
    with bank.use("theirs") as adapted:
        assert (logits(adapted) - logits(theirs)).abs().max() < 1e-5
    with bank.use("ours") as adapted:
        assert (logits(adapted) - alone("llama", state, plan)).abs().max() < 1e-5
    with torch.no_grad():
        model = base("llama")
        model.model.embed_tokens.weight += 1
    with pytest.raises(ConfigError, match="embed_tokens.weight.*this base's own"):
        Bank(model, info_of(model)).add("theirs", tmp_path / "theirs")


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model = base("bert")
    bank = Bank(model, info_of(model, "bert"))
    plan = make_plan(info_of(model), ["query"], modules=["classifier"])
    state = random_state(model, plan)
    bank.add("a", state, plan)
    llama = base("llama")
    foreign = make_plan(info_of(llama), ["q_proj"])
    inside = make_plan(info_of(model), ["classifier"])
    name = next(iter(plan.adapters))
    cases = [
        ("a", state, plan, "a new name; loaded already: a"),
        ("b", random_state(llama, foreign), foreign, "layers of this base"),
        ("b", state | {f"{name}.lora_A": torch.zeros(4, 7)}, plan, "shapes for in 32, out 32"),
        ("b", state | {"classifier.weight": torch.zeros(9, 32)}, plan, r"parameters of this base; it has \[3, 32\]"),
        ("b", dict(model.state_dict()), SlicePlan(seed=0, full=True), "a base of its own"),
        ("b", random_state(model, inside), inside, "part of a whole module"),
    ]
    for name, tensors, its_plan, text in cases:
        with pytest.raises(ConfigError, match=text):
            bank.add(name, tensors, its_plan)
    assert bank.names == ("a",)
    with bank.use("a") as adapted:
        assert (logits(adapted) - alone("bert", state, plan)).abs().max() < 1e-5


def test_adapter_dropout_is_off_in_a_bank() -> None:
    model = base("llama")
    plan = make_plan(info_of(model), ["q_proj"])
    plan = replace(plan, adapters={n: replace(s, dropout=0.5) for n, s in plan.adapters.items()})
    state = random_state(model, plan)
    bank = Bank(model, info_of(model))
    bank.add("a", state, plan)
    model.train()
    with bank.use("a") as adapted:
        assert (logits(adapted) - alone("llama", state, plan)).abs().max() < 1e-5
