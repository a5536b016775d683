"""What a layer's training made of its weight W [O, I], by the adapter's kind. Pure functions of tensors, in float64.

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

FACTORED = ("lora", "vera")  # kinds whose dW is a product of two factors
RANKED = ("lora", "dora", "vera")  # kinds that have an r


@dataclass(frozen=True)
class Trained:
    """One layer of a run. own: its tensors by short name, as saved; of full fine-tuning {"weight": W'} as [O, I]."""

    spec: AdapterSpec | None  # None: full fine-tuning
    own: Mapping[str, Tensor]
    projections: Projections = field(default_factory=dict)  # VeRA's pairs drawn so far

    @property
    def kind(self) -> str:
        return self.spec.kind if self.spec else "full"

    @property
    def r(self) -> int | None:
        return self.spec.r if self.spec and self.kind in RANKED else None

    @property
    def factored(self) -> bool:
        return self.kind in FACTORED

    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.own.values())

    def fits(self, O: int, I: int) -> bool:
        """Whether every tensor has the size that a weight [O, I] asks for."""
        sizes = {"lora_A": (1, I), "lora_B": (0, O), "magnitude": (0, O), "vera_lambda_b": (0, O),
                 "ia3_l": (0, I if self.kind == "ia3_input" else O)}  # fmt: skip
        if self.spec is None:
            return tuple(self.own["weight"].shape) == (O, I)
        given = {part: t.flatten(1) if t.dim() > 2 else t for part, t in self.own.items() if part in sizes}
        return all(t.shape[sizes[part][0]] == sizes[part][1] for part, t in given.items())

    def factors(self, I: int) -> tuple[Tensor, Tensor, float]:
        """B [O, r], A [r, I] and scaling: of dW, of DoRA what is added before the rows are scaled."""
        assert self.spec is not None
        if self.kind == "vera":
            d, b = self._double("vera_lambda_d"), self._double("vera_lambda_b")
            A, B = projection(self.projections, self.spec, d)
            return b[:, None] * B[: len(b)], d[:, None] * A[:, :I], self.spec.scaling
        return self._double("lora_B").flatten(1), self._double("lora_A").flatten(1), self.spec.scaling

    def tuned(self, W: Tensor) -> Tensor:
        """W + dW."""
        if self.spec is None:
            return self._double("weight")
        if self.kind.startswith("ia3"):
            scale = self._double("ia3_l")
            return W * scale if self.kind == "ia3_input" else W * scale[:, None]
        B, A, scaling = self.factors(W.shape[1])
        whole = W + scaling * (B @ A)
        if self.kind == "dora":
            norms = whole.norm(dim=1).clamp_min(torch.finfo().tiny)  # a row of zeros stays one
            return whole * (self._double("magnitude") / norms)[:, None]
        return whole

    def svd(self, W: Tensor | None) -> SVD:
        """Of dW. W: not needed by LoRA."""
        if self.kind == "lora":
            return spectra.svd_of_product(*self.factors(0))
        assert W is not None
        if self.factored:
            return spectra.svd_of_product(*self.factors(W.shape[1]))
        return spectra.svd(self.tuned(W) - W)

    def rows(self, W: Tensor) -> tuple[float, float]:
        """How W's rows w, an output's each, changed: the mean of | ||w'|| / ||w|| - 1 |, and of 1 - cos(w', w).

        Section 3.2 of DoRA (arXiv 2402.09353), where the first is the difference itself. From the factors where there
        are any, and without the cancellation of 1 - cos: only what of dw stands across w turns it.
        """
        squares = W.square().sum(1)
        if self.factored or self.kind == "dora":
            B, A, scaling = self.factors(W.shape[1])
            along = scaling * (B * (W @ A.T)).sum(1)
            added = scaling**2 * ((B @ (A @ A.T)) * B).sum(1)
        else:
            d = self.tuned(W) - W
            along, added = (d * W).sum(1), d.square().sum(1)
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
        return self.own[part].detach().double()
