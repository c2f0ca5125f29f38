"""How well a reward model ranks pairs of a preferred and a rejected response, and how far it follows their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.theory.statistics.clusters import Clusters
from alignpro.theory.statistics.estimates import Estimate
from alignpro.theory.statistics.intervals import mean_estimate, paired_estimate
from alignpro.theory.statistics.values import FloatArray, Values, prompt_means

_BINS = 10


@dataclass(frozen=True)
class PairStatistics:
    """Statistics of margins r(x, y_chosen) − r(x, y_rejected)."""

    accuracy: Estimate
    """Share of pairs ranked as the data do; a tie counts half."""
    ties: float
    """Share of pairs with equal rewards."""
    overconfidence: float
    """Mean probability σ(|margin|) of the response that the model prefers, minus the accuracy; 0 if calibrated."""
    calibration_error: float
    """Expected calibration error: mean absolute difference of the two over bins of equally many pairs. It is above 0 by
    chance, by about 1/√(pairs per bin)."""
    length_correlation: float
    """Correlation of the margin with the difference of lengths, over both orders of each pair; 0 if all lengths are equal."""
    longer_chosen: float
    """Share of pairs in which the data prefer the longer response; equal lengths count half."""
    longer_preferred: float
    """Share of pairs in which the model does."""
    above_length: Estimate
    """Accuracy minus that of a rule that knows lengths alone: the longer response, or the shorter one if the data prefer that
    more often. The rule is chosen on the same pairs, which favours it."""


def pair_statistics(margins: Values, lengths: Sequence[tuple[int, int]], clusters: Clusters) -> PairStatistics:
    """Statistics of a reward model on pairs.

    Args:
        margins: (N,) r(x, y_chosen) − r(x, y_rejected).
        lengths: (N,) lengths of the chosen and of the rejected response.
        clusters: The pairs that belong together, such as those of one prompt.

    Raises:
        ValueError: There are no pairs, or a margin is not finite.
    """
    margin = prompt_means(margins)
    right = _half_for_ties(margin)  # (N,)
    probability = 1 / (1 + np.exp(-np.abs(margin)))
    longer = np.array([chosen - rejected for chosen, rejected in lengths], np.float64)
    by_length = _half_for_ties(longer)
    rule = by_length if by_length.mean() >= 0.5 else 1 - by_length
    scale = float(np.sqrt((margin**2).sum() * (longer**2).sum()))
    return PairStatistics(
        accuracy=mean_estimate(right, clusters),
        ties=float((margin == 0).mean()),
        overconfidence=float(probability.mean() - right.mean()),
        calibration_error=_calibration_error(probability, right),
        length_correlation=float((margin * longer).sum()) / scale if scale > 0 else 0.0,
        longer_chosen=float(by_length.mean()),
        longer_preferred=float(_half_for_ties(margin * longer).mean()),
        above_length=paired_estimate(right, rule, clusters),
    )


def _half_for_ties(values: FloatArray) -> FloatArray:
    """1 for positive values, ½ for 0, 0 for negative ones."""
    half: FloatArray = (1 + np.sign(values)) / 2
    return half


def _calibration_error(probability: FloatArray, right: FloatArray) -> float:
    order = np.argsort(probability, kind="stable")
    bins = [each for each in np.array_split(order, _BINS) if len(each)]
    errors = [len(each) * abs(float((probability[each] - right[each]).mean())) for each in bins]
    return sum(errors) / len(probability)
