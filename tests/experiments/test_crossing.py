"""From how many target calls on a training pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_transfer import synthetic

from alignpro.evaluation.experiment_charts import CallCurve
from alignpro.experiments import crossing
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


def test_methods_with_the_same_label_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = {"align_pro": [0.4, 0.6], "gepa": [0.3, 0.5], "helped": [0.7, 0.8]}
    curves = {name: CallCurve([10, 40], each) for name, each in rewards.items()}
    monkeypatch.setattr(crossing, "_curve", lambda each, done: curves[each.method])
    ours, gepa, helped = (synthetic("toy", name, name, 0.5) for name in curves)
    rivals = [replace(each, label="GEPA") for each in (gepa, helped)]
    found = crossing._analysis("letters", rivals, [ours], [])
    assert [each["crossing"] for each in found.results["pairs"]] == [10, None]
    assert [row[0] for row in found.rows] == ["align_pro − GEPA (gepa)", "align_pro − GEPA (helped)"]
