"""Multinomial logistic regression with an L2 penalty, to the optimum. Shape letters: N examples, D features, C classes."""

from __future__ import annotations

import numpy as np


def fit(x: np.ndarray, y: np.ndarray, classes: int, *, l2: float = 1.0) -> np.ndarray:
    """Weights [D + 1, C], the last row the intercepts, that minimise the summed cross-entropy of x [N, D], y [N] in
    [0, C) plus l2 / 2 times the squared weights; intercepts are spared.

    Full-batch L-BFGS from zero, so the same data give the same weights. With C above 2 this is scikit-learn's
    LogisticRegression(C=1 / l2); with C = 2 its C is 2 / l2, as there one vector stands for two.
    """
    from scipy.optimize import minimize

    n, d = x.shape
    hit = np.arange(n), y

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(d + 1, classes)
        z = log_softmax(x @ w[:d] + w[d])
        error = np.exp(z)
        error[hit] -= 1.0
        gradient = np.vstack([x.T @ error + l2 * w[:d], error.sum(0)])
        return float(-z[hit].sum() + l2 / 2 * np.square(w[:d]).sum()), gradient.ravel()

    found = minimize(
        loss, np.zeros((d + 1) * classes), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "gtol": 1e-5, "ftol": 1e-12}
    )  # fmt: skip
    weights: np.ndarray = found.x.reshape(d + 1, classes)
    return weights


def probabilities(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[N, C] of x [N, D] under weights [D + 1, C]."""
    return np.exp(log_softmax(x @ weights[:-1] + weights[-1]))


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    z = z - z.max(-1, keepdims=True)
    made: np.ndarray = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return made


def held_out_accuracy(
    x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, *, l2: float = 1.0
) -> float:
    """Share right on x_test [M, D] of a classifier fitted on x [N, D]; features are standardised by those of x."""
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    weights = fit((x - mean) / spread, y, int(max(y.max(), y_test.max())) + 1, l2=l2)
    said = probabilities(weights, (x_test - mean) / spread).argmax(1)
    return float(np.mean(said == y_test))
