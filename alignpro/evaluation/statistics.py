"""Means, intervals and variance parts of nested rewards.

Rewards of an arm are an array (P, K, M): P prompts, K rewrites per prompt, M responses per rewrite. Only prompts are
independent draws (the rewrites of a prompt share it), so all intervals here resample prompts, never single rewards.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats
import torch

FloatArray = npt.NDArray[np.float64]
Values = npt.ArrayLike | torch.Tensor

_BATCH = 500  # resamples drawn at a time; limits memory to _BATCH * P floats


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval; a bound that the data do not determine is NaN or infinite."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """The values for JSON, which has no NaN or infinity: those become None."""
        return {name: finite_or_none(getattr(self, name)) for name in ("value", "low", "high")}


@dataclass(frozen=True)
class VarianceParts:
    """Var(r) decomposed by the law of total variance; ``total`` is the sum of the other three.

    The parts are unbiased estimates and are not clipped, so a part whose true value is near zero may be negative.
    """

    total: float
    prompts: float
    """Between prompts: Var_x E[r | x]."""
    rewrites: float
    """Between the rewrites of a prompt: E_x Var_x' E[r | x, x']."""
    responses: float
    """Between the responses to a rewrite: E_{x,x'} Var_y [r | x, x', y]."""


def nested_variance(rewards: Values) -> VarianceParts:
    """Unbiased variance parts of balanced nested samples, from the mean squares of a nested ANOVA.

    With mean squares MS_y within rewrites, MS_x' between the rewrites of a prompt and MS_x between prompts,

        E MS_y  = σ²_y      E MS_x' = σ²_y + M σ²_x'      E MS_x = σ²_y + M σ²_x' + K M σ²_x

    which is solved for the three σ² (Searle, Casella & McCulloch, Variance Components, 1992, section 3.6).

    An axis of length 1 gives no information about its own level: that part is 0, and its variance is counted in the level
    above. So K = 1 is right for an arm without rewrites, M = 1 counts the responses' variance in ``rewrites``, and the
    total stays unbiased. With P = 1 the variance between prompts is unknown, and the total is that within the one prompt.

    Args:
        rewards: (P, K, M), finite.

    Raises:
        ValueError: The shape is not (P, K, M) with P, K, M ≥ 1, or a reward is not finite.
    """
    r = _finite(rewards)
    if r.ndim != 3:
        raise ValueError(f"nested_variance takes rewards of shape (P, K, M), got {r.shape}")
    P, K, M = r.shape
    of_rewrite = r.mean(axis=2)  # (P, K)
    of_prompt = of_rewrite.mean(axis=1)  # (P,)

    ms_response = ((r - of_rewrite[:, :, None]) ** 2).sum() / (P * K * (M - 1)) if M > 1 else 0.0
    ms_rewrite = M * ((of_rewrite - of_prompt[:, None]) ** 2).sum() / (P * (K - 1)) if K > 1 else ms_response
    ms_prompt = K * M * ((of_prompt - of_prompt.mean()) ** 2).sum() / (P - 1) if P > 1 else ms_rewrite

    responses = float(ms_response)
    rewrites = float(ms_rewrite - ms_response) / M
    prompts = float(ms_prompt - ms_rewrite) / (K * M)
    return VarianceParts(total=prompts + rewrites + responses, prompts=prompts, rewrites=rewrites, responses=responses)


def mean_ci(values: Values, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean with a bias-corrected and accelerated (BCa) bootstrap interval over prompts (Efron, 1987).

    Args:
        values: (P,), or (P, ...): trailing axes are averaged first, since only prompts are independent.
        confidence: Coverage of the interval.
        resamples: Bootstrap samples.
        seed: The same seed and values give the same interval.

    Returns:
        The mean and its interval. With a single prompt the interval is NaN; if all values are equal, it is that value.

    Raises:
        ValueError: There are no values, or one is not finite.
    """
    per_prompt = prompt_means(values)
    mean = float(per_prompt.mean())
    if len(per_prompt) < 2:
        return Estimate(mean, math.nan, math.nan)
    if np.ptp(per_prompt) <= 1e-12 * max(1.0, float(np.abs(per_prompt).max())):
        return Estimate(mean, mean, mean)  # BCa is undefined without spread
    result = scipy.stats.bootstrap(
        (per_prompt,),
        np.mean,
        vectorized=True,
        n_resamples=resamples,
        batch=_BATCH,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def paired_bootstrap(
    a: Values, b: Values, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of a − b with an interval that resamples the same prompts for both arms.

    Pairing removes the variation between prompts that both arms share, so the interval is narrower than for independent
    samples.

    Args:
        a: (P,) or (P, ...), trailing axes averaged.
        b: The same P prompts in the same order; its trailing axes may differ from a's.
        confidence: Coverage of the interval.
        resamples: Bootstrap samples.
        seed: The same seed and values give the same interval.

    Raises:
        ValueError: a and b hold a different number of prompts, none, or a value that is not finite.
    """
    first, second = _paired(a, b)
    return mean_ci(first - second, confidence=confidence, resamples=resamples, seed=seed)


def gap_recovered(
    no_finetuning: Values,
    ours: Values,
    oracle: Values,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Share of the gap recovered, (ours − no fine-tuning) / (oracle − no fine-tuning), with a percentile interval.

    Prompts are resampled jointly for the three arms. A ratio whose denominator may be zero has no bounded interval
    (Fieller, 1954): if the interval of the gap itself contains zero, the interval of the share is (−inf, inf).

    Args:
        no_finetuning: (P,) or (P, ...), trailing axes averaged.
        ours: The same P prompts in the same order.
        oracle: The same P prompts in the same order.
        confidence: Coverage of the interval.
        resamples: Bootstrap samples.
        seed: The same seed and values give the same interval.

    Returns:
        The share and its interval. The share is NaN if ours, the oracle and no fine-tuning have the same mean, and infinite
        if only the last two do. With a single prompt the interval is NaN.

    Raises:
        ValueError: The arms hold a different number of prompts, none, or a value that is not finite.
    """
    base, trained, best = _paired(no_finetuning, ours, oracle)
    gain, gap = trained - base, best - base  # (P,) each
    value = float(_ratio(gain.mean(), gap.mean()))
    if len(gap) < 2:
        return Estimate(value, math.nan, math.nan)
    with warnings.catch_warnings():
        # SciPy warns about degenerate data if all resamples are equal, which is a valid, exact result here.
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        result = scipy.stats.bootstrap(
            (gain, gap),
            lambda x, y, axis: np.stack([x.mean(axis), y.mean(axis)]),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=_BATCH,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    gains, gaps = result.bootstrap_distribution  # (resamples,) each
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    gap_low, gap_high = np.quantile(gaps, tails)
    if gap_low <= 0 <= gap_high:
        return Estimate(value, -math.inf, math.inf)
    # No interpolation: a rare resample with a zero gap has an infinite share, and inf - inf would make the quantile NaN.
    low, high = np.quantile(_ratio(gains, gaps), tails, method="inverted_cdf")
    return Estimate(value, float(low), float(high))


def prompt_means(values: Values) -> FloatArray:
    """The mean of each prompt: (P, ...) to (P,) float64.

    Raises:
        ValueError: There are no values, or one is not finite.
    """
    array = _finite(values)
    return array.reshape(len(array), -1).mean(axis=1)


def finite_or_none(value: float | None) -> float | None:
    """The number if it is finite, else None, since JSON has no NaN or infinity."""
    return value if value is not None and math.isfinite(value) else None


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        share: FloatArray = np.true_divide(numerator, denominator)
    return np.where(
        np.equal(denominator, 0), np.where(np.equal(numerator, 0), np.nan, np.copysign(np.inf, numerator)), share
    )


def _paired(*arms: Values) -> tuple[FloatArray, ...]:
    means = tuple(prompt_means(arm) for arm in arms)
    sizes = [len(mean) for mean in means]
    if len(set(sizes)) > 1:
        raise ValueError(f"paired arms must hold the same prompts, got {sizes} prompts")
    return means


def _finite(values: Values) -> FloatArray:
    array = (
        values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, np.float64)
    )
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"expected rewards with prompts as the first axis, got an array of shape {array.shape}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"reward {tuple(int(i) for i in bad[0])} is not finite: {array[tuple(bad[0])]}")
    return array
