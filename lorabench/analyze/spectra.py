"""Spectra of weight updates: singular values, subspaces, intruder dimensions. Pure functions of tensors, in float64.

Every matrix is that of a layer's map x -> W x, [O, I]. A factored update dW = scaling * B @ A is never formed: QR of B
and of A^T leave an r x r matrix to decompose. Shape letters: I in, O out, r rank, n and m numbers of directions, d
their width. Sources: the LoRA paper (arXiv 2106.09685, section 7 and appendix G) and, for intruders, arXiv 2410.21228.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INTRUDER_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MAX_INTRUDER_VECTORS = 10  # singular vectors of W + dW looked at for intruders


class SVD(NamedTuple):
    """U [O, n], S [n] descending, Vh [n, I]; n = min(O, I), of a factored update min(O, I, r)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def svd(W: Tensor) -> SVD:
    """Return the SVD of a dense matrix [O, I]."""
    return SVD(*torch.linalg.svd(W.double(), full_matrices=False))


def svd_of_product(B: Tensor, A: Tensor, scaling: float = 1.0) -> SVD:
    """Return the SVD of scaling * B @ A with B [O, r], A [r, I].

    It costs two QR decompositions and one SVD of r x r.
    """
    Q_out, R_out = torch.linalg.qr(B.double())
    Q_in, R_in = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(scaling * (R_out @ R_in.T), full_matrices=False)
    return SVD(Q_out @ U, S, Vh @ Q_in.T)


def numerical_rank(S: Tensor, O: int, I: int) -> int:
    """Return how many singular values of an [O, I] matrix are above float64's rounding. Others mean nothing."""
    if not len(S) or not float(S[0]) > 0:
        return 0
    rounding = S[0] * max(O, I) * torch.finfo(torch.float64).eps
    return int((S.double() > rounding).sum())


# -- sizes and ranks -------------------------------------------------------------------------------------------------


def relative_norm(S: Tensor, W: Tensor) -> float:
    """Return ||dW||_F / ||W||_F from dW's singular values."""
    return float(S.double().norm() / W.double().norm())


def stable_rank(S: Tensor) -> float:
    """Return ||dW||_F^2 / ||dW||_2^2, between 1 and the rank; NaN for a zero matrix."""
    share = S.double() / S.max()
    return float(share.square().sum())


def effective_rank(S: Tensor) -> float:
    """Return the exponential of the entropy of S / sum(S), between 1 and the rank; NaN for a zero matrix.

    Source: Roy & Vetterli, EUSIPCO 2007.
    """
    share = S.double() / S.sum()
    return float(torch.special.entr(share).sum().exp())


def variance_rank(S: Tensor, share: float = 0.9) -> int:
    """Return the fewest leading directions that hold `share` of ||dW||_F^2; 0 for a zero matrix."""
    energy = S.double().square().cumsum(0)
    if not len(S) or not float(energy[-1]) > 0:
        return 0
    bound = share * energy[-1] * (1 - 1e-12)  # nine of ten equal values hold .9, whatever rounding says
    return min(int((energy < bound).sum()) + 1, len(S))


# -- W as dW sees it -------------------------------------------------------------------------------------------------


def projected_norm(U: Tensor, Vh: Tensor, W: Tensor) -> float:
    """Return ||U^T W V||_F: what W [O, I] holds in the directions U [O, n], Vh [n, I]."""
    return float((U.T @ (W.double() @ Vh.T)).norm())


def random_projected_norm(norm: float, n: int, O: int, I: int) -> float:
    """Return the root mean square of `projected_norm` over random directions: n / sqrt(O I) of W's Frobenius norm."""
    return norm * n / math.sqrt(O * I)


def amplification(update: SVD, W: Tensor, n: int | None = None) -> float:
    """Return ||dW||_F / ||U^T W V||_F over dW's n leading directions; NaN for a zero update.

    n: None for all, as for an adapter. Source: the LoRA paper, section 7.3.
    """
    n = len(update.S) if n is None else n
    norm = float(update.S.norm())
    return norm / projected_norm(update.U[:, :n], update.Vh[:n], W) if norm > 0 and n else math.nan


# -- subspaces -------------------------------------------------------------------------------------------------------


def subspace_similarity(V: Tensor, V_other: Tensor) -> Tensor:
    """Return phi(i, j) = ||V[:i] V_other[:j]^T||_F^2 / min(i, j) in [0, 1], for all i <= n and j <= m at once: [n, m].

    V [n, d], V_other [m, d]: orthonormal rows, most important first (Vh of an SVD). Entry [i - 1, j - 1] is phi(i, j).
    Source: the LoRA paper, section 7.2 and appendix G.
    """
    sums = (V.double() @ V_other.double().T).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in sums.shape)
    return sums / torch.minimum(i[:, None], j[None])


def random_similarity(i: int, j: int, d: int) -> float:
    """Return the mean of phi(i, j) between independent random subspaces of R^d: i j / d over min(i, j)."""
    return max(i, j) / d


# -- intruders -------------------------------------------------------------------------------------------------------


def largest_cosines(U: Tensor, tuned: Tensor, top: int = MAX_INTRUDER_VECTORS) -> Tensor:
    """Return the largest |cosine| of each of the `top` leading left singular vectors of W + dW with one of W's: [top].

    U [O, n]: W's left singular vectors. tuned [O, I]: W + dW. Source: the authors' code, which takes left vectors.
    """
    leading = svd(tuned).U[:, :top]
    return (leading.T @ U.double()).abs().amax(1)


def intruder_dimensions(
    U: Tensor, tuned: Tensor, *, top: int = MAX_INTRUDER_VECTORS, thresholds: Sequence[float] = INTRUDER_THRESHOLDS
) -> dict[float, int]:
    """Count the leading singular vectors of W + dW that resemble none of W's, by threshold.

    A vector counts where its cosine from `largest_cosines` is below the threshold. Source: arXiv 2410.21228, section 4.
    """
    cosines = largest_cosines(U, tuned, top)
    return {threshold: int((cosines < threshold).sum()) for threshold in thresholds}
