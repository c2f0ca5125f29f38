import math

import numpy as np
import pytest
import scipy.stats

from alignpro.theory.statistics import (
    Clusters,
    Interval,
    NotEstimable,
    gap_recovered,
    holm,
    mean_estimate,
    paired_estimate,
)
from alignpro.theory.statistics.binary import tango


@pytest.mark.parametrize("bad", [[], 3.0, [[1.0, math.nan]], [math.inf]])
def test_invalid_rewards_are_refused(bad):
    with pytest.raises(ValueError, match=r"prompts as the first axis|not finite"):
        mean_estimate(bad)


def test_symmetric_rewards_have_students_interval():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    estimate = mean_estimate(values)
    low, high = scipy.stats.t.interval(0.95, 4, loc=3.0, scale=values.std(ddof=1) / math.sqrt(5))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_an_interval_reaches_farther_on_the_side_of_the_skew():
    estimate = mean_estimate([0.1, 0.2, 0.1, 0.3, 0.2, 0.1, 5.0, 0.2])
    assert estimate.high - estimate.value > 1.5 * (estimate.value - estimate.low)


def test_interval_is_over_prompts_not_rewards():
    """Rewrites that only repeat their prompt's reward carry no information about the mean."""
    values = np.random.default_rng(0).normal(size=30)
    once, repeated = mean_estimate(values), mean_estimate(np.broadcast_to(values[:, None, None], (30, 8, 4)))
    assert (once.low, once.high) == pytest.approx((repeated.low, repeated.high))


@pytest.mark.parametrize("ones", [0, 3, 20])
def test_single_binary_rewards_have_clopper_and_pearsons_interval(ones):
    exact = scipy.stats.binomtest(ones, 20).proportion_ci(method="exact")
    estimate = mean_estimate([1.0] * ones + [0.0] * (20 - ones))
    assert (estimate.low, estimate.high) == pytest.approx((exact.low, exact.high))


def test_binary_rewards_of_a_prompt_count_as_far_as_they_differ():
    """Eight rewards of a prompt that always agree are worth one, independent ones eight."""
    draw = np.random.default_rng(0)
    alike = np.repeat(draw.random((40, 1)) < 0.5, 8, axis=1).astype(float)
    apart = (draw.random((40, 8)) < 0.5).astype(float)

    def width(estimate):
        return estimate.high - estimate.low

    assert width(mean_estimate(alike)) == pytest.approx(width(mean_estimate(alike[:, 0])), rel=0.05)
    assert width(mean_estimate(apart)) < 0.5 * width(mean_estimate(alike))
    same = mean_estimate(np.ones((20, 8)))
    assert (same.low, same.high) == pytest.approx((0.025 ** (1 / 20), 1.0)), "nothing is known of how they differ"


def test_what_the_data_do_not_determine_is_not_estimable():
    one = mean_estimate([0.4])
    assert one.as_dict() == {
        "value": 0.4,
        "low": None,
        "high": None,
        "p_value": None,
        "not_estimable": "one prompt has no interval",
    }
    assert mean_estimate(np.full(20, 1 / 3)).interval == NotEstimable("all prompts have the same mean reward")
    assert paired_estimate(np.full(20, 0.5), np.full(20, 0.2)).interval == NotEstimable(
        "all prompts have the same difference"
    )
    assert mean_estimate([0.1, 0.2], Clusters(["a", "a"])).interval == NotEstimable("all prompts are in one cluster")


def test_zeros_and_ones_that_are_no_rewards_are_no_proportion():
    """A KL of 0 at all prompts, or a change of 1, says nothing of how it varies; and the rewards 0 and 1 have other intervals."""
    values = np.array([0.0] * 12 + [1.0] * 8)
    found, shifted = mean_estimate(values, rewards=False), mean_estimate(values + 2)
    assert (found.low, found.high) == pytest.approx((shifted.low - 2, shifted.high - 2))
    assert mean_estimate(values).low > found.low
    for same in (0.0, 1.0):
        found = mean_estimate(np.full(20, same), rewards=False)
        assert (found.value, found.interval) == (same, NotEstimable("all values are the same"))


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=60)  # the difficulty that both arms share
    a, b = hard + 0.2 + 0.05 * rng.normal(size=60), hard + 0.05 * rng.normal(size=60)
    difference = paired_estimate(a, b)
    assert 0 < difference.low < 0.2 < difference.high
    own = mean_estimate(a)
    assert difference.high - difference.low < 0.2 * (own.high - own.low)


def test_paired_arms_may_differ_in_samples_but_not_in_prompts():
    a, b = np.ones((5, 4, 2)), np.zeros((5, 1, 8))
    assert paired_estimate(a, b).value == 1.0
    with pytest.raises(ValueError, match=r"\[5, 4\] prompts"):
        paired_estimate(a, b[:4])
    with pytest.raises(ValueError, match="clusters of 4 prompts for rewards of 5"):
        mean_estimate(a, Clusters.single(4))


def test_the_score_interval_of_binary_pairs_solves_tangos_equation():
    """At its ends, the score statistic with the restricted maximum likelihood estimate is 1.96; found here by brute force."""
    difference = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 21)
    up, down, n = 9, 2, 32
    for end in map(float, tango(difference, 0.95)):
        shares = np.linspace(max(0.0, -end), (1 - end) / 2, 2_000_001)[1:-1]  # of down; that of up is share + end
        likelihood = up * np.log(shares + end) + down * np.log(shares) + (n - up - down) * np.log(1 - 2 * shares - end)
        share = shares[likelihood.argmax()]
        statistic = (up - down - n * end) / math.sqrt(n * (2 * share + end - end**2))
        assert abs(statistic) == pytest.approx(1.96, abs=1e-3)
    estimate = paired_estimate(np.maximum(difference, 0), np.maximum(-difference, 0))
    assert isinstance(estimate.interval, Interval)
    assert estimate.p_value == pytest.approx(2 * scipy.stats.norm.sf(7 / math.sqrt(11)))


def test_equal_binary_arms_have_an_interval():
    same = paired_estimate(np.ones(30), np.ones(30))
    assert same.low < 0 < same.high
    assert same.p_value == 1.0


def test_an_interval_excludes_zero_if_and_only_if_the_p_value_is_small():
    draw = np.random.default_rng(5)
    for n in (5, 12, 60):
        for _ in range(200):
            estimate = paired_estimate(draw.exponential(size=n) + draw.normal(scale=0.3), draw.exponential(size=n))
            assert (estimate.p_value < 0.05) == (not estimate.low <= 0 <= estimate.high)


def test_a_cluster_robust_error_of_equal_clusters_is_that_of_their_means():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(12, 5)) + draw.normal(size=(12, 1))
    clusters = Clusters([i for i in range(12) for _ in range(5)])
    error = clusters.error(values.ravel())
    assert float(error.stderr) == pytest.approx(values.mean(1).std(ddof=1) / math.sqrt(12))
    assert clusters.degrees_of_freedom == pytest.approx(11)
    shuffled = draw.permutation(60)
    again = Clusters([str(i // 5) for i in shuffled]).error(values.ravel()[shuffled])
    assert float(again.stderr) == pytest.approx(float(error.stderr))


def test_unequal_clusters_have_fewer_degrees_of_freedom():
    assert Clusters(["a"] * 20 + ["b", "c", "d"]).degrees_of_freedom < 1.5
    assert Clusters.single(23).degrees_of_freedom == pytest.approx(22)


def test_holm_adjusts_for_the_number_of_arms():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def arms(n=100, ours=0.4, oracle=0.5, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(0.3, 0.2, size=n)
    return base, base + ours + 0.1 * rng.normal(size=n), base + oracle + 0.1 * rng.normal(size=n)


def test_gap_recovered_has_fiellers_interval():
    base, ours, oracle = arms()
    share = gap_recovered(base, ours, oracle)
    assert share.value == pytest.approx((ours.mean() - base.mean()) / (oracle.mean() - base.mean()))
    for end in (share.low, share.high):  # where t does not quite reject that the share is this one
        assert scipy.stats.ttest_1samp(ours - base - end * (oracle - base), 0).pvalue == pytest.approx(0.05)


@pytest.mark.parametrize("harm", [0.0, -0.1, -0.5])
def test_a_share_of_no_gain_is_not_estimable(harm):
    """An oracle worse than no fine-tuning, and a prompter as bad, is not "100 % recovered"."""
    share = gap_recovered(*arms(ours=harm, oracle=harm))
    assert math.isnan(share.value)
    assert share.interval == NotEstimable("the oracle's gain over no fine-tuning is not clear of zero")
    assert share.as_dict()["value"] is None


def test_an_exact_share_has_no_interval_without_width():
    base, _, oracle = arms()
    for ours, value in ((oracle, 1.0), (base, 0.0)):
        share = gap_recovered(base, ours, oracle)
        assert share.value == value
        assert share.interval == NotEstimable("all prompts have the same share")
    assert gap_recovered([0.0], [0.5], [1.0]).interval == NotEstimable("one prompt has no interval")
