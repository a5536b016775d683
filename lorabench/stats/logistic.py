"""Multinomial logistic regression with an L2 penalty.

Shape letters: N examples, D features, C classes.
"""

from __future__ import annotations

import numpy as np


def fit(x: np.ndarray, y: np.ndarray, classes: int, *, l2: float = 1.0) -> np.ndarray:
    """Fit weights [D + 1, C], the last row the intercepts, to features x [N, D] and labels y [N] in [0, C).

    They minimise the summed cross-entropy plus l2 / 2 times the squared weights; intercepts are not penalised.
    Full-batch L-BFGS from zero, so the same data give the same weights. With C above 2 this is scikit-learn's
    LogisticRegression(C=1 / l2); with C = 2 its C is 2 / l2, as there one vector stands for two.
    """
    from scipy.optimize import minimize

    n, d = x.shape
    label_entries = np.arange(n), y

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(d + 1, classes)
        z = log_softmax(x @ w[:d] + w[d])
        error = np.exp(z)
        error[label_entries] -= 1.0
        gradient = np.vstack([x.T @ error + l2 * w[:d], error.sum(0)])
        return float(-z[label_entries].sum() + l2 / 2 * np.square(w[:d]).sum()), gradient.ravel()

    start = np.zeros((d + 1) * classes)
    options = {"maxiter": 2000, "gtol": 1e-5, "ftol": 1e-12}
    weights: np.ndarray = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x.reshape(d + 1, classes)
    return weights


def probabilities(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Class probabilities [N, C] of features x [N, D] under weights [D + 1, C]."""
    return np.exp(log_softmax(x @ weights[:-1] + weights[-1]))


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax of z over its last axis."""
    z = z - z.max(-1, keepdims=True)
    log_probabilities: np.ndarray = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return log_probabilities


def held_out_accuracy(
    x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, *, l2: float = 1.0
) -> float:
    """Accuracy on x_test [M, D] of a classifier that is fitted on x [N, D].

    Features are standardised with the mean and spread of x.
    """
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    weights = fit((x - mean) / spread, y, int(max(y.max(), y_test.max())) + 1, l2=l2)
    predicted = probabilities(weights, (x_test - mean) / spread).argmax(1)
    return float(np.mean(predicted == y_test))
