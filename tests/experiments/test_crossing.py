"""From how many target calls on a training pays."""

from __future__ import annotations

import pytest

from alignpro.evaluation.experiment_charts import CallCurve
from alignpro.experiments.crossing import crossing_point, mean_curve

RIVAL = CallCurve([32, 64, 96], [0.3, 0.5, 0.5], steps=True)


@pytest.mark.parametrize(
    ("calls", "rewards", "expected"),
    [
        ([16, 48, 80, 112], [0.4, 0.35, 0.6, 0.7], 80),  # above, below at 64, above again
        ([16, 48, 80, 112], [0.6, 0.6, 0.6, 0.6], 32),  # always: from where both are known
        ([16, 48, 80, 112], [0.2, 0.2, 0.4, 0.4], None),
        ([200, 300], [0.9, 0.9], None),  # no number of calls that both have
    ],
)
def test_the_crossing_point_is_where_a_curve_stays_above(
    calls: list[float], rewards: list[float], expected: float | None
) -> None:
    assert crossing_point(CallCurve(calls, rewards), RIVAL) == expected


def test_the_mean_curve_is_of_the_calls_that_all_seeds_have() -> None:
    mean = mean_curve([RIVAL, CallCurve([40, 120], [0.1, 0.9], steps=True)])
    assert mean.calls == [40, 64, 96]
    assert mean.reward == pytest.approx([0.2, 0.3, 0.3])
