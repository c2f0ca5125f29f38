"""The factor on the learning rate that the KL of updates implies."""

from __future__ import annotations

import math

import pytest

from alignpro.objectives import StepSize


def test_a_step_within_the_limit_leaves_the_rate_as_it_is() -> None:
    size = StepSize(0.5)
    for kl in (0.0, 0.1, 0.5):
        assert not size.too_far(kl, 1.0)
        size.adapt(size.factor, kl, 1.0)
        assert size.factor == 1.0


def test_where_kl_is_quadratic_one_measurement_is_enough() -> None:
    size = StepSize(0.5)
    rate = 30.0
    assert size.too_far(0.02 * rate**2, 1.0)
    shortened = size.shortened(1.0, 0.02 * rate**2, 1.0)
    assert 0.02 * (rate * shortened) ** 2 == pytest.approx(0.5)
    size.adapt(shortened, 0.5, 1.0)
    assert 0.02 * (rate * size.factor) ** 2 == pytest.approx(0.5)


def test_a_moderate_excess_shortens_the_next_step_only() -> None:
    size = StepSize(0.5)
    assert not size.too_far(0.9, 1.0)
    size.adapt(size.factor, 0.9, 1.0)
    assert size.factor == pytest.approx(math.sqrt(0.5 / 0.9))


def test_the_factor_grows_back_by_a_quarter_a_step_and_not_beyond_one() -> None:
    size = StepSize(0.5)
    size.adapt(size.shortened(1.0, 50.0, 1.0), 0.0, 1.0)
    factors = [size.factor]
    for _ in range(11):
        size.adapt(size.factor, 0.0, 1.0)
        factors.append(size.factor)
    assert factors[:3] == pytest.approx([0.125, 0.15625, 0.1953125])
    assert factors[-1] == 1.0


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_policy_that_is_no_distribution_is_too_far(kl: float) -> None:
    size = StepSize(0.5)
    assert size.too_far(kl, 1.0)
    assert size.shortened(1.0, kl, 1.0) == pytest.approx(0.1)
    size.adapt(0.1, kl, 1.0)
    assert size.factor == pytest.approx(0.01)


def test_the_updates_that_a_step_has_not_made_would_have_gone_as_far_as_those_before() -> None:
    size, per_update = StepSize(0.5), 0.02
    made = 7
    size.adapt(1.0, per_update * made**2, 1.0, made / 10)
    assert per_update * (10 * size.factor) ** 2 == pytest.approx(0.5)
    size.adapt(1.0, 50.0, 1.0, 0.01)
    assert size.factor == pytest.approx(0.1)  # and not less in one step


def test_a_decayed_rate_has_a_smaller_limit_but_none_below_rounding() -> None:
    assert not StepSize(0.5).too_far(0.3, 1.0)
    assert StepSize(0.5).too_far(0.3, 0.5)
    assert not StepSize(0.5).too_far(1e-5, 0.0)


def test_the_state_is_the_factor() -> None:
    size, restored = StepSize(0.5), StepSize(0.5)
    size.adapt(size.factor, 7.0, 1.0)
    restored.load_state_dict(size.state_dict())
    assert restored.factor == size.factor < 1
