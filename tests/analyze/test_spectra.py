"""Spectra on matrices whose answers are known by construction, and against numpy's dense SVD in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lorabench.analyze import spectra


def orthonormal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """[rows, columns] with orthonormal columns, uniform (Haar) by the sign of R's diagonal."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))


def tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


class TestSVDOfProduct:
    @pytest.mark.parametrize(("O", "I", "r"), [(30, 20, 4), (20, 30, 4), (7, 40, 7), (12, 9, 1), (3, 20, 5), (6, 6, 6)])
    @pytest.mark.parametrize("scaling", [1.0, 4.0, -0.25])
    def test_against_a_dense_svd(self, O: int, I: int, r: int, scaling: float) -> None:
        rng = np.random.default_rng(r)
        B, A = rng.standard_normal((O, r)), rng.standard_normal((r, I))
        dense = scaling * B @ A
        U, S, Vh = spectra.svd_of_product(tensor(B), tensor(A), scaling)
        n = min(O, I, r)
        assert U.shape == (O, n) and S.shape == (n,) and Vh.shape == (n, I)
        assert np.allclose(S, np.linalg.svd(dense, compute_uv=False)[:n], rtol=1e-12, atol=0)
        assert np.allclose((U * S) @ Vh, dense, rtol=0, atol=1e-12 * S[0].item())
        for vectors in (U.T @ U, Vh @ Vh.T):
            assert np.allclose(vectors, np.eye(n), rtol=0, atol=1e-13)

    def test_chosen_singular_values_and_directions(self) -> None:
        left, right, s = orthonormal(25, 3, 1), orthonormal(18, 3, 2), np.array([5.0, 2.0, 0.5])
        mixing = orthonormal(3, 3, 3) @ np.diag([1e2, 1.0, 1e-2])  # B and A alone say nothing about dW
        found = spectra.svd_of_product(tensor(left * s @ mixing), tensor(np.linalg.inv(mixing) @ right.T), 2.0)
        assert np.allclose(found.S, 2 * s, rtol=1e-9, atol=0)
        assert np.allclose(np.abs(np.diag(found.U.numpy().T @ left)), 1, atol=1e-9)
        assert np.allclose(np.abs(np.diag(found.Vh.numpy() @ right)), 1, atol=1e-9)

    def test_dW_is_not_formed(self) -> None:
        """As a matrix this update would take 80 GB."""
        n, s = 100_000, torch.tensor([3.0, 4.0], dtype=torch.float64)
        B, A = torch.zeros(n, 2, dtype=torch.float64), torch.zeros(2, n, dtype=torch.float64)
        B[[7, 99_999], [0, 1]] = s
        A[[0, 1], [5, 50_000]] = 1
        found = spectra.svd_of_product(B, A)
        assert found.S.tolist() == pytest.approx([4, 3], rel=1e-14)
        assert abs(found.U[99_999, 0].item()) == pytest.approx(1) and abs(found.Vh[0, 50_000].item()) == pytest.approx(
            1
        )

    def test_float32_factors_are_taken_as_they_are(self) -> None:
        B, A = torch.randn(20, 3), torch.randn(3, 15)
        found = spectra.svd_of_product(B, A)
        dense = B.numpy().astype(np.float64) @ A.numpy().astype(np.float64)
        assert found.S.dtype == torch.float64
        assert np.allclose(found.S, np.linalg.svd(dense, compute_uv=False)[:3], rtol=1e-12, atol=0)

    def test_numerical_rank(self) -> None:
        B, A = torch.randn(20, 4), torch.randn(4, 15)
        B[:, 3] = B[:, 0]
        assert spectra.numerical_rank(spectra.svd_of_product(B, A).S, 20, 15) == 3
        assert spectra.numerical_rank(spectra.svd_of_product(B * 0, A).S, 20, 15) == 0
        assert spectra.numerical_rank(spectra.svd(torch.randn(20, 15)).S, 20, 15) == 15


class TestRanks:
    def test_equal_values_use_every_direction(self) -> None:
        for n in (1, 3, 10):
            S = torch.full((n,), 0.7, dtype=torch.float64)
            assert spectra.stable_rank(S) == pytest.approx(n)
            assert spectra.effective_rank(S) == pytest.approx(n)

    def test_by_hand(self) -> None:
        S = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        assert spectra.stable_rank(S) == pytest.approx(22 / 16)
        assert spectra.effective_rank(S) == pytest.approx(math.exp(stats.entropy([4, 2, 1, 1])))
        assert spectra.effective_rank(S) == pytest.approx(2**1.75)  # entropy of (1/2, 1/4, 1/8, 1/8): 1.75 bits

    def test_scale_does_not_matter(self) -> None:
        S = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
        for measure in (spectra.stable_rank, spectra.effective_rank, spectra.variance_rank):
            assert measure(S) == pytest.approx(measure(S * 1e-9))

    @pytest.mark.parametrize(
        ("energy", "share", "rank"),
        [([1] * 10, 0.9, 9), ([1] * 10, 0.91, 10), ([0.5, 0.3, 0.1, 0.1], 0.9, 3), ([0.95, 0.05], 0.9, 1),
         ([1, 0, 0], 1.0, 1), ([1], 0.9, 1), ([0, 0], 0.9, 0), ([0.5, 0.25, 0.25], 0.5, 1)],
    )  # fmt: skip
    def test_variance_rank(self, energy: list[float], share: float, rank: int) -> None:
        assert spectra.variance_rank(torch.tensor(energy, dtype=torch.float64).sqrt(), share) == rank

    def test_a_zero_update_has_no_rank(self) -> None:
        found = spectra.svd_of_product(torch.zeros(5, 2), torch.randn(2, 6))
        assert math.isnan(spectra.stable_rank(found.S)) and math.isnan(spectra.effective_rank(found.S))
        assert math.isnan(spectra.amplification(found, torch.randn(5, 6)))
        assert spectra.variance_rank(found.S) == 0
        assert spectra.relative_norm(found.S, torch.randn(5, 6)) == 0


class TestWBesideDW:
    def test_amplification_by_construction(self) -> None:
        """W holds 3 and 4 in dW's directions, and 100 elsewhere; dW is 6 and 8: 10 / 5."""
        left, right = orthonormal(20, 3, 1), orthonormal(15, 3, 2)
        W = left @ np.diag([3.0, 4.0, 100.0]) @ right.T
        dW = spectra.svd_of_product(tensor(left[:, :2] * [6.0, 8.0]), tensor(right[:, :2].T))
        assert spectra.projected_norm(dW.U, dW.Vh, tensor(W)) == pytest.approx(5, rel=1e-12)
        assert spectra.amplification(dW, tensor(W)) == pytest.approx(2, rel=1e-12)
        assert spectra.amplification(dW, tensor(W), 1) == pytest.approx(10 / 4, rel=1e-12)  # its first direction: the 8

    def test_against_dense_numpy(self) -> None:
        rng = np.random.default_rng(0)
        W, B, A = rng.standard_normal((14, 9)), rng.standard_normal((14, 3)), rng.standard_normal((3, 9))
        U, _, Vh = np.linalg.svd(B @ A)
        found = spectra.svd_of_product(tensor(B), tensor(A))
        expected = np.linalg.norm(B @ A) / np.linalg.norm(U[:, :3].T @ W @ Vh[:3].T)
        assert spectra.amplification(found, tensor(W)) == pytest.approx(expected, rel=1e-11)
        assert spectra.relative_norm(found.S, tensor(W)) == pytest.approx(
            np.linalg.norm(B @ A) / np.linalg.norm(W), rel=1e-12
        )

    def test_random_directions_by_simulation(self) -> None:
        rng, (O, I, n) = np.random.default_rng(1), (12, 9, 3)
        W = tensor(rng.standard_normal((O, I)) * np.arange(1, I + 1))
        squares = [
            spectra.projected_norm(tensor(orthonormal(O, n, 2 * k)), tensor(orthonormal(I, n, 2 * k + 1).T), W) ** 2
            for k in range(2000)
        ]
        expected = spectra.random_projected_norm(float(W.norm()), n, O, I) ** 2
        assert abs(np.mean(squares) - expected) < 4 * stats.sem(squares)


class TestSubspaces:
    def test_against_its_definition(self) -> None:
        V, other = orthonormal(16, 4, 1).T, orthonormal(16, 6, 2).T
        grid = spectra.subspace_similarity(tensor(V), tensor(other))
        assert grid.shape == (4, 6)
        for i in range(1, 5):
            for j in range(1, 7):
                expected = np.linalg.norm(V[:i] @ other[:j].T) ** 2 / min(i, j)
                assert grid[i - 1, j - 1].item() == pytest.approx(expected, rel=1e-12)
        assert torch.allclose(grid, spectra.subspace_similarity(tensor(other), tensor(V)).T, atol=1e-14)
        assert grid.min() >= 0 and grid.max() <= 1

    def test_nested_subspaces(self) -> None:
        """Three directions, turned among themselves, are the first three of eight: phi is 1 from there on."""
        wide = orthonormal(20, 8, 1)
        inside = (wide[:, :3] @ orthonormal(3, 3, 2)).T
        grid = spectra.subspace_similarity(tensor(inside), tensor(wide.T))
        assert torch.allclose(grid[:, 2:], torch.ones(3, 6, dtype=torch.float64), atol=1e-13)
        assert grid[0, 0] < 0.999  # turned: the first directions differ

    def test_orthogonal_subspaces(self) -> None:
        both = orthonormal(20, 8, 3).T
        assert spectra.subspace_similarity(tensor(both[:3]), tensor(both[3:])).max() < 1e-28

    def test_the_random_baseline_by_simulation(self) -> None:
        d, n, m, draws = 24, 3, 7, 1500
        grids = np.stack([
            spectra.subspace_similarity(tensor(orthonormal(d, n, 2 * k).T), tensor(orthonormal(d, m, 2 * k + 1).T)).numpy()
            for k in range(draws)
        ])  # fmt: skip
        expected = np.array([[spectra.random_similarity(i, j, d) for j in range(1, m + 1)] for i in range(1, n + 1)])
        assert expected[0, 0] == 1 / 24 and expected[2, 6] == 7 / 24
        error = np.abs(grids.mean(0) - expected) / (grids.std(0, ddof=1) / np.sqrt(draws))
        assert error.max() < 4.5


class TestIntruders:
    """W [60, 30] with chosen singular vectors; outside are left directions that W does not have at all."""

    S = np.concatenate([np.linspace(10, 5, 20), np.full(10, 1e-6) * np.arange(10, 0, -1)])

    @pytest.fixture
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        left = orthonormal(60, 35, 1)
        return left[:, :30], left[:, 30:], orthonormal(30, 30, 2)

    def of(self, left: np.ndarray, right: np.ndarray) -> Tensor:
        return tensor(left * self.S @ right.T)

    def test_none_without_an_update(self, parts: tuple[np.ndarray, ...]) -> None:
        left, _, right = parts
        W = self.of(left, right)
        assert spectra.intruder_dimensions(spectra.svd(W).U, W) == dict.fromkeys(spectra.INTRUDER_THRESHOLDS, 0)

    def test_planted_ones_are_counted(self, parts: tuple[np.ndarray, ...]) -> None:
        """Two large new directions, on inputs that W barely reads: the leading vectors of W + dW, unlike any of W's."""
        left, outside, right = parts
        W = self.of(left, right)
        dW = outside[:, :2] * [20.0, 15.0] @ right[:, -2:].T
        cosines = spectra.largest_cosines(spectra.svd(W).U, W + tensor(dW))
        assert cosines.shape == (10,)
        assert cosines[:2].max() < 1e-5 and cosines[2:].min() > 1 - 1e-9
        assert set(spectra.intruder_dimensions(spectra.svd(W).U, W + tensor(dW)).values()) == {2}

    def test_thresholds(self, parts: tuple[np.ndarray, ...]) -> None:
        """Leading vectors turned away from W's own by known angles; one that is turned beyond the ten does not count."""
        left, outside, right = parts
        turned = left.copy()
        for k, (column, cosine) in enumerate({0: 0.45, 3: 0.65, 9: 0.85, 12: 0.1}.items()):
            turned[:, column] = cosine * left[:, column] + math.sqrt(1 - cosine**2) * outside[:, k]
        found = spectra.intruder_dimensions(spectra.svd(self.of(left, right)).U, self.of(turned, right))
        assert found == {0.3: 0, 0.4: 0, 0.5: 1, 0.6: 1, 0.7: 2, 0.8: 2, 0.9: 3}
        more = spectra.intruder_dimensions(
            spectra.svd(self.of(left, right)).U, self.of(turned, right), top=15, thresholds=[0.3]
        )
        assert more == {0.3: 1}

    def test_a_sign_is_no_difference(self, parts: tuple[np.ndarray, ...]) -> None:
        left, _, right = parts
        assert spectra.largest_cosines(spectra.svd(self.of(left, right)).U, -self.of(left, right)).min() > 1 - 1e-9

    def test_fewer_directions_than_ten(self) -> None:
        W = torch.randn(4, 6)
        assert spectra.intruder_dimensions(spectra.svd(W).U, W)[0.9] == 0
