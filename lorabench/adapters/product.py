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
        ctx.save_for_backward(x if d is None else d, weight, a, b, low, scaling)
        ctx.apart, ctx.types = d is not None, (A.dtype, B.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d, weight, a, b, low, scaling = ctx.saved_tensors
        g, rows = _slices(grad, len(a)), _slices(d, len(a))
        grad_low = torch.bmm(g, b)
        grad_x = grad_d = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if not ctx.apart:
                _slices(grad_x, len(a)).baddbmm_(grad_low, a)
        if ctx.needs_input_grad[1]:
            grad_d = torch.bmm(grad_low, a).view_as(d)
        # [R, M] x [M, O]: the other order takes twice as long on a CPU
        grad_B = torch.bmm(low.transpose(1, 2), g).to(ctx.types[1]).mul_(scaling.view(-1, 1, 1)).transpose(1, 2)
        grad_A = torch.bmm(grad_low.transpose(1, 2), rows).to(ctx.types[0])
        return grad_x, grad_d, None, None, grad_A, grad_B, None


def _slices(x: Tensor, size: int) -> Tensor:
    """[K * M, ...] -> [K, M, ...]."""
    return x.view(size, -1, x.shape[-1])
