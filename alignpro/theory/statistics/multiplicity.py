"""Many comparisons in one report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm, 1979): rejecting those below α keeps the chance of any false one below α.

    Args:
        p_values: Of all comparisons of one report, dependent or not.

    Returns:
        The adjusted values in the given order, each at least its own and at most 1.
    """
    order = np.argsort(p_values, kind="stable")
    count = len(p_values)
    adjusted, largest = [0.0] * count, 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
