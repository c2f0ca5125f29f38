"""Intervals for rewards that are 0 or 1."""

from __future__ import annotations

import numpy as np
import scipy.stats

from alignpro.theory.statistics.clusters import Clusters
from alignpro.theory.statistics.values import FloatArray

_BISECTIONS = 60
"""Halvings of [−1, 1]: to the last bit of a float64."""


def korn_graubard(
    shares: FloatArray, rewards_per_prompt: int, clusters: Clusters, confidence: float
) -> tuple[FloatArray, FloatArray]:
    """Interval of a proportion: Clopper and Pearson's with the effective number of rewards (Korn & Graubard, 1998).

    With one reward per prompt and no clusters, it is Clopper and Pearson's.

    Args:
        shares: (..., P) share of ones among the rewards of each prompt.
        rewards_per_prompt: Number of rewards of each prompt.
        clusters: The prompts that belong together, at least two clusters.
        confidence: Coverage of the interval.

    Returns:
        Both ends, (...,).
    """
    tail = (1 - confidence) / 2
    p, effective = _effective(shares, rewards_per_prompt, clusters, confidence)
    ones, zeros = p * effective, (1 - p) * effective
    some, not_all = p > 0, p < 1
    low = np.where(some, scipy.stats.beta.ppf(tail, np.where(some, ones, 1.0), zeros + 1), 0.0)
    high = np.where(not_all, scipy.stats.beta.isf(tail, ones + 1, np.where(not_all, zeros, 1.0)), 1.0)
    return low, high


def korn_graubard_p_value(
    shares: FloatArray, rewards_per_prompt: int, clusters: Clusters, proportion: float, confidence: float = 0.95
) -> FloatArray:
    """Two-sided p-value (...,) of a proportion: the exact binomial test with the effective number of rewards.

    It is below 1 − confidence if and only if `korn_graubard`'s interval excludes the proportion.
    """
    p, effective = _effective(shares, rewards_per_prompt, clusters, confidence)
    ones, zeros = p * effective, (1 - p) * effective
    some, not_all = p > 0, p < 1
    as_many = np.where(some, scipy.stats.beta.cdf(proportion, np.where(some, ones, 1.0), zeros + 1), 1.0)
    as_few = np.where(not_all, scipy.stats.beta.sf(proportion, ones + 1, np.where(not_all, zeros, 1.0)), 1.0)
    p_value: FloatArray = np.minimum(1.0, 2 * np.minimum(as_many, as_few))
    return p_value


def _effective(
    shares: FloatArray, rewards_per_prompt: int, clusters: Clusters, confidence: float
) -> tuple[FloatArray, FloatArray]:
    """The proportion (...,) and its effective number of rewards, that of independent ones with the same error.

    It is that of clusters if these do not differ: then nothing is known about how alike the rewards of a cluster are.
    """
    total = clusters.prompts * rewards_per_prompt
    tail = (1 - confidence) / 2
    if total == clusters.count:
        effective = np.full(shares.shape[:-1], float(total))
        p = shares.mean(-1)
    else:
        error = clusters.error(shares)
        p = error.mean
        few = (scipy.stats.t.isf(tail, total - 1) / scipy.stats.t.isf(tail, clusters.degrees_of_freedom)) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            effective = np.where(error.stderr > 0, few * p * (1 - p) / error.stderr**2, clusters.count)
    return p, np.clip(effective, 1.0, total)


def tango(differences: FloatArray, confidence: float) -> tuple[FloatArray, FloatArray]:
    """Score interval of the mean difference of paired rewards that are 0 or 1 (Tango, 1998).

    Args:
        differences: (..., P), each −1, 0 or 1.
        confidence: Coverage of the interval.

    Returns:
        Both ends, (...,).
    """
    n = differences.shape[-1]
    up, down = (differences > 0).sum(-1).astype(np.float64), (differences < 0).sum(-1).astype(np.float64)
    limit = scipy.stats.norm.isf((1 - confidence) / 2) ** 2
    mean = (up - down) / n

    def inside(difference: FloatArray) -> FloatArray:
        """Whether the score test accepts a difference."""
        b = -up - down + (2 * n - up + down) * difference
        c = -down * difference * (1 - difference)
        share_down = (np.sqrt(np.maximum(b**2 - 8 * n * c, 0.0)) - b) / (4 * n)  # its maximum likelihood estimate
        variance = n * (2 * share_down + difference * (1 - difference))
        accepted: FloatArray = (up - down - n * difference) ** 2 <= limit * np.maximum(variance, 0.0)
        return accepted

    ends = []
    for outside in (-1.0, 1.0):
        outer, inner = np.full(mean.shape, outside), mean
        for _ in range(_BISECTIONS):
            middle = (outer + inner) / 2
            accepted = inside(middle)
            inner, outer = np.where(accepted, middle, inner), np.where(accepted, outer, middle)
        ends.append((outer + inner) / 2)
    return ends[0], ends[1]


def tango_p_value(differences: FloatArray) -> FloatArray:
    """Two-sided p-value (...,) of no difference: the score test at 0, which is McNemar's (1947)."""
    up, down = (differences > 0).sum(-1), (differences < 0).sum(-1)
    statistic = (up - down) / np.sqrt(np.maximum(up + down, 1))
    p: FloatArray = 2 * scipy.stats.norm.sf(np.abs(statistic))
    return p
