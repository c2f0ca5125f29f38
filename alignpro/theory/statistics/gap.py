"""The share of the oracle's gain that prompting recovers: a ratio of two differences on the same prompts."""

from __future__ import annotations

import math

import numpy as np
import scipy.stats

from alignpro.theory.statistics.clusters import Clusters
from alignpro.theory.statistics.estimates import Estimate, Interval, NotEstimable
from alignpro.theory.statistics.intervals import paired_estimate
from alignpro.theory.statistics.values import FloatArray, Values, paired

NO_GAP = "the oracle's gain over no fine-tuning is not clear of zero"


def gap_recovered(
    no_finetuning: Values,
    ours: Values,
    oracle: Values,
    clusters: Clusters | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Share of the gap recovered, (ours − no fine-tuning) / (oracle − no fine-tuning), with Fieller's (1954) interval.

    The share has a meaning only if the oracle gains something: if the interval of its gain does not lie above zero, neither
    the share nor its interval is estimable. Otherwise the interval holds the shares θ for which Student's t does not reject
    that ours − no fine-tuning − θ (oracle − no fine-tuning) has mean zero, with cluster-robust errors.

    Args:
        no_finetuning: (P,) or (P, ...), with the rewards of a prompt on the trailing axes.
        ours: The same P prompts in the same order.
        oracle: The same P prompts in the same order.
        clusters: The prompts that belong together; by default every prompt is its own cluster.
        confidence: Coverage of the interval.

    Returns:
        The estimate; its value is NaN if it is not estimable, except for lack of spread.

    Raises:
        ValueError: The arms hold a different number of prompts, none, or a value that is not finite.
    """
    base, trained, best = (rewards.mean(1) for rewards in paired(no_finetuning, ours, oracle))
    clusters = clusters or Clusters.single(len(base))
    gain, gap = trained - base, best - base  # (P,) each
    of_gap = paired_estimate(oracle, no_finetuning, clusters, confidence=confidence)
    if of_gap.not_estimable is not None and not (of_gap.value > 0 and clusters.count > 1):
        return Estimate(math.nan, of_gap.interval)
    if of_gap.low <= 0:
        return Estimate(math.nan, NotEstimable(NO_GAP))
    bounds = fieller(gain, gap, clusters, confidence)
    if bounds is None:
        return Estimate(math.nan, NotEstimable(NO_GAP))
    share = float(gain.mean() / gap.mean())
    low, high = bounds
    if high - low <= 1e-12 * max(1.0, abs(share)):
        return Estimate(share, NotEstimable("all prompts have the same share"))
    return Estimate(share, Interval(low, high))


def fieller(gain: FloatArray, gap: FloatArray, clusters: Clusters, confidence: float) -> tuple[float, float] | None:
    """Both ends of Fieller's interval of mean(gain) / mean(gap); None if it is unbounded.

    Args:
        gain: (P,).
        gap: (P,).
        clusters: At least two.
        confidence: Coverage of the interval.
    """
    of_gain, of_gap, of_sum = (clusters.error(each) for each in (gain, gap, gain + gap))
    variance_gain, variance_gap = float(of_gain.stderr**2), float(of_gap.stderr**2)
    covariance = (float(of_sum.stderr**2) - variance_gain - variance_gap) / 2
    limit = scipy.stats.t.isf((1 - confidence) / 2, clusters.degrees_of_freedom) ** 2
    x, y = float(of_gain.mean), float(of_gap.mean)
    # The shares θ with (x − θ y)² ≤ limit · Var(x − θ y): a θ² − 2 b θ + c ≤ 0.
    a, b, c = y**2 - limit * variance_gap, x * y - limit * covariance, x**2 - limit * variance_gain
    if a <= 0:
        return None
    root = float(np.sqrt(max(b**2 - a * c, 0.0)))
    return (b - root) / a, (b + root) / a
