"""Metrics of reward components that abstain are means over the samples of all ranks that they scored."""

from __future__ import annotations

from typing import Any

import pytest

from alignpro.distributed.ranks import Ranks
from alignpro.environments.base import _component_metrics
from alignpro.training.step_metrics import StepMetrics


class TwoRanks(Ranks):
    """The first of two ranks, which knows what the other one sends."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.group, self.size, self.other = object(), 2, other  # type: ignore[assignment]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self.other]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, None, 2.0, 5.0], [None, 7.0]),
        ([None, None, None], [1.0]),
        ([1.0, 2.0], [3.0, None, None]),
        ([1.0, 2.0], [4.0]),
    ],
)
def test_means_over_ranks(first: list[float | None], second: list[float | None]) -> None:
    whole = _component_metrics({"f": [*first, *second]})
    parts = [_component_metrics({"f": values}) for values in (first, second)]
    shares = [part.get("reward/f/abstained", 0.0) for part in parts]
    sent = {name: value * (1 - shares[1] if name == "reward/f" else 1) for name, value in parts[1].items()}
    ranks = TwoRanks((sent, len(second)))
    assert StepMetrics(ranks)._mean(parts[0], len(first)) == pytest.approx(whole)


def test_nothing_is_reported_of_a_component_that_scored_nothing() -> None:
    metrics = _component_metrics({"f": [None, None], "g": [1.0, 2.0]})
    assert metrics == {"reward/f/abstained": 1.0, "reward/g": 1.5}
    assert StepMetrics(Ranks())._mean(metrics, 2) == metrics
