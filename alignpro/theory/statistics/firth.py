"""Logistic regression on one variable with Firth's (1993) penalty."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.special

from alignpro.theory.statistics.values import FloatArray

_STEPS = 100
_LONGEST_STEP = 40.0
_SHORTEST_STEP = 1e-5


@dataclass(frozen=True)
class LogisticFit:
    """The model at some θ and β.

    Of the information I = Xᵀ W X, with rows (1, x_i) of X and W = diag p(1 − p), it holds the mean m and the sum of squares s
    of x under the weights W of sum a: I⁻¹ = [[1/a + m²/s, −m/s], [−m/s, 1/s]] and |I| = a s. I's own elements would cancel
    where nearly all the weight is on one x.
    """

    theta: float
    slope: float
    """β"""
    p: FloatArray
    """(N,)"""
    weights: FloatArray
    """(N,) p(1 − p)."""
    total: float
    mean: float
    squares: float
    value: float
    """ℓ"""


@dataclass(frozen=True)
class FirthLogistic:
    """E[y_i] = σ(θ + β x_i) with the penalised log-likelihood ℓ = Σ y log p + (1 − y) log(1 − p) + ½ log |I|.

    Without the penalty, a y that is 1 everywhere, or wherever x is positive, has its maximum at infinity. Its derivative
    turns the score into Xᵀ (y − p + h (½ − p)), where h is the diagonal of the hat matrix W^½ X I⁻¹ Xᵀ W^½.
    """

    x: FloatArray
    """(N,), not all the same."""
    y: FloatArray
    """(N,), in [0, 1]."""

    def fit(self) -> LogisticFit:
        """The maximum of ℓ, by steps I⁻¹ · score that are halved until they raise it."""
        return self._raised(self.at(0.0, 0.0), self._step)

    def profile(self, theta: float, maximum: LogisticFit) -> LogisticFit:
        """The maximum of ℓ over β alone, from where the one over both says that it is."""
        falls = float(maximum.weights @ self.x) / float(maximum.weights @ self.x**2)  # −dβ/dθ
        return self._raised(self.at(theta, maximum.slope - falls * (theta - maximum.theta)), self._slope_step)

    def at(self, theta: float, slope: float) -> LogisticFit:
        """The model at θ and β."""
        x, logits = self.x, theta + slope * self.x
        p = scipy.special.expit(logits)
        weights = p * scipy.special.expit(-logits)
        total = float(weights.sum())
        mean = float(weights @ x) / total
        squares = float(weights @ (x - mean) ** 2)
        likelihood = float((self.y * logits - np.logaddexp(0.0, logits)).sum())
        value = likelihood + 0.5 * (math.log(total) + math.log(squares))
        return LogisticFit(theta, slope, p, weights, total, mean, squares, value)

    def _raised(self, fit: LogisticFit, step_of: Callable[[LogisticFit], tuple[float, float]]) -> LogisticFit:
        for _ in range(_STEPS):
            theta, slope = step_of(fit)
            size = max(abs(theta), abs(slope))
            share = min(1.0, _LONGEST_STEP / size) if size else 0.0
            while share * size >= _SHORTEST_STEP:
                raised = self.at(fit.theta + share * theta, fit.slope + share * slope)
                if raised.value > fit.value:
                    break
                share /= 2
            else:
                return fit
            fit = raised
        return fit

    def _step(self, fit: LogisticFit) -> tuple[float, float]:
        of_theta, of_slope = self._score(fit)
        slope = (of_slope - fit.mean * of_theta) / fit.squares
        return of_theta / fit.total - fit.mean * slope, slope

    def _slope_step(self, fit: LogisticFit) -> tuple[float, float]:
        return 0.0, self._score(fit)[1] / float(fit.weights @ self.x**2)

    def _score(self, fit: LogisticFit) -> tuple[float, float]:
        """The derivatives of ℓ by θ and β."""
        hat = fit.weights * (1 / fit.total + (self.x - fit.mean) ** 2 / fit.squares)
        residuals = self.y - fit.p + hat * (0.5 - fit.p)
        return float(residuals.sum()), float(residuals @ self.x)
