"""The win rate that would be seen between responses of equal length: a logistic model with a length term."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.special
import scipy.stats

from alignpro.theory.statistics.clusters import Clusters
from alignpro.theory.statistics.estimates import Estimate, Interval, NotEstimable
from alignpro.theory.statistics.values import FloatArray

SAME_LENGTHS = "no pair differs in length: the raw rate is that at equal lengths"
FEW_CLUSTERS = "there are fewer than three prompts"

_STEPS = 50
_LONGEST_STEP = 5.0


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal lengths."""

    rate: Estimate
    slope: float
    """β: what the log odds gain where the response is so much longer that the length term is at its end, 1."""


def length_controlled(preferred: FloatArray, longer: FloatArray, clusters: Clusters) -> LengthControlled:
    """The win rate at equal lengths, after the length-controlled AlpacaEval (Dubois et al., 2024).

    Let y_i in [0, 1] be the share of both orders in which a response is preferred, d_i by how much it is longer than the
    other one, and s the root mean square of d. The model is

        E[y_i] = σ(θ + β x_i),   x_i = tanh(d_i / s).

    The length enters through tanh, since a judge that likes long responses does not like one twice as much that is twice as
    much longer, and since a few very long ones must not decide the fit. At d = 0 the length term vanishes, so σ(θ) is the
    rate at equal lengths, and β > 0 says that length by itself wins.

    θ and β maximise Σ y log p + (1 − y) log(1 − p) + ½ log |I|, with p = σ(Xb), W = diag p(1 − p) and I = Xᵀ W X. The last
    term is Firth's (1993): without it, a response that wins everywhere, or a judge that always takes the longer one, has its
    maximum at infinity (Heinze & Schemper, 2002). Its derivative turns the score into Xᵀ (y − p + h (½ − p)), where h is
    the diagonal of the hat matrix W^½ X I⁻¹ Xᵀ W^½, and b + I⁻¹ · score is the step that is repeated.

    y need not be 0 or 1 and pairs of a cluster are alike, so the error is that of the quasi-likelihood (Papke & Wooldridge,
    1996), I⁻¹ (Σ_g u_g u_gᵀ) I⁻¹ · G/(G − 1) with u_g the sum of X_i (y_i − p_i) over the pairs of cluster g. The interval
    of θ, by Student's t with G − 1 degrees of freedom, is carried over to σ(θ).

    Args:
        preferred: (N,) y, in [0, 1].
        longer: (N,) d, in any unit of length.
        clusters: The pairs that belong together, such as those of one prompt.

    Returns:
        The rate; its p-value is that of θ = 0, a rate of one half.
    """
    scale = float(np.sqrt((longer**2).mean()))
    if scale == 0:
        return LengthControlled(Estimate(float(preferred.mean()), NotEstimable(SAME_LENGTHS)), 0.0)
    X = np.stack([np.ones_like(longer), np.tanh(longer / scale)], axis=1)  # (N, 2)
    b = _fit(X, preferred)
    value = float(scipy.special.expit(b[0]))
    if clusters.count < 3:
        return LengthControlled(Estimate(value, NotEstimable(FEW_CLUSTERS)), float(b[1]))
    stderr = _error(X, preferred, b, clusters)
    if stderr == 0:
        return LengthControlled(Estimate(value, NotEstimable("all pairs have the same outcome")), float(b[1]))
    df = clusters.count - 1
    width = float(scipy.stats.t.ppf(0.975, df)) * stderr
    low, high = scipy.special.expit([b[0] - width, b[0] + width])
    p_value = float(2 * scipy.stats.t.sf(abs(b[0]) / stderr, df))
    return LengthControlled(Estimate(value, Interval(float(low), float(high)), p_value), float(b[1]))


def _fit(X: FloatArray, y: FloatArray) -> FloatArray:
    """(2,) θ and β."""
    b = np.zeros(X.shape[1])
    for _ in range(_STEPS):
        p = scipy.special.expit(X @ b)
        weight = p * (1 - p)
        inverse = _inverse((X * weight[:, None]).T @ X)
        hat = weight * ((X @ inverse) * X).sum(1)
        step = inverse @ (X.T @ (y - p + hat * (0.5 - p)))
        b = b + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
        if float(np.abs(step).max()) < 1e-6:
            break
    return b


def _inverse(information: FloatArray) -> FloatArray:
    """(2, 2) I⁻¹; a pseudo-inverse where all pairs have one length term, which cannot be told from θ."""
    (a, b), (_, c) = information.tolist()
    determinant = a * c - b * b
    if determinant <= 1e-12 * a * c:
        return np.asarray(np.linalg.pinv(information, hermitian=True), np.float64)
    return np.array([[c, -b], [-b, a]]) / determinant


def _error(X: FloatArray, y: FloatArray, b: FloatArray, clusters: Clusters) -> float:
    """The cluster-robust standard error of θ."""
    p = scipy.special.expit(X @ b)
    inverse = _inverse((X * (p * (1 - p))[:, None]).T @ X)
    sums = np.zeros((clusters.count, X.shape[1]))
    np.add.at(sums, clusters.numbers, X * (y - p)[:, None])
    covariance = inverse @ (sums.T @ sums) @ inverse * clusters.count / (clusters.count - 1)
    return float(np.sqrt(max(covariance[0, 0], 0.0)))
