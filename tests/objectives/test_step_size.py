"""The factor on the learning rate that the KL of updates implies."""

from __future__ import annotations

import math

import pytest

from alignpro.objectives import StepSize


def test_a_step_within_the_limit_leaves_the_rate_as_it_is() -> None:
    size = StepSize(0.5)
    for kl in (0.0, 0.1, 0.5):
        assert not size.shorten(kl, 1.0)
        size.adapt(kl, 1.0)
        assert size.factor == 1.0


def test_where_kl_is_quadratic_one_measurement_is_enough() -> None:
    size = StepSize(0.5)
    rate = 30.0
    assert size.shorten(0.02 * rate**2, 1.0)
    assert 0.02 * (rate * size.factor) ** 2 == pytest.approx(0.5)
    size.adapt(0.5, 1.0)
    assert 0.02 * (rate * size.factor) ** 2 == pytest.approx(0.5)


def test_a_moderate_excess_shortens_the_next_step_only() -> None:
    size = StepSize(0.5)
    assert not size.shorten(0.9, 1.0)
    size.adapt(0.9, 1.0)
    assert size.factor == pytest.approx(math.sqrt(0.5 / 0.9))


def test_the_factor_grows_back_by_a_quarter_a_step_and_not_beyond_one() -> None:
    size = StepSize(0.5)
    assert size.shorten(50.0, 1.0)
    factors = []
    for _ in range(12):
        size.adapt(0.0, 1.0)
        factors.append(size.factor)
    assert factors[:3] == pytest.approx([0.125, 0.15625, 0.1953125])
    assert factors[-1] == 1.0


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_policy_that_is_no_distribution_is_too_far(kl: float) -> None:
    size = StepSize(0.5)
    assert size.shorten(kl, 1.0)
    assert size.factor == pytest.approx(0.1)
    size.adapt(kl, 1.0)
    assert size.factor == pytest.approx(0.01)


def test_a_decayed_rate_has_a_smaller_limit_but_none_below_rounding() -> None:
    assert not StepSize(0.5).shorten(0.3, 1.0)
    assert StepSize(0.5).shorten(0.3, 0.5)
    assert not StepSize(0.5).shorten(1e-5, 0.0)


def test_the_state_is_the_factor() -> None:
    size, restored = StepSize(0.5), StepSize(0.5)
    size.shorten(7.0, 1.0)
    restored.load_state_dict(size.state_dict())
    assert restored.factor == size.factor < 1
