"""Clusters of prompts that are not independent of each other, and the cluster-robust error of a mean."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from alignpro.theory.statistics.values import FloatArray


@dataclass(frozen=True)
class MeanError:
    """The mean of prompts and its error, for a batch of data sets with the same clusters."""

    mean: FloatArray
    """(...,)"""
    stderr: FloatArray
    """(...,) cluster-robust standard error; 0 where the clusters do not differ."""
    skewness: FloatArray
    """(...,) skewness of the clusters' sums of residuals; 0 where the error is 0."""


class Clusters:
    """Which prompts belong together: those of one template, source or conversation. Only clusters are independent draws.

    Args:
        labels: (P,) the cluster of each prompt.
    """

    def __init__(self, labels: Sequence[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        index = np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)
        self.prompts, self.count = len(index), len(numbers)
        self.numbers: npt.NDArray[np.int64] = index
        """(P,) the number of each prompt's cluster, from 0 in order of first appearance."""
        self._order = np.argsort(index, kind="stable")
        self._sizes: npt.NDArray[np.int64] = np.bincount(index, minlength=self.count)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])

    @classmethod
    def single(cls, prompts: int) -> Clusters:
        """Every prompt is its own cluster."""
        return cls(range(prompts))

    @property
    def independent(self) -> bool:
        """Whether every prompt is its own cluster."""
        return self.count == self.prompts

    @cached_property
    def degrees_of_freedom(self) -> float:
        """Degrees of freedom of the standard error (Bell & McCaffrey, 2002): count − 1 for clusters of equal size, fewer
        otherwise."""
        if self.count < 2:
            return 0.0
        share = self._sizes / self.prompts
        spread = share**2 / (1 - share)
        off_diagonal = spread.sum() ** 2 - (spread**2).sum()
        return float(1.0 / ((share**2).sum() + off_diagonal))

    def error(self, values: FloatArray) -> MeanError:
        """The mean over prompts with its cluster-robust error (CR2 of Bell & McCaffrey, 2002).

        If every prompt is its own cluster, the error is the ordinary s/√P.

        Args:
            values: (..., P).
        """
        mean = values.mean(-1)
        residuals = values - mean[..., None]
        if not self.independent:
            residuals = np.add.reduceat(residuals[..., self._order], self._starts, axis=-1)  # (..., G)
        share = self._sizes / self.prompts if not self.independent else np.full(self.count, 1 / self.prompts)
        with np.errstate(divide="ignore", invalid="ignore"):
            squares = (residuals**2 / (1 - share)).sum(-1)
            flat = (residuals**2).mean(-1) <= (1e-12 * np.maximum(1.0, np.abs(values).max(-1))) ** 2
            skewness = (residuals**3).mean(-1) / (residuals**2).mean(-1) ** 1.5
        stderr = np.where(flat, 0.0, np.sqrt(squares) / self.prompts)
        return MeanError(mean, stderr, np.where(flat, 0.0, skewness))
