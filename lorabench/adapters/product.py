"""A frozen linear layer and its K adapters as one operation, forward and backward.

Autograd's own nodes for the same sum copy the output and the input's gradient once each, keep what nobody reads, and
take the slow one of two orientations for the adapters' gradients. Here each product lands where it is needed.
Shape letters: K slices at hand, M rows a slice, I in, O out, R rank, N = K * M.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class AdaptedProduct(torch.autograd.Function):
    """y = x W^T + bias + scaling · (d A^T) B^T, slice by slice.

    x [N, I]; d [N, I], the adapters' own view of x (after dropout) or None where it is x; weight [O, I] and bias [O] or
    None, frozen; A [K, R, I] and B [K, O, R] in their own type, computed with in x's; scaling [K]. Gives y [N, O].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        d: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: Tensor,
    ) -> Tensor:
        a, b = A.to(x.dtype), (B * scaling.view(-1, 1, 1)).to(x.dtype)
        low = torch.bmm(_slices(x if d is None else d, len(a)), a.transpose(1, 2))  # [K, M, R]
        y = F.linear(x, weight, bias)
        _slices(y, len(a)).baddbmm_(low, b.transpose(1, 2))
        # what the adapters see is kept for A's gradient alone: with A frozen (LoRA-FA) the low products are enough
        seen = (x if d is None else d) if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(seen, weight, a, b, low, scaling)
        ctx.apart, ctx.types = d is not None, (A.dtype, B.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight, a, b, low, scaling = ctx.saved_tensors
        g = _slices(grad, len(a))
        grad_low = torch.bmm(g, b)
        grad_x = grad_d = grad_A = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if not ctx.apart:
                _slices(grad_x, len(a)).baddbmm_(grad_low, a)
        if ctx.needs_input_grad[1]:
            grad_d = torch.bmm(grad_low, a).view(len(grad), -1)
        if ctx.needs_input_grad[4]:
            grad_A = torch.bmm(grad_low.transpose(1, 2), _slices(seen, len(a))).to(ctx.types[0])
        # [R, M] x [M, O]: the other order takes twice as long on a CPU
        grad_B = torch.bmm(low.transpose(1, 2), g).to(ctx.types[1]).mul_(scaling.view(-1, 1, 1)).transpose(1, 2)
        return grad_x, grad_d, None, None, grad_A, grad_B, None


class SharedProduct(torch.autograd.Function):
    """y = x W^T + bias + b · ((l · (d A^T)) B^T), slice by slice, with one frozen pair A, B for all of them (VeRA).

    x [N, I]; d [N, I], the adapters' view of x after dropout, or None where it is x; weight [O, I], bias [O] or None, A
    [R, I], B [O, R], frozen and in x's type; l [K, R] and b [K, O] in their own type. Gives y [N, O]. No copy of the
    pair is made for a slice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        d: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        l: Tensor,
        b: Tensor,
    ) -> Tensor:
        low = (x if d is None else d) @ A.T
        up = (_slices(low, len(l)) * l.to(x.dtype).unsqueeze(1)).view_as(low) @ B.T
        y = F.linear(x, weight, bias)
        _slices(y, len(l)).addcmul_(_slices(up, len(l)), b.to(x.dtype).unsqueeze(1))
        ctx.save_for_backward(weight, A, B, low, l, b)
        ctx.apart = d is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, low, l, b = ctx.saved_tensors
        g, own, by_l = _slices(grad, len(l)), _slices(low, len(l)), l.to(grad.dtype).unsqueeze(1)
        grad_scaled = _slices((g * b.to(grad.dtype).unsqueeze(1)).view_as(grad) @ B, len(l))
        grad_l = (grad_scaled.to(l.dtype) * own).sum(1)
        # one [O, R] at a time: the sum over rows comes first, so nothing of the size of y is kept or made again
        grad_b = torch.stack([((rows.T @ z).to(b.dtype) * B).sum(1) for rows, z in zip(g, own * by_l, strict=True)])
        grad_low = (grad_scaled * by_l).view_as(low)
        grad_x = grad_d = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if not ctx.apart:
                grad_x.addmm_(grad_low, A)
        if ctx.needs_input_grad[1]:
            grad_d = grad_low @ A
        return grad_x, grad_d, None, None, None, None, grad_l, grad_b


def _slices(x: Tensor, size: int) -> Tensor:
    """Return x [K * M, ...] as [K, M, ...]."""
    return x.view(size, -1, x.shape[-1])
