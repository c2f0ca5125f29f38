"""Confidence intervals of means and of paired differences, over prompts or clusters of prompts.

Which method is used, chosen by the simulation in `benchmarks.coverage`:

rewards that are all 0 or 1
    The mean: Clopper & Pearson (1934) if each prompt has one reward and is its own cluster, else Korn & Graubard (1998),
    which is the same with an effective number of rewards. The paired difference: the score interval of Tango (1998) if each
    prompt has one reward, else as for other rewards.
other rewards
    Student's t with a cluster-robust error, joined with the interval of Hall's (1992) transformation, which corrects t for
    skewness. Either alone covers too rarely below 64 prompts: t of skewed, Hall's of heavy-tailed rewards.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

from alignpro.theory.statistics.binary import korn_graubard, tango, tango_p_value
from alignpro.theory.statistics.clusters import Clusters, MeanError
from alignpro.theory.statistics.estimates import Estimate, Interval, NotEstimable
from alignpro.theory.statistics.values import FloatArray, Values, are_binary, paired, rewards_of_prompts

ONE_PROMPT = "one prompt has no interval"
ONE_CLUSTER = "all prompts are in one cluster"
NO_SPREAD = "all prompts have the same {}"
NO_SPREAD_OF_VALUES = "all values are the same"


def mean_estimate(
    values: Values, clusters: Clusters | None = None, *, confidence: float = 0.95, rewards: bool = True
) -> Estimate:
    """The mean with its interval; of rewards that are all 0 or 1, that of a proportion.

    Args:
        values: (P,), or (P, ...): the trailing axes hold the rewards of a prompt.
        clusters: The prompts that belong together; by default every prompt is its own cluster.
        confidence: Coverage of the interval.
        rewards: Whether these are rewards. Of other quantities, such as a KL or a difference, 0 and 1 are values like others.

    Returns:
        The estimate. The interval of a single prompt or cluster is not estimable, nor that of equal values, unless these
        are rewards of 0 or 1.

    Raises:
        ValueError: There are no values, or one is not finite.
    """
    of_prompts = rewards_of_prompts(values)
    clusters = _checked(clusters, len(of_prompts))
    mean = float(of_prompts.mean())
    if missing := _missing(clusters):
        return Estimate(mean, missing)
    if rewards and are_binary([of_prompts]):
        low, high = korn_graubard(of_prompts.mean(1), of_prompts.shape[1], clusters, confidence)
        return Estimate(mean, Interval(float(low), float(high)))
    return _of_mean(
        of_prompts.mean(1), clusters, confidence, NO_SPREAD.format("mean reward") if rewards else NO_SPREAD_OF_VALUES
    )


def paired_estimate(a: Values, b: Values, clusters: Clusters | None = None, *, confidence: float = 0.95) -> Estimate:
    """The mean of a − b with its interval and its p-value, paired by prompt.

    Pairing removes the variation between prompts that both arms share.

    Args:
        a: (P,) or (P, ...), with the rewards of a prompt on the trailing axes.
        b: The same P prompts in the same order; its trailing axes may differ from a's.
        clusters: The prompts that belong together; by default every prompt is its own cluster.
        confidence: Coverage of the interval.

    Raises:
        ValueError: a and b hold a different number of prompts, none, or a value that is not finite.
    """
    first, second = paired(a, b)
    clusters = _checked(clusters, len(first))
    difference = first.mean(1) - second.mean(1)  # (P,)
    if missing := _missing(clusters):
        return Estimate(float(difference.mean()), missing)
    single = first.shape[1] == second.shape[1] == 1
    if single and clusters.independent and are_binary([first, second]):
        low, high = tango(difference, confidence)
        return Estimate(float(difference.mean()), Interval(float(low), float(high)), float(tango_p_value(difference)))
    return _of_mean(difference, clusters, confidence, NO_SPREAD.format("difference"))


def mean_bounds(error: MeanError, clusters: Clusters, confidence: float) -> tuple[FloatArray, FloatArray]:
    """Both ends (...,) of the joined interval of Student's t and Hall's transformation."""
    count = clusters.count
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, clusters.degrees_of_freedom)
    upper, lower = (_hall_inverse(sign * quantile, error.skewness, count) for sign in (1, -1))
    low = error.mean - error.stderr * np.maximum(quantile, upper)
    high = error.mean - error.stderr * np.minimum(-quantile, lower)
    return low, high


def p_values(error: MeanError, clusters: Clusters) -> FloatArray:
    """Two-sided p-values (...,) of a zero mean: below 1 − confidence if and only if the interval excludes 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(error.stderr > 0, error.mean / error.stderr, 0.0)
    transformed = _hall(statistic, error.skewness, clusters.count)
    smaller = np.minimum(np.abs(statistic), np.where(statistic * transformed > 0, np.abs(transformed), 0.0))
    p: FloatArray = 2 * scipy.stats.t.sf(smaller, clusters.degrees_of_freedom)
    return p


def _of_mean(values: FloatArray, clusters: Clusters, confidence: float, no_spread: str) -> Estimate:
    """The estimate of the mean of values (P,), and why it has no interval if they do not differ."""
    error = clusters.error(values)
    mean = float(error.mean)
    if error.stderr == 0:
        return Estimate(mean, NotEstimable(no_spread))
    low, high = mean_bounds(error, clusters, confidence)
    return Estimate(mean, Interval(float(low), float(high)), float(p_values(error, clusters)))


def _hall(statistic: FloatArray, skewness: FloatArray, count: int) -> FloatArray:
    """Hall's (1992) transformation of a Studentized mean: monotone, and free of skewness to the order 1/n."""
    w = statistic / np.sqrt(count)
    transformed: FloatArray = np.sqrt(count) * (
        w + skewness * w**2 / 3 + skewness**2 * w**3 / 27 + skewness / (6 * count)
    )
    return transformed


def _hall_inverse(transformed: float, skewness: FloatArray, count: int) -> FloatArray:
    """The Studentized mean whose transform is given."""
    w = transformed / np.sqrt(count) - skewness / (6 * count)
    near_zero = np.abs(skewness) < 1e-6
    safe = np.where(near_zero, 1.0, skewness)
    inverse: FloatArray = np.sqrt(count) * np.where(near_zero, w, 3 / safe * (np.cbrt(1 + safe * w) - 1))
    return inverse


def _missing(clusters: Clusters) -> NotEstimable | None:
    if clusters.prompts < 2:
        return NotEstimable(ONE_PROMPT)
    return NotEstimable(ONE_CLUSTER) if clusters.count < 2 else None


def _checked(clusters: Clusters | None, prompts: int) -> Clusters:
    if clusters is None:
        return Clusters.single(prompts)
    if clusters.prompts != prompts:
        raise ValueError(f"clusters of {clusters.prompts} prompts for rewards of {prompts}")
    return clusters
