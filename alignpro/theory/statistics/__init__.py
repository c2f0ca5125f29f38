"""Statistics of rewards: variance parts, intervals, shares of a gap, many comparisons. Pure functions of arrays.

Prompts, or clusters of prompts, are the independent draws; the rewards of a prompt are averaged first. What the data do not
determine is `NotEstimable` with its reason, never an interval without width. May import `errors` only.
"""

from alignpro.theory.statistics.clusters import Clusters
from alignpro.theory.statistics.estimates import Estimate, Interval, NotEstimable, finite_or_none
from alignpro.theory.statistics.gap import gap_recovered
from alignpro.theory.statistics.intervals import mean_estimate, paired_estimate
from alignpro.theory.statistics.judgements import (
    JudgedPairs,
    JudgementStatistics,
    cohen_kappa,
    judgement_statistics,
    outcomes,
)
from alignpro.theory.statistics.length_control import LengthControlled, length_controlled
from alignpro.theory.statistics.multiplicity import holm
from alignpro.theory.statistics.pairs import PairStatistics, pair_statistics
from alignpro.theory.statistics.power import SampleSize, sample_size
from alignpro.theory.statistics.seeds import (
    SeedError,
    SeedRewards,
    difference_error,
    difference_over_seeds,
    gap_over_seeds,
    mean_over_seeds,
)
from alignpro.theory.statistics.values import FloatArray, Values, finite, prompt_means
from alignpro.theory.statistics.variance import VarianceParts, nested_variance

__all__ = [
    "Clusters",
    "Estimate",
    "FloatArray",
    "Interval",
    "JudgedPairs",
    "JudgementStatistics",
    "LengthControlled",
    "NotEstimable",
    "PairStatistics",
    "SampleSize",
    "SeedError",
    "SeedRewards",
    "Values",
    "VarianceParts",
    "cohen_kappa",
    "difference_error",
    "difference_over_seeds",
    "finite",
    "finite_or_none",
    "gap_over_seeds",
    "gap_recovered",
    "holm",
    "judgement_statistics",
    "length_controlled",
    "mean_estimate",
    "mean_over_seeds",
    "nested_variance",
    "outcomes",
    "pair_statistics",
    "paired_estimate",
    "prompt_means",
    "sample_size",
]
