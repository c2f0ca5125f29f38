import math

import numpy as np
import pytest
import torch

from alignpro.theory.statistics import VarianceParts, mean_estimate, nested_variance


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
    assert mean_estimate(r) == mean_estimate(r.numpy())


def test_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\(P, K, M\).*\(4, 2\)"):
        nested_variance(np.zeros((4, 2)))
