"""Intervals over seeds and prompts: what they hold, what they reduce to, and what they cannot say."""

import math
import time

import numpy as np
import pytest
import scipy.stats

from alignpro.theory.statistics import (
    Clusters,
    NotEstimable,
    SeedRewards,
    difference_error,
    difference_over_seeds,
    gap_over_seeds,
    gap_recovered,
    holm,
    mean_estimate,
    mean_over_seeds,
    paired_estimate,
    sample_size,
)
from alignpro.theory.statistics.seeds import seed_error


def system(table: np.ndarray, first: int = 0) -> SeedRewards:
    """Rewards (S, P) of the seeds from ``first`` on."""
    return SeedRewards.of({first + s: row for s, row in enumerate(table)})


def draw(
    generator: np.random.Generator, repeats: int, seeds: int, prompts: int, between: float, cluster: int = 1
) -> np.ndarray:
    """Tables (R, S, P) with mean 0: of seeds, of clusters, of prompts and of single draws."""
    shared = np.repeat(generator.normal(size=(repeats, 1, prompts // cluster)), cluster, axis=-1)
    return (
        between * generator.normal(size=(repeats, seeds, 1))
        + 0.2 * shared
        + 0.2 * generator.normal(size=(repeats, 1, prompts))
        + 0.3 * generator.normal(size=(repeats, seeds, prompts))
    )


def held(tables: np.ndarray, clusters: Clusters) -> float:
    error = seed_error([tables], clusters)
    limit = scipy.stats.t.isf(0.025, error.degrees_of_freedom)
    return float((np.abs(error.mean) <= limit * error.stderr).mean())


@pytest.mark.parametrize("cluster", [1, 5])
@pytest.mark.parametrize("between", [0.0, 0.04, 0.2])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_holds_the_truth(seeds, between, cluster):
    tables = draw(np.random.default_rng(0), 1500, seeds, 60, between, cluster)
    assert 0.915 <= held(tables, Clusters([p // cluster for p in range(60)])) <= 0.985


def test_prompts_alone_are_too_sure_of_a_result_that_varies_between_seeds():
    tables = draw(np.random.default_rng(0), 500, 3, 60, 0.2)
    error = seed_error([tables.mean(1, keepdims=True)], Clusters.single(60))
    covered = np.abs(error.mean) <= scipy.stats.t.isf(0.025, error.degrees_of_freedom) * error.stderr
    assert covered.mean() < 0.7 < held(tables, Clusters.single(60))


def test_variances_of_prompts_and_seeds_are_unbiased():
    tables = draw(np.random.default_rng(1), 4000, 4, 30, 0.3)
    error = seed_error([tables], Clusters.single(30))
    assert error.of_prompts.mean() == pytest.approx((0.08 + 0.09 / 4) / 30, rel=0.03)
    assert error.of_seeds.mean() == pytest.approx(0.09 / 4, rel=0.05)


def test_one_seed_is_the_interval_over_prompts():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, 40)), rng.normal(size=(1, 40))
    assert mean_over_seeds(system(a)) == mean_estimate(a[0])
    assert difference_over_seeds(system(a), system(b)) == paired_estimate(a[0], b[0])
    oracle = system(b + 2)
    assert gap_over_seeds(system(b), system(b + 1), oracle) == gap_recovered(b[0], b[0] + 1, b[0] + 2)


def test_equal_seeds_are_paired_and_others_are_independent():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, 1))
    a, b = rng.normal(scale=0.1, size=(3, 50)) + shared + 0.2, rng.normal(scale=0.1, size=(3, 50)) + shared
    paired, apart = difference_over_seeds(system(a), system(b)), difference_over_seeds(system(a), system(b, first=9))
    assert paired.value == pytest.approx(apart.value)
    assert paired.high - paired.low < 0.2 * (apart.high - apart.low)
    assert paired.p_value < 0.05 < apart.p_value


def test_an_untrained_system_needs_one_seed():
    rng = np.random.default_rng(0)
    trained, base = rng.normal(1.0, 0.2, size=(3, 50)), rng.normal(scale=0.2, size=(1, 50))
    estimate = difference_over_seeds(system(trained), system(base))
    assert estimate.value == pytest.approx(trained.mean() - base.mean())
    assert 0.8 < estimate.low < estimate.value < estimate.high < 1.2


def test_systems_with_different_seeds_are_compared_over_those_that_they_share():
    """As of a method of which a seed is missing: its mean over other seeds differs by chance."""
    rng = np.random.default_rng(0)
    of_seeds = np.array([0.0, 0.1, 3.0])[:, None]
    b = rng.normal(scale=0.1, size=(3, 50)) + of_seeds
    a = b[:2] + 0.1 + rng.normal(scale=0.01, size=(2, 50))
    found = difference_over_seeds(system(a), system(b))
    assert found == difference_over_seeds(system(a), system(b[:2]))
    assert found.value == pytest.approx(0.1, abs=0.01) and found.low > 0.05
    apart = difference_over_seeds(system(a), system(b, first=1))  # one seed in common is none
    assert apart.value == pytest.approx(a.mean() - b.mean())
    assert gap_over_seeds(system(b[:1] - 1), system(a), system(b)).value == pytest.approx(
        gap_over_seeds(system(b[:1] - 1), system(a), system(b[:2])).value
    )


def test_the_degrees_of_freedom_of_seeds_are_those_of_what_differs_between_them():
    clusters = Clusters.single(40)
    rng = np.random.default_rng(0)
    trained = rng.normal(scale=0.05, size=(2, 40)) + np.array([[0.0], [1.0]])
    untrained = rng.normal(size=(3, 40))  # sampled three times: it does not differ more than prompts explain
    untrained -= untrained.mean(1, keepdims=True)
    assert seed_error([trained, untrained], clusters).seed_degrees_of_freedom == pytest.approx(1.0)
    assert seed_error([untrained], clusters).seed_degrees_of_freedom == 0
    both = seed_error([trained, -trained[:, ::-1]], clusters).seed_degrees_of_freedom
    assert both == pytest.approx(2.0)


def test_fieller_over_seeds_holds_the_share():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(30):
        base = rng.normal(size=(1, 60))
        gain = [0.6 + 0.1 * rng.normal(size=(3, 1)), 1.0 + 0.1 * rng.normal(size=(3, 1))]
        ours, oracle = (base + each + 0.3 * rng.normal(size=(3, 60)) for each in gain)
        share = gap_over_seeds(system(base), system(ours), system(oracle, first=5))
        assert share.value == pytest.approx((ours.mean() - base.mean()) / (oracle.mean() - base.mean()))
        inside += share.low <= 0.6 <= share.high
    assert inside >= 0.85 * 30


def test_fieller_over_seeds_is_the_closed_form_where_seeds_do_not_differ():
    """Seeds whose rewards are equal add nothing: what is left is the quadratic over prompts."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=40)
    ours, oracle = base + 0.6 + 0.2 * rng.normal(size=40), base + 1 + 0.2 * rng.normal(size=40)
    repeated = [system(np.tile(each, (3, 1))) for each in (base, ours, oracle)]
    share, closed = gap_over_seeds(*repeated), gap_recovered(base, ours, oracle)
    assert (share.value, share.low, share.high) == pytest.approx((closed.value, closed.low, closed.high), abs=1e-8)


def test_what_is_not_estimable_says_why():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3, 20))
    assert mean_over_seeds(system(np.ones((3, 20)))).not_estimable == "all prompts have the same mean reward"
    assert mean_over_seeds(system(table[:, :1])).not_estimable == "one prompt has no interval"
    assert mean_over_seeds(system(table), Clusters([0] * 20)).not_estimable == "all prompts are in one cluster"
    share = gap_over_seeds(system(table), system(table + 1), system(table))
    assert math.isnan(share.value)
    assert share.not_estimable
    same = gap_over_seeds(system(table[:1]), system(table + 0.5), system(table + 1))
    assert same.value == pytest.approx((table.mean() - table[0].mean() + 0.5) / (table.mean() - table[0].mean() + 1))
    with pytest.raises(ValueError, match="20 prompts cannot be paired with 19"):
        difference_over_seeds(system(table), system(table[:, :19]))
    with pytest.raises(ValueError, match="one shape"):
        SeedRewards.of({0: np.ones((3, 2)), 1: np.ones((4, 2))})


def test_the_sample_size_gives_the_power():
    """Draw as many prompts as it says, and four in five data sets show the difference."""
    rng = np.random.default_rng(0)
    cluster = 5
    pilot = draw(rng, 1, 1, 400, 0.0, cluster)[0]
    clusters = Clusters([p // cluster for p in range(400)])
    error = difference_error(system(pilot), system(np.zeros((1, 400))), clusters)
    needed = sample_size(0.1, error, clusters)
    assert needed.prompts == 5 * needed.clusters
    drawn = draw(rng, 2000, 1, needed.prompts, 0.0, cluster) + 0.1
    seen = seed_error([drawn], Clusters([p // cluster for p in range(needed.prompts)]))
    shown = seen.mean / seen.stderr > scipy.stats.t.isf(0.025, seen.degrees_of_freedom)
    assert shown.mean() == pytest.approx(0.8, abs=0.06)


def test_a_difference_within_the_variance_between_seeds_takes_more_seeds():
    rng = np.random.default_rng(0)
    clusters = Clusters.single(100)
    trained, base = system(draw(rng, 1, 3, 100, 1.0)[0]), system(np.zeros((1, 100)))
    error = difference_error(trained, base, clusters)
    assert sample_size(0.05, error, clusters) == NotEstimable(
        "it is within the variance between seeds: train with more seeds"
    )
    equal = difference_error(base, base, clusters)
    assert isinstance(sample_size(0.05, equal, clusters), NotEstimable)
    with pytest.raises(ValueError, match="positive"):
        sample_size(0.0, error, clusters)


def test_two_thousand_prompts_take_no_time():
    """All intervals are in closed form or one root away: nothing is resampled."""
    rng = np.random.default_rng(0)
    base, ours, oracle = (system(rng.normal(mean, 1, size=(3, 2000)), first=10 * mean) for mean in (0, 1, 2))
    started = time.perf_counter()
    share = gap_over_seeds(base, ours, oracle, Clusters([p // 5 for p in range(2000)]))
    assert time.perf_counter() - started < 2.0
    assert share.low < 0.5 < share.high


def test_all_cells_of_an_experiment_are_adjusted_together():
    rng = np.random.default_rng(0)
    repeats, cells, false = 300, 6, 0
    for _ in range(repeats):
        tables = draw(rng, cells, 3, 40, 0.05)
        error = seed_error([tables], Clusters.single(40))
        p = 2 * scipy.stats.t.sf(np.abs(error.mean) / error.stderr, error.degrees_of_freedom)
        false += min(holm(p.tolist())) < 0.05
    assert false / repeats < 0.08
