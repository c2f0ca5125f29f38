"""The win rate that would be seen between responses of equal length: a logistic model with a length term."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from alignpro.theory.statistics.clusters import Clusters
from alignpro.theory.statistics.estimates import Estimate, Interval, NotEstimable
from alignpro.theory.statistics.firth import FirthLogistic, LogisticFit
from alignpro.theory.statistics.values import FloatArray

SAME_LENGTHS = "no pair differs in length: the raw rate is that at equal lengths"
ONE_DIFFERENCE = "all pairs differ by the same length: what it adds cannot be told from the rate at equal lengths"
FEW_CLUSTERS = "there are fewer than three prompts"
NO_VARIATION = "the outcomes do not vary beyond what lengths explain"

_FARTHEST = 36.0
"""|θ| at which a rate is 0 or 1 in float64."""


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal lengths."""

    rate: Estimate
    """NaN where all pairs differ by the same length."""
    slope: float
    """β: what the log odds gain where the response is so much longer that the length term is at its end, 1; NaN likewise."""


def length_controlled(preferred: FloatArray, longer: FloatArray, clusters: Clusters) -> LengthControlled:
    """The win rate at equal lengths, after the length-controlled AlpacaEval (Dubois et al., 2024).

    Let y_i in [0, 1] be the share of both orders in which a response is preferred, d_i by how much it is longer than the
    other one, and s the root mean square of d. The model is

        E[y_i] = σ(θ + β x_i),   x_i = tanh(d_i / s).

    The length enters through tanh, since a judge that likes long responses does not like one twice as much that is twice as
    much longer, and since a few very long ones must not decide the fit. At d = 0 the length term vanishes, so σ(θ) is the
    rate at equal lengths, and β > 0 says that length by itself wins. θ and β are those of `FirthLogistic`, which are finite
    for a response that wins everywhere and for a judge that always takes the longer one.

    The interval holds each θ₀ whose profile, the maximum of ℓ over β at θ = θ₀, is near enough to the maximum (Heinze &
    Schemper, 2002): 2 (ℓ(b) − ℓ(θ₀)) ≤ t² φ, with Student's t of G − 1 degrees of freedom and the `_dispersion` φ. The
    interval θ ± t · error with the error of residuals covers far too rarely where nearly all pairs are won: they vanish there.

    Args:
        preferred: (N,) y, in [0, 1].
        longer: (N,) d, in any unit of length.
        clusters: The G groups of pairs that belong together, such as those of one prompt.

    Returns:
        The rate; its p-value is that of θ = 0, a rate of one half, and is below 0.05 if and only if the interval excludes it.
    """
    scale = float(np.sqrt((longer**2).mean()))
    if scale == 0:
        return LengthControlled(Estimate(float(preferred.mean()), NotEstimable(SAME_LENGTHS)), 0.0)
    x = np.tanh(longer / scale)
    if float(x.var()) <= 1e-12 * float((x**2).mean()):
        return LengthControlled(Estimate(math.nan, NotEstimable(ONE_DIFFERENCE)), math.nan)
    model = FirthLogistic(x, preferred)
    fit = model.fit()
    value, slope = float(scipy.special.expit(fit.theta)), fit.slope
    if clusters.count < 3:
        return LengthControlled(Estimate(value, NotEstimable(FEW_CLUSTERS)), slope)
    alike = np.ptp(preferred) == 0 and 0 < preferred[0] < 1
    dispersion = 0.0 if alike else _dispersion(model, fit, clusters)
    if dispersion <= 0:
        return LengthControlled(Estimate(value, NotEstimable(NO_VARIATION)), slope)
    profile = _Profile(model, fit, dispersion)
    limit = float(scipy.stats.t.ppf(0.975, clusters.count - 1))
    low, high = (float(scipy.special.expit(profile.reaches(each))) for each in (-limit, limit))
    p_value = float(2 * scipy.stats.t.sf(abs(profile.root(0.0)), clusters.count - 1))
    return LengthControlled(Estimate(value, Interval(low, high), p_value), slope)


def _dispersion(model: FirthLogistic, fit: LogisticFit, clusters: Clusters) -> float:
    """φ, the variance of θ over that of the likelihood, as the product of two factors; neither vanishes where all pairs are won.

    The first is the variance of y over p(1 − p). It is below 1 where y is between 0 and 1: E y² = p − E y(1 − y), so it is
    1 − Σ y(1 − y) / Σ p(1 − p). The second, at least 1, is the design effect of clusters: with u_i what pair i adds to θ,
    Σ_g (Σ_{i∈g} u_i)² · G/(G − 1) over Σ u_i².
    """
    share = 1 - float((model.y * (1 - model.y)).sum()) / fit.total
    slope = -fit.mean / fit.squares
    influence = (1 / fit.total - fit.mean * slope + slope * model.x) * (model.y - fit.p)
    together = np.bincount(clusters.numbers, influence, clusters.count)
    effect = float((together**2).sum() / (influence**2).sum()) * clusters.count / (clusters.count - 1)
    return share * max(1.0, effect)


@dataclass(frozen=True)
class _Profile:
    model: FirthLogistic
    maximum: LogisticFit
    dispersion: float

    def root(self, theta: float) -> float:
        """±√(2 (ℓ(b) − ℓ(θ)) / φ): (θ − b₀) / error if ℓ were quadratic."""
        drop = self.maximum.value - self.model.profile(theta, self.maximum).value
        return math.copysign(math.sqrt(2 * max(0.0, drop) / self.dispersion), theta - self.maximum.theta)

    def reaches(self, limit: float) -> float:
        """The θ whose root is the limit; infinite if it is beyond `_FARTHEST`."""
        near, step = self.maximum.theta, math.copysign(0.5, limit)
        far = near + step
        while abs(self.root(far)) < abs(limit):
            if far * step >= _FARTHEST * abs(step):
                return math.copysign(math.inf, limit)
            step *= 2
            near, far = far, far + step
        return float(scipy.optimize.brentq(lambda theta: self.root(theta) - limit, near, far, xtol=1e-6))
