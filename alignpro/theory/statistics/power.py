"""How many prompts it takes to see a difference, from the variance that was estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

from alignpro.theory.statistics.clusters import Clusters
from alignpro.theory.statistics.estimates import NotEstimable
from alignpro.theory.statistics.seeds import SeedError

_MOST = 1_000_000
"""Clusters beyond which a difference counts as out of reach."""


@dataclass(frozen=True)
class SampleSize:
    """A number of prompts."""

    prompts: int
    clusters: int
    """In how many clusters, which are as large as those of the estimate."""


def sample_size(
    difference: float, error: SeedError, clusters: Clusters, *, power: float = 0.8, confidence: float = 0.95
) -> SampleSize | NotEstimable:
    """The fewest prompts with which a true difference is told from 0 with probability ``power``, with as many seeds as here.

    The power is that of Student's t, with the variance of the mean split into the part that falls with the number of
    clusters and the part between seeds, which does not.

    Args:
        difference: The true difference that is to be seen; positive.
        error: Of the difference that was estimated, of one data set.
        clusters: The prompts of that estimate.
        power: Probability of an interval clear of 0.
        confidence: Of that interval.

    Raises:
        ValueError: The difference is not positive.
    """
    if not difference > 0:
        raise ValueError(f"the difference to see must be positive, got {difference}")
    if error.of_prompts + error.of_seeds == 0:
        return NotEstimable("all differences are equal, which tells nothing of their variance")
    if _power(math.inf, difference, error, clusters, confidence) < power:
        return NotEstimable("it is within the variance between seeds: train with more seeds")
    low, high = 1, 2  # the power of `low` clusters is too small, or there is no interval
    while _power(high, difference, error, clusters, confidence) < power:
        low, high = high, 2 * high
        if high > _MOST:
            return NotEstimable(f"it would take more than {_MOST:,} clusters")
    while high - low > 1:
        middle = (low + high) // 2
        enough = _power(middle, difference, error, clusters, confidence) >= power
        low, high = (low, middle) if enough else (middle, high)
    return SampleSize(math.ceil(high * clusters.prompts / clusters.count), high)


def _power(count: float, difference: float, error: SeedError, clusters: Clusters, confidence: float) -> float:
    """Probability that the interval from ``count`` clusters excludes 0 on the side of the difference."""
    of_prompts = float(error.of_prompts) * clusters.count / count
    of_seeds = float(error.of_seeds)
    variance = of_prompts + of_seeds
    if variance == 0:
        return 1.0
    spread = of_seeds**2 / float(error.seed_degrees_of_freedom) if of_seeds > 0 else 0.0
    if math.isfinite(count):
        lost = clusters.count - 1 - clusters.degrees_of_freedom  # by unequal clusters; grows with their number
        spread += of_prompts**2 / max(1.0, count - 1 - lost * count / clusters.count)
    degrees = variance**2 / spread if spread > 0 else math.inf
    limit = scipy.stats.t.isf((1 - confidence) / 2, degrees)
    shift = difference / math.sqrt(variance)
    if degrees > 1e5:
        return float(scipy.stats.norm.sf(limit - shift))
    above = scipy.stats.nct.sf(limit, degrees, shift)
    return float(above) if np.isfinite(above) else float(scipy.stats.norm.sf(limit - shift))
