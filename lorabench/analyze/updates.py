"""How training changed one layer's weight W [O, I], by the adapter's kind. Pure functions of tensors, in float64.

lora   dW = scaling * B @ A                                       rank r, never formed for its singular values
vera   dW = diag(b) B diag(d) A, B and A frozen and shared        rank r, never formed for them either
dora   dW = diag(m / n) (W + scaling * B @ A) - W, n row norms    of W's own rank: no factors, so it is formed
ia3    dW = diag(l) W - W, on the input W diag(l) - W             of W's own rank: formed
full   dW = W' - W                                                formed

Shape letters: I in, O out, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorabench.adapters.init import Projections, projection
from lorabench.analyze import spectra
from lorabench.analyze.spectra import SVD
from lorabench.config.contracts.method import AdapterSpec

FACTORED_KINDS = ("lora", "vera")  # kinds whose dW is a product of two factors
KINDS_WITH_RANK = ("lora", "dora", "vera")


@dataclass(frozen=True)
class LayerUpdate:
    """What one run trained on one layer.

    tensors: by short name, as saved, such as lora_A [r, I]. Full fine-tuning has {"weight": W'} as [O, I].
    """

    spec: AdapterSpec | None  # None: full fine-tuning
    tensors: Mapping[str, Tensor]
    projections: Projections = field(default_factory=dict)  # VeRA's pairs drawn so far

    @property
    def kind(self) -> str:
        return self.spec.kind if self.spec else "full"

    @property
    def r(self) -> int | None:
        return self.spec.r if self.spec and self.kind in KINDS_WITH_RANK else None

    @property
    def factored(self) -> bool:
        return self.kind in FACTORED_KINDS

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.tensors.values())

    def fits(self, O: int, I: int) -> bool:
        """Whether every tensor has the size that a weight [O, I] asks for."""
        if self.spec is None:
            return tuple(self.tensors["weight"].shape) == (O, I)
        axis_sizes = {
            "lora_A": (1, I),
            "lora_B": (0, O),
            "magnitude": (0, O),
            "vera_lambda_b": (0, O),
            "ia3_l": (0, I if self.kind == "ia3_input" else O),
        }
        for part, tensor in self.tensors.items():
            if part in axis_sizes:
                axis, size = axis_sizes[part]
                matrix = tensor.flatten(1) if tensor.dim() > 2 else tensor
                if matrix.shape[axis] != size:
                    return False
        return True

    def factors(self, I: int) -> tuple[Tensor, Tensor, float]:
        """Return B [O, r], A [r, I] and scaling. scaling * B @ A is dW; for DoRA, what is added before rows are
        scaled."""
        assert self.spec is not None
        if self.kind == "vera":
            d, b = self._double("vera_lambda_d"), self._double("vera_lambda_b")
            A, B = projection(self.projections, self.spec, d)
            return b[:, None] * B[: len(b)], d[:, None] * A[:, :I], self.spec.scaling
        return self._double("lora_B").flatten(1), self._double("lora_A").flatten(1), self.spec.scaling

    def tuned_weight(self, W: Tensor) -> Tensor:
        """Return W + dW [O, I]."""
        if self.spec is None:
            return self._double("weight")
        if self.kind.startswith("ia3"):
            scale = self._double("ia3_l")
            return W * scale if self.kind == "ia3_input" else W * scale[:, None]
        B, A, scaling = self.factors(W.shape[1])
        tuned = W + scaling * (B @ A)
        if self.kind == "dora":
            norms = tuned.norm(dim=1).clamp_min(torch.finfo().tiny)  # a row of zeros stays one
            return tuned * (self._double("magnitude") / norms)[:, None]
        return tuned

    def svd(self, W: Tensor | None) -> SVD:
        """Return the SVD of dW. W [O, I]: None for LoRA, which does not need it."""
        if self.kind == "lora":
            return spectra.svd_of_product(*self.factors(0))
        assert W is not None
        if self.factored:
            return spectra.svd_of_product(*self.factors(W.shape[1]))
        return spectra.svd(self.tuned_weight(W) - W)

    def row_changes(self, W: Tensor) -> tuple[float, float]:
        """Return how W's rows w changed: the mean of | ||w'|| / ||w|| - 1 |, and the mean of 1 - cos(w', w).

        Source: section 3.2 of DoRA (arXiv 2402.09353), where the first is the difference itself. Factors are used where
        there are any. 1 - cos is computed from the part of dw across w, which avoids cancellation.
        """
        squares = W.square().sum(1)
        if self.factored or self.kind == "dora":
            B, A, scaling = self.factors(W.shape[1])
            along = scaling * (B * (W @ A.T)).sum(1)
            added = scaling**2 * ((B @ (A @ A.T)) * B).sum(1)
        else:
            dW = self.tuned_weight(W) - W
            along, added = (dW * W).sum(1), dW.square().sum(1)
        after = squares + 2 * along + added
        cos = (squares + along) / (squares * after).sqrt()
        across = (added - along.square() / squares).clamp_min(0) / after
        norms = after.sqrt()
        if self.kind == "dora":
            norms = self._double("magnitude").flatten()
            cos = cos * norms.sign()
            norms = norms.abs()
        turned = torch.where(cos > 0, across / (1 + cos), 1 - cos)
        moved, kept = (norms / squares.sqrt() - 1).abs(), (squares > 0) & (after > 0)
        return float(moved[squares > 0].mean()), float(turned[kept].mean())

    def _double(self, part: str) -> Tensor:
        return self.tensors[part].detach().double()
