"""The first law: the runs of a pack give the numbers they give alone. docs/architecture.md, "Packed equals solo"."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from fixtures.runs import make_base, make_data, make_run
from lorabench.config.runs import RunConfig
from lorabench.store.records import Store
from lorabench.training import precision, preparation
from lorabench.training.train import Pack, train

# r, alpha, lr, weight decay, seed, targets: all mixed, with dropout 0
MIXED = [
    {"method.r": 1, "method.alpha": 2, "optimizer.lr": 1e-3, "seed": 0, "method.target_modules": "q+v"},
    {"method.r": 4, "method.alpha": 16, "optimizer.lr": 5e-3, "seed": 0, "method.target_modules": "all-linear"},
    {"method.r": 8, "method.alpha": 8, "optimizer.lr": 2e-3, "seed": 1, "method.target_modules": "all-linear"},
    {"method.r": 2, "method.alpha": 1, "optimizer.lr": 1e-2, "seed": 2, "method.target_modules": "mlp"},
    {"method.r": 3, "method.alpha": 6, "optimizer.lr": 3e-3, "seed": 1, "optimizer.weight_decay": 0.1, "method.target_modules": "attention"},
    {"method.r": 8, "method.alpha": 16, "optimizer.lr": 4e-3, "seed": 3, "method.use_rslora": True, "method.target_modules": "all-linear"},
]  # fmt: skip
# The first tests go on for 30 steps; the others differ from them in one setting.
SHORT = {"trainer.max_steps": 12, "trainer.eval_interval": 4}
GPT2 = {"q+v": "attention"}  # its q, k and v are one matrix


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    data = make_data(root / "data.csv")
    return {kind: (make_base(root / kind, kind, dropout=0.1), data) for kind in ("bert", "gpt2", "llama")}


def runs_of(places, kind, **common) -> list[RunConfig]:
    base, data = places[kind]
    changes = [dict(m) for m in MIXED]
    if kind == "gpt2":
        for c in changes:
            c["method.target_modules"] = GPT2.get(c["method.target_modules"], c["method.target_modules"])
    return [make_run(base, data, **{**c, **common}) for c in changes]


def outcome(store: Store, run: RunConfig):
    """Status, history and trained weights of a run."""
    record = store.read(run.run_id)
    assert record is not None
    folder = store.run_dir(run.run_id) / "adapter"
    files = sorted(folder.glob("*.safetensors")) if folder.exists() else []
    return record, store.history(run.run_id), {k: v for f in files for k, v in load_file(f).items()}


def both(tmp_path, runs):
    packed, solo = Store(tmp_path / "packed"), Store(tmp_path / "solo")
    assert len({r.pack_key for r in runs}) == 1
    train(Pack("p0", tuple(runs)), packed)
    for i, run in enumerate(runs):
        train(Pack(f"s{i}", (run,)), solo)
    return [(outcome(packed, r), outcome(solo, r)) for r in runs]


def assert_equal(pairs, tolerance):
    for (record, history, weights), (record1, history1, weights1) in pairs:
        assert (record.status, record.error) == (record1.status, record1.error)
        assert [r["step"] for r in history] == [r["step"] for r in history1]
        for a, b in zip(history, history1, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert math.isclose(a[key], b[key], rel_tol=0, abs_tol=tolerance), key
        assert weights.keys() == weights1.keys()
        for name in weights:
            torch.testing.assert_close(weights[name], weights1[name], rtol=0, atol=tolerance)


class Float64Throughout(TorchFunctionMode):
    """Llama computes norms and softmax in float32 whatever its type; raised to float64, the law shows at 1e-10."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        swap = {torch.float32: torch.float64}
        double = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double and func in (torch.Tensor.to, torch.softmax, torch.nn.functional.softmax):
            args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
            kwargs = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_six_mixed_slices_equal_six_solo_runs(places, tmp_path, kind):
    with Float64Throughout():
        assert_equal(both(tmp_path, runs_of(places, kind)), 1e-10)


@pytest.mark.parametrize(
    "common",
    [
        {"trainer.gradient_clip_val": 0.05},
        {"optimizer.warmup_ratio": 0.5, "optimizer.schedule": "cosine"},
        {"trainer.accumulate_grad_batches": 3},
        {"method.dropout": 0.2, "model.dropout": None},
        {"trainer.early_stopping_patience": 1, "trainer.eval_interval": 3, "trainer.max_steps": 30},
        {"trainer.keep": "last"},
        {"trainer.gradient_checkpointing": True},
        {"trainer.part_tokens": 100},
        pytest.param(
            {
                "trainer.part_tokens": 100,
                "method.dropout": 0.2,
                "model.dropout": None,
                "trainer.accumulate_grad_batches": 2,
            },
            marks=pytest.mark.slow,
        ),
        {"trainer.part_tokens": 100, "trainer.gradient_checkpointing": True},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_equal_with(places, tmp_path, common):
    assert_equal(both(tmp_path, runs_of(places, "bert", **SHORT | common)), 1e-10)


FAMILIES = {
    "lora": [  # share one forward pass: all of them may stand in one pack
        {"method.name": "lora", "method.r": 4},
        {"method.name": "loraplus", "method.r": 4, "method.lr_ratio": 8.0, "optimizer.lr": 1e-3},
        {"method.name": "lorafa", "method.r": 8, "seed": 1},
        {"method.name": "pissa", "method.r": 2, "method.target_modules": "attention", "optimizer.lr": 1e-3},
        {"method.name": "olora", "method.r": 4, "method.target_modules": "mlp", "optimizer.lr": 1e-3},
    ],
    "dora": [
        {"method.name": "dora", "method.r": 1, "seed": 1},
        {"method.name": "dora", "method.r": 4, "method.dropout": 0.2, "method.target_modules": "attention"},
        {"method.name": "dora", "method.r": 8, "method.use_rslora": True, "optimizer.lr": 1e-3},
    ],
    "vera": [
        {"method.name": "vera", "method.r": 4, "optimizer.lr": 1e-2},
        {"method.name": "vera", "method.r": 16, "method.projection_key": 3, "method.target_modules": "attention"},
        {"method.name": "vera", "method.r": 16, "method.dropout": 0.2, "seed": 2},
    ],
    "ia3": [
        {"method.name": "ia3", "optimizer.lr": 1e-2},
        {"method.name": "ia3", "method.target_modules": "attention+down", "seed": 1},
        {"method.name": "ia3", "method.target_modules": "mlp", "method.layers": [1], "seed": 2},
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_relatives_of_lora(places, tmp_path, family):
    base, data = places["bert"]
    runs = [
        make_run(base, data, **SHORT, **{"trainer.part_tokens": 100, "trainer.gradient_clip_val": 0.5, **c})
        for c in FAMILIES[family]
    ]
    assert_equal(both(tmp_path, runs), 1e-10)


def test_a_slice_that_diverges_costs_the_others_nothing(places, tmp_path):
    runs = runs_of(places, "bert", **SHORT)
    base, data = places["bert"]
    runs[2] = make_run(base, data, **SHORT, **{**MIXED[2], "method.alpha": 1e300})
    pairs = both(tmp_path, runs)
    assert [packed[0].status for packed, _ in pairs] == ["completed"] * 2 + ["diverged"] + ["completed"] * 3
    assert_equal(pairs, 1e-10)


@pytest.mark.parametrize("method", ["head", "bitfit"])
def test_other_methods_pack_too(places, tmp_path, method):
    base, data = places["bert"]
    runs = [
        make_run(base, data, **SHORT, **{"method.name": method, "optimizer.lr": lr, "seed": s})
        for s, lr in enumerate((1e-3, 1e-2, 3e-3))
    ]
    assert_equal(both(tmp_path, runs), 1e-10)


def test_float32_stable_runs_agree_to_1e5(places, tmp_path):
    runs = runs_of(
        places, "bert", **{"trainer.precision": "32", "method.target_modules": "all-linear", "optimizer.lr": 1e-3}
    )
    for packed, solo in both(tmp_path, runs):
        for a, b in zip(packed[1], solo[1], strict=True):
            assert a["train/loss" if "train/loss" in a else "val/loss"] == pytest.approx(
                b["train/loss" if "train/loss" in b else "val/loss"], abs=1e-5
            )


def test_bf16_law(places, tmp_path):
    """|packed - fp32| <= 2 |solo - fp32|, over the run's losses."""

    def losses(precision, packed):
        runs = runs_of(places, "bert", **SHORT, **{"trainer.precision": precision, "optimizer.lr": 1e-3})
        store = Store(tmp_path / f"{precision}-{packed}")
        for i, pack in enumerate([runs] if packed else [[r] for r in runs]):
            train(Pack(f"p{i}", tuple(pack)), store)
        return torch.tensor(
            [[row["train/loss"] for row in store.history(r.run_id) if "train/loss" in row] for r in runs]
        )

    exact = losses("32", False)
    packed, solo = ((losses("bf16", p) - exact).norm() for p in (True, False))
    assert solo > 0
    assert packed <= 2 * solo


def test_the_frozen_base_is_bit_identical_after_training(places, tmp_path):
    runs = runs_of(places, "bert")
    prepared, resolved = preparation.prepare(runs[0]), precision.resolve(runs[0])
    model = preparation.load_base(runs[0], prepared.head, resolved).model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(Pack("p0", tuple(runs)), Store(tmp_path))
    after = dict(preparation.load_base(runs[0], prepared.head, resolved).model.named_parameters())
    assert before.keys() == after.keys()
    for name, p in after.items():
        assert torch.equal(before[name], p), name
        assert p.grad is None and not p.requires_grad, name


UPPER = {"method.layers": [1], "method.target_modules": "attention"}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(
    "changes",
    [UPPER, UPPER | {"method.dropout": 0.3}, {"method.name": "head"}],
    ids=["upper layers", "upper layers with dropout", "head"],
)
def test_a_reused_trunk_changes_nothing(places, tmp_path, kind, changes):
    """Served from the cache or computed at each step: the same losses, weights and test results."""
    base, data = places[kind]
    records = {}
    with Float64Throughout():
        for reuse in (True, False):
            runs = [
                make_run(
                    base, data, role="confirm", **SHORT,
                    **changes, **{"optimizer.lr": lr, "seed": s, "trainer.reuse_trunk": reuse, "trainer.part_tokens": 90},
                )
                for s, lr in enumerate((1e-3, 1e-2, 3e-3))
            ]  # fmt: skip
            store = Store(tmp_path / str(reuse))
            train(Pack("p0", tuple(runs)), store)
            records[reuse] = [outcome(store, r) for r in runs]
    assert {r.provenance["reused_blocks"] for r, *_ in records[True]} == {1 if "method.layers" in changes else 2}
    assert {r.provenance["reused_blocks"] for r, *_ in records[False]} == {0}
    assert_equal(list(zip(records[True], records[False], strict=True)), 1e-10)
    for (a, *_), (b, *_) in zip(records[True], records[False], strict=True):
        assert a.metrics["test/loss"] == pytest.approx(b.metrics["test/loss"], abs=1e-10)


def test_adapters_everywhere_leave_no_trunk(places, tmp_path):
    (record,) = train(Pack("p0", tuple(runs_of(places, "bert")[1:2])), Store(tmp_path))
    assert record.provenance["reused_blocks"] == 0


def test_a_base_whose_head_looks_at_all_layers_is_not_served(places, tmp_path, monkeypatch):
    """Its losses change when the lower blocks are left out: the trial on the first batch finds that out."""
    from transformers import BertModel

    forward = BertModel.forward

    def all_layers(self, *args, **kwargs):
        seen = []
        hooks = [x.register_forward_hook(lambda m, a, out: seen.append(out)) for x in self.encoder.layer]
        out = forward(self, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        out.pooler_output = out.pooler_output + sum(x[0] if isinstance(x, tuple) else x for x in seen)[:, 0]
        return out

    monkeypatch.setattr(BertModel, "forward", all_layers)
    base, data = places["bert"]
    (record,) = train(Pack("p0", (make_run(base, data, **{"method.name": "head"}),)), Store(tmp_path))
    assert (record.status, record.provenance["reused_blocks"]) == ("completed", 0)
