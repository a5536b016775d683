"""One run against plain torch and transformers: loss weighting, accumulation, clipping, best weights, early stopping."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from fixtures.runs import WORDS, make_base, make_data, make_run
from lorabench.adapters import inject
from lorabench.adapters.files import load_slice
from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig
from lorabench.store.records import Store
from lorabench.training import precision, preparation
from lorabench.training.batches import PackStream
from lorabench.training.module import BoundTask
from lorabench.training.optimizer import schedule
from lorabench.training.train import Pack, alone_seconds, measure_alone, train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    text = root / "text.txt"
    g = torch.Generator().manual_seed(5)
    lines = [
        " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (4 + n % 9,), generator=g)) for n in range(160)
    ]
    text.write_text("\n\n".join(f"{line} {n}" for n, line in enumerate(lines)))
    bases = {k: make_base(root / k, k) for k in ("bert", "gpt2")}
    return bases, make_data(root / "data.csv"), text


def lm_run(places, **changes) -> RunConfig:
    bases, data, text = places
    task = {
        "kind": "causal_lm",
        "name": "text",
        "source": "text",
        "file": str(text),
        "unit": "paragraph",
        "max_length": 24,
    }
    return make_run(bases["gpt2"], data, **{"method.name": "full", "trainer.max_steps": 6, **changes}, task=task)


def test_language_modelling_with_accumulation_is_transformers_weighting(places, tmp_path):
    """Full fine-tuning against a plain loop: sum of token losses over all micro-batches / number of their target tokens."""
    from transformers import AutoModelForCausalLM

    run = lm_run(
        places, **{"trainer.accumulate_grad_batches": 3, "trainer.keep": "last", "trainer.gradient_clip_val": 0.5}
    )
    store = Store(tmp_path)
    (record,) = train(Pack("p0", (run,)), store)
    assert record.status == "completed", record.error
    got = [row["train/loss"] for row in store.history(run.run_id) if "train/loss" in row]

    prepared = preparation.prepare(run)
    model = AutoModelForCausalLM.from_pretrained(places[0]["gpt2"], dtype=torch.float64, attn_implementation="eager")
    decay = [p for p in model.parameters() if p.dim() > 1]
    spared = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": spared}], lr=run.optimizer.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("linear", 6, run.optimizer.warmup_ratio))
    encoded = prepared.encoded
    stream = PackStream(
        encoded.splits["train"], encoded.lengths["train"], [run.seed], batch_size=4, accumulate=3, total_steps=6,
        collate=BoundTask(run.task, prepared.processor).collate,
    )  # fmt: skip
    want = []
    for parts in stream:
        micros = [part.batch for part in parts]
        tokens = sum(int((m["labels"][:, 1:] != -100).sum()) for m in micros)
        total = 0.0
        for m in micros:
            logits = model(input_ids=m["input_ids"], attention_mask=m["attention_mask"]).logits[:, :-1]
            labels = m["labels"][:, 1:]
            loss = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="sum"
            )
            (loss / tokens).backward()
            total += loss.item() / tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        want.append(total)
    assert got == pytest.approx(want, abs=1e-9)


@torch.no_grad()
def saved_loss(store, run) -> float:
    """Validation loss of what the run saved, loaded onto the base anew."""
    prepared = preparation.prepare(run)
    base = preparation.load_base(run, prepared.head, precision.resolve(run))
    state, plan = load_slice(store.run_dir(run.run_id) / "adapter")
    stack = inject(base.model, [plan], info=base.info)
    stack.load_slice(0, state)
    try:
        batch = run.task.collate(prepared.encoded.splits["val"], prepared.processor)
        out = run.task.step(base.model, batch)
        return float(out.loss_sum.sum() / out.weight.sum())
    finally:
        stack.remove()


def test_a_run_ends_with_its_best_evaluation(places, tmp_path):
    bases, data, _ = places
    run = make_run(bases["bert"], data, **{"optimizer.lr": 0.3, "trainer.eval_interval": 2, "trainer.max_steps": 20})
    store = Store(tmp_path)
    (record,) = train(Pack("p0", (run,)), store)
    losses = {row["step"]: row["val/loss"] for row in store.history(run.run_id) if "val/loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert 20 in losses
    assert (record.metrics["best_step"], record.metrics["val/loss"]) == (best, losses[best])
    assert best < 20, "a rate this high must have a best step before the last"
    assert saved_loss(store, run) == pytest.approx(losses[best], abs=1e-9)


def test_the_last_step_is_evaluated_even_when_the_interval_does_not_divide(places, tmp_path):
    bases, data, _ = places
    run = make_run(bases["bert"], data, **{"trainer.eval_interval": 4, "trainer.max_steps": 7})
    store = Store(tmp_path)
    train(Pack("p0", (run,)), store)
    assert [row["step"] for row in store.history(run.run_id) if "val/loss" in row] == [4, 7]


def test_early_stopping_ends_training_when_every_slice_has_stopped(places, tmp_path):
    bases, data, _ = places
    common = {
        "optimizer.lr": 1e-12,
        "trainer.max_steps": 60,
        "trainer.eval_interval": 2,
        "trainer.early_stopping_patience": 2,
    }
    run = make_run(bases["bert"], data, **common, **{"optimizer.schedule": "constant", "optimizer.warmup_ratio": 0.0})
    (record,) = train(Pack("p0", (run,)), Store(tmp_path))
    assert record.status == "completed"
    assert record.resources["steps"] < 60
    assert "no better validation loss for 2 evaluations" in record.provenance["stopped"]


def test_bf16_full_fine_tuning_keeps_float32_master_weights(places, tmp_path):
    bases, data, _ = places
    run = make_run(bases["bert"], data, **{"method.name": "full", "trainer.precision": "bf16", "trainer.max_steps": 3})
    (record,) = train(Pack("p0", (run,)), Store(tmp_path))
    assert (record.status, record.provenance["base_dtype"], record.provenance["precision"]) == (
        "completed",
        "float32",
        "bf16",
    )
    weights = load_file(Store(tmp_path).run_dir(run.run_id) / "adapter" / "weights.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_a_record_says_what_it_cost_and_where_it_came_from(places, tmp_path):
    bases, data, _ = places
    run = make_run(bases["bert"], data, **{"trainer.max_steps": 3})
    (record,) = train(Pack("p0", (run,)), Store(tmp_path))
    assert record.resources["steps"] == 3
    assert record.resources["examples"] == 12
    assert record.resources["peak_memory_bytes"] > 10**7
    prepared = preparation.prepare(run)
    assert record.resources["trainable_parameters"] == preparation.slice_plan(run, prepared.info).trainable(
        prepared.info
    )
    for key in ("packages", "machine", "code", "data_fingerprint", "model_fingerprint", "precision", "attention"):
        assert record.provenance[key], key


def test_measuring_a_cell_leaves_nothing_behind(places, tmp_path):
    bases, data, _ = places
    found = measure_alone(make_run(bases["bert"], data), Store(tmp_path), steps=5)
    assert found["tokens"] > 0 and found["seconds"] > 0 and found["peak_memory_bytes"] > 0
    assert (found["reused_blocks"], found["trunk_seconds"]) == (0, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_seconds_alone_are_those_of_all_steps_where_no_tokens_are_counted():
    with_tokens = [(float(2 * i), 50 * i) for i in range(10)]
    assert alone_seconds(with_tokens) == (16.0, 400, 8)  # seconds, tokens, steps: the first two are warm-up
    assert alone_seconds([(seconds, 0) for seconds, _ in with_tokens]) == (16.0, 0, 8)


@pytest.mark.parametrize("steps", [2, 100])
def test_a_cell_is_measured_with_the_trunk_that_its_runs_are_served(places, tmp_path, monkeypatch, steps):
    """Whether a run is so long that its trunk is computed once is a matter of its own steps, not of the few measured."""
    from lorabench.adapters.trunk import Trunk

    bases, data, _ = places
    run = make_run(bases["bert"], data, **{"method.name": "head", "trainer.max_steps": steps})
    passes, output = [], Trunk.output
    monkeypatch.setattr(Trunk, "output", lambda self, forward: passes.append(1) or output(self, forward))
    found = measure_alone(run, Store(tmp_path), steps=8)
    first = len(passes)
    served = steps == 100
    assert found["reused_blocks"] == 2 and (found["trunk_seconds"] > 0) == served
    assert (first > 1) == served  # one to look at the trunk, the others for the split
    again = measure_alone(run, Store(tmp_path), steps=8)
    assert len(passes) == first + 1 and again["trunk_seconds"] == found["trunk_seconds"]
    off = measure_alone(
        make_run(bases["bert"], data, **{"method.name": "head", "trainer.reuse_trunk": False}), Store(tmp_path), steps=3
    )
    assert (off["reused_blocks"], off["trunk_seconds"]) == (0, 0.0)


@pytest.mark.parametrize(
    ("key", "value"), [("trainer.devices", "all"), ("trainer.num_nodes", 3), ("trainer.precision", "16-mixed")]
)
def test_what_would_couple_or_split_slices_is_refused(places, key, value):
    bases, data, _ = places
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        preparation.check_run(make_run(bases["bert"], data, **{key: value}))


def test_a_loss_that_is_not_finite_marks_the_run_diverged(places, tmp_path):
    bases, data, _ = places
    run = make_run(bases["bert"], data, **{"method.alpha": 1e300})
    (record,) = train(Pack("p0", (run,)), Store(tmp_path))
    assert record.status == "diverged"
    assert "not finite at step" in (record.error or "")
