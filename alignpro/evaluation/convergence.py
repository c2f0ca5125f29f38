"""Whether the training of a compared model had converged: a gap to an oracle that still rises is a gap to its budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignpro.theory.statistics import Estimate, mean_estimate

_BLOCKS = 10
"""Blocks of consecutive steps in each of the two windows: means of blocks are less dependent than those of steps."""
METRIC = "reward/mean"


@dataclass(frozen=True)
class Convergence:
    """The reward of the last fifth of a training run beside that of the fifth before."""

    steps: int
    last: float
    """Mean reward of training samples in the last fifth of the steps."""
    change: Estimate
    """That minus the mean of the fifth before, with its interval."""

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {"steps": self.steps, "last": self.last, "change": self.change.as_dict()}


def convergence(rows: Sequence[Mapping[str, Any]]) -> Convergence | None:
    """Compare the last two fifths of a run.

    Args:
        rows: Its metrics.jsonl.

    Returns:
        None if a run has fewer than 10 steps with a reward.
    """
    numbers = [(row["step"], row[METRIC]) for row in rows if isinstance(row.get(METRIC), int | float)]
    rewards = [(step, float(reward)) for step, reward in numbers if math.isfinite(reward)]
    window = len(rewards) // 5
    if window < 2:
        return None
    values = np.array([reward for _, reward in rewards])
    before, last = values[-2 * window : -window], values[-window:]
    blocks = min(_BLOCKS, window)
    means = [np.array([block.mean() for block in np.array_split(each, blocks)]) for each in (before, last)]
    change = mean_estimate(means[1] - means[0], rewards=False)
    return Convergence(max(step for step, _ in rewards), float(last.mean()), change)
