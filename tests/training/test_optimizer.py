"""PackedAdamW, clipping and schedules against torch's own."""

import pytest
import torch

from lorabench.training.optimizer import PackedAdamW, clip_factors, grad_norms, scale_grads, schedule

SHAPES = ((3, 5), (4,))


def _problem(k: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """For each step, the gradients of every tensor: [K, ...]."""
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(k, *s, generator=g, dtype=dtype) * 3 for s in SHAPES] for _ in range(40)]


def _reference(grads, k, *, lr, decay, clip, dtype, total=40):
    """Slice k alone, through torch.optim.AdamW and clip_grad_norm_."""
    params = [torch.nn.Parameter(torch.full(s, 0.5, dtype=dtype)) for s in SHAPES]
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=decay, foreach=False, fused=False)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, schedule("cosine", total, 0.1))
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g[k].clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(params, clip)
        opt.step()
        sched.step()
    return params


def _packed(grads, *, lr, decay, clip, dtype, stacked=True):
    k = len(lr)
    shape = [(k, *s) if stacked else s for s in SHAPES]
    params = [torch.nn.Parameter(torch.full(s, 0.5, dtype=dtype)) for s in shape]
    opt = PackedAdamW([{"params": params, "stacked": stacked, "decay": True}], lr=lr, weight_decay=decay)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, schedule("cosine", 40, 0.1))
    pairs = [(p, stacked) for p in params]
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone() if stacked else g[0].clone()
        scale_grads(pairs, clip_factors(grad_norms(pairs, k), clip))
        opt.step()
        sched.step()
    return params


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("stacked", [True, False])
def test_one_slice_equals_torch_adamw(clip, stacked):
    grads = _problem(1, torch.float64)
    got = _packed(grads, lr=[3e-3], decay=[0.1], clip=clip, dtype=torch.float64, stacked=stacked)
    want = _reference(grads, 0, lr=3e-3, decay=0.1, clip=clip, dtype=torch.float64)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[0] if stacked else a, b, rtol=0, atol=1e-12)


def test_one_slice_equals_torch_adamw_in_float32():
    grads = _problem(1, torch.float32)
    got = _packed(grads, lr=[3e-3], decay=[0.1], clip=None, dtype=torch.float32)
    want = _reference(grads, 0, lr=3e-3, decay=0.1, clip=None, dtype=torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[0], b, rtol=0, atol=1e-6)


def test_slices_with_own_rates_and_decays_equal_torch_adamw():
    lr, decay = [1e-3, 5e-2, 3e-4], [0.0, 0.1, 0.5]
    grads = _problem(3, torch.float64)
    got = _packed(grads, lr=lr, decay=decay, clip=0.9, dtype=torch.float64)
    for k in range(3):
        want = _reference(grads, k, lr=lr[k], decay=decay[k], clip=0.9, dtype=torch.float64)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[k], b, rtol=0, atol=1e-12)


def test_a_frozen_slice_stays_and_its_neighbour_does_not_notice():
    def run(poison: bool) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(2, 3))
        opt = PackedAdamW([{"params": [p], "stacked": True, "decay": True}], lr=[0.1, 0.1], weight_decay=[0.1, 0.1])
        for step in range(5):
            p.grad = torch.full((2, 3), 0.3)
            if poison and step >= 2:
                p.grad[0] = float("nan")
                opt.freeze(torch.tensor([True, False]))
            opt.step()
        return p.detach()

    clean, poisoned = run(False), run(True)
    assert torch.equal(clean[1], poisoned[1])
    assert torch.isfinite(poisoned[0]).all()


def test_the_schedule_is_a_scalar_that_torch_schedulers_drive():
    p = torch.nn.Parameter(torch.ones(2, 3))
    opt = PackedAdamW([{"params": [p], "stacked": True, "decay": False}], lr=[1.0, 2.0], weight_decay=[0, 0])
    torch.optim.lr_scheduler.LambdaLR(opt, schedule("linear", 10, 0.0))
    assert opt.param_groups[0]["lr"] == 1.0
    assert opt.param_groups[0]["slice_lr"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("name", "end"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.02447174185242318)])
def test_schedules(name, end):
    factor = schedule(name, 12, 2 / 12)
    assert [factor(0), factor(1), factor(2)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factor(11) == pytest.approx(end, rel=1e-9)
