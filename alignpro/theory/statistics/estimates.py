"""A number with its confidence interval, or with the reason why the data do not determine one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A confidence interval; low < high."""

    low: float
    high: float


@dataclass(frozen=True)
class NotEstimable:
    """The data do not determine the interval."""

    reason: str


@dataclass(frozen=True)
class Estimate:
    """A number, its confidence interval or the reason why it has none, and the p-value of the hypothesis that it is 0."""

    value: float
    """NaN or infinite if the number itself is not defined."""
    interval: Interval | NotEstimable
    p_value: float | None = None
    """Two-sided; None if it was not tested."""

    @property
    def low(self) -> float:
        """Lower end of the interval; NaN if there is none."""
        return self.interval.low if isinstance(self.interval, Interval) else math.nan

    @property
    def high(self) -> float:
        """Upper end of the interval; NaN if there is none."""
        return self.interval.high if isinstance(self.interval, Interval) else math.nan

    @property
    def not_estimable(self) -> str | None:
        """Why there is no interval; None if there is one."""
        return self.interval.reason if isinstance(self.interval, NotEstimable) else None

    def as_dict(self) -> dict[str, Any]:
        """The content for JSON, which has no NaN: missing numbers are None, and ``not_estimable`` gives the reason."""
        numbers = {name: finite_or_none(getattr(self, name)) for name in ("value", "low", "high")}
        return numbers | {"p_value": self.p_value, "not_estimable": self.not_estimable}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Estimate:
        """The estimate that `as_dict` gave."""
        value = math.nan if content["value"] is None else content["value"]
        if content["not_estimable"] is not None:
            return cls(value, NotEstimable(content["not_estimable"]), content["p_value"])
        return cls(value, Interval(content["low"], content["high"]), content["p_value"])


def finite_or_none(value: float | None) -> float | None:
    """The number if it is finite, else None, since JSON has no NaN or infinity."""
    return value if value is not None and math.isfinite(value) else None
