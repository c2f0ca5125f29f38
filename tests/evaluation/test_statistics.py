import math

import numpy as np
import pytest
import torch

from alignpro.evaluation.statistics import (
    Estimate,
    VarianceParts,
    gap_recovered,
    mean_ci,
    nested_variance,
    paired_bootstrap,
)


def nested_samples(rng: np.random.Generator, P: int, K: int, M: int, sigma: tuple[float, float, float]) -> np.ndarray:
    """Return (P, K, M) rewards with variances sigma² between prompts, rewrites and responses; skewed, not normal."""
    levels = [(P, 1, 1), (P, K, 1), (P, K, M)]
    return sum(s * (rng.exponential(size=shape) - 1.0) for s, shape in zip(sigma, levels, strict=True))


@pytest.mark.parametrize(("P", "K", "M"), [(5, 3, 2), (4, 2, 5), (6, 1, 3), (6, 3, 1)])
def test_variance_parts_are_unbiased(P, K, M):
    rng = np.random.default_rng(1)
    true = (0.9, 0.6, 1.2)
    parts = [nested_variance(nested_samples(rng, P, K, M, true)) for _ in range(6000)]
    prompts, rewrites, responses = (s**2 for s in true)
    if K == 1:  # the variance between rewrites appears between prompts
        prompts, rewrites = prompts + rewrites, 0.0
    if M == 1:  # the variance between responses appears between rewrites
        rewrites, responses = rewrites + responses, 0.0
    for name, expected in [("prompts", prompts), ("rewrites", rewrites), ("responses", responses), ("total", 2.61)]:
        values = np.array([getattr(p, name) for p in parts])
        standard_error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - expected) < 4 * standard_error + 1e-12, name


def test_variance_parts_sum_to_the_total_and_may_be_negative():
    parts = nested_variance([[[1.0, -1.0], [1.0, -1.0]], [[1.0, -1.0], [1.0, -1.0]]])  # means agree more than chance
    assert parts.responses == 2.0
    assert parts.rewrites == -1.0
    assert parts.total == pytest.approx(parts.prompts + parts.rewrites + parts.responses)


def test_variance_of_flat_samples_is_the_ordinary_unbiased_one():
    values = np.random.default_rng(0).normal(size=7)
    assert nested_variance(values[:, None, None]).total == pytest.approx(values.var(ddof=1))
    assert nested_variance(values[None, :, None]).rewrites == pytest.approx(values.var(ddof=1))
    assert nested_variance(values[None, None, :]).responses == pytest.approx(values.var(ddof=1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 2)])
def test_variance_without_spread_is_zero(shape):
    assert nested_variance(np.full(shape, 0.3)) == VarianceParts(0.0, 0.0, 0.0, 0.0)


def test_tensors_and_arrays_agree():
    r = torch.rand(4, 3, 2, dtype=torch.float64)
    assert nested_variance(r) == nested_variance(r.numpy())
    assert mean_ci(r) == mean_ci(r.numpy())


@pytest.mark.parametrize("bad", [[], 3.0, [[1.0, math.nan]], [math.inf]])
def test_invalid_rewards_are_refused(bad):
    with pytest.raises(ValueError, match=r"prompts as the first axis|not finite"):
        mean_ci(bad)
    with pytest.raises(ValueError):
        nested_variance(bad)


def test_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\(P, K, M\).*\(4, 2\)"):
        nested_variance(np.zeros((4, 2)))


def test_mean_interval_covers_at_its_level():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        e = mean_ci(rng.gamma(2.0, 1.0, size=40), resamples=400, seed=trial)
        covered += e.low <= 2.0 <= e.high
    assert 0.89 < covered / 300 < 0.985


def test_interval_resamples_prompts_not_rewards():
    """Rewrites that only repeat their prompt's reward carry no information about the mean."""
    values = np.random.default_rng(0).normal(size=30)
    once, repeated = mean_ci(values), mean_ci(np.broadcast_to(values[:, None, None], (30, 8, 4)))
    assert (once.low, once.high) == pytest.approx((repeated.low, repeated.high))


def test_seed_decides_the_interval():
    values = np.random.default_rng(0).normal(size=30)
    assert mean_ci(values, seed=5) == mean_ci(values, seed=5)
    assert mean_ci(values, seed=5) != mean_ci(values, seed=6)


def test_mean_of_one_prompt_has_no_interval_and_of_equal_ones_no_width():
    one = mean_ci([0.4])
    assert one.value == 0.4
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert one.as_dict() == {"value": 0.4, "low": None, "high": None}
    third = mean_ci(np.full(9, 1 / 3))
    assert third.value == third.low == third.high == pytest.approx(1 / 3)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=60)  # the difficulty that both arms share
    a, b = hard + 0.2 + 0.05 * rng.normal(size=60), hard + 0.05 * rng.normal(size=60)
    difference = paired_bootstrap(a, b)
    assert difference.low < 0.2 < difference.high
    assert difference.low > 0
    own = mean_ci(a)
    assert difference.high - difference.low < 0.2 * (own.high - own.low)


def test_paired_arms_may_differ_in_samples_but_not_in_prompts():
    a, b = np.ones((5, 4, 2)), np.zeros((5, 1, 8))
    assert paired_bootstrap(a, b) == Estimate(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"\[5, 4\] prompts"):
        paired_bootstrap(a, b[:4])


def test_gap_recovered():
    rng = np.random.default_rng(0)
    base = rng.normal(0.3, 0.2, size=100)
    oracle = base + 0.5 + 0.1 * rng.normal(size=100)
    ours = base + 0.4 + 0.1 * rng.normal(size=100)
    share = gap_recovered(base, ours, oracle, seed=1)
    assert share.value == pytest.approx((ours.mean() - base.mean()) / (oracle.mean() - base.mean()))
    assert 0.7 < share.low < share.value < share.high < 0.9
    assert gap_recovered(base, oracle, oracle) == Estimate(1.0, 1.0, 1.0)
    assert gap_recovered(base, base, oracle) == Estimate(0.0, 0.0, 0.0)


def test_gap_interval_covers_at_its_level():
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        base, noise = rng.normal(size=60), 0.3 * rng.normal(size=(2, 60))
        share = gap_recovered(base, base + 0.6 + noise[0], base + 1.0 + noise[1], resamples=300, seed=trial)
        covered += share.low <= 0.6 <= share.high
    assert 0.88 < covered / 200 < 0.99


def test_gap_that_may_be_zero_has_no_bounded_interval():
    rng = np.random.default_rng(0)
    base = rng.normal(size=20)
    share = gap_recovered(base, base + 1, base + rng.normal(size=20))
    assert (share.low, share.high) == (-math.inf, math.inf)
    assert share.as_dict()["low"] is None


def test_no_gap_at_all_is_nan_or_infinite():
    base = np.arange(4.0)
    assert math.isnan(gap_recovered(base, base, base).value)
    assert gap_recovered(base, base + 1, base).value == math.inf
    one = gap_recovered([0.0], [0.5], [1.0])
    assert one.value == 0.5
    assert math.isnan(one.low)
