import numpy as np
import pytest

from alignpro.theory.statistics import Clusters, pair_statistics


def test_a_tie_counts_half():
    statistics = pair_statistics([1.0, -2.0, 0.0, 0.0], [(1, 1)] * 4, Clusters.single(4))
    assert statistics.accuracy.value == 0.5
    assert statistics.accuracy.not_estimable is None
    assert statistics.ties == 0.5
    assert statistics.length_correlation == 0.0


def test_calibration_is_that_of_the_probabilities():
    """Pairs drawn with the model's own probabilities are calibrated; with margins three times as large they are not."""
    draw = np.random.default_rng(0)
    strength = draw.exponential(size=4000)
    right = draw.random(4000) < 1 / (1 + np.exp(-strength))
    margins = np.where(right, strength, -strength)
    lengths, clusters = [(1, 2)] * 4000, Clusters.single(4000)
    honest, bold = (pair_statistics(scale * margins, lengths, clusters) for scale in (1, 3))
    assert abs(honest.overconfidence) < 0.02
    assert honest.calibration_error < 0.04
    assert bold.overconfidence == pytest.approx(bold.calibration_error)
    assert bold.overconfidence > 0.1


def test_a_model_that_measures_length_is_found_out():
    lengths = [(5, 2), (9, 3), (4, 8), (7, 7)]
    longer = np.array([a - b for a, b in lengths], float)
    statistics = pair_statistics(longer, lengths, Clusters.single(4))
    assert statistics.length_correlation == pytest.approx(1.0)
    assert statistics.longer_preferred == pytest.approx(7 / 8)
    assert statistics.longer_chosen == pytest.approx(5 / 8)
    swapped = pair_statistics(-longer, [(b, a) for a, b in lengths], Clusters.single(4))
    assert swapped.length_correlation == pytest.approx(1.0), "the order within pairs does not matter"


def test_what_it_knows_beyond_length_is_a_paired_difference():
    """Lengths are right in three pairs of four; so is a model that follows them, and one that is always right knows more."""
    lengths = [(5, 2), (9, 3), (4, 8), (7, 2)] * 50
    clusters = Clusters.single(200)
    longer = np.array([a - b for a, b in lengths], float)
    assert pair_statistics(longer, lengths, clusters).above_length.value == 0.0
    right = pair_statistics(np.ones(200), lengths, clusters).above_length
    assert right.value == pytest.approx(0.25)
    assert 0.15 < right.low < 0.25 < right.high < 0.35
    shorter = [(b, a) for a, b in lengths]
    assert pair_statistics(np.ones(200), shorter, clusters).above_length.value == pytest.approx(0.25), (
        "the shorter wins"
    )
