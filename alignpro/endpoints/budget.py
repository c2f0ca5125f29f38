"""What a run may spend: every request reserves the most that it can take, before it is sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from alignpro.config import BudgetConfig
from alignpro.endpoints.prices import PICODOLLARS, show_dollars
from alignpro.errors import BudgetError


@dataclass(frozen=True)
class Charge:
    """What one request or several take, or may take."""

    requests: int = 0
    tokens: int = 0
    cost: int = 0
    """Picodollars; 0 if no price is known, which a limit in dollars excludes."""

    def __add__(self, other: Charge) -> Charge:
        return Charge(self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: Charge) -> Charge:
        return Charge(self.requests - other.requests, self.tokens - other.tokens, self.cost - other.cost)


Limited = Literal["usd", "requests", "tokens"]


class Budget:
    """The budget of a run: at any moment, spent + reserved ≤ limit. Pure arithmetic; not thread-safe.

    Args:
        config: The limits.
        spent: What earlier parts of the run took.
    """

    def __init__(self, config: BudgetConfig, spent: Charge) -> None:
        self._limits = _limits(config)
        self.spent = spent
        self.reserved = Charge()
        self._broken: str | None = None

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return bool(self._limits)

    def reserve(self, charge: Charge) -> bool:
        """Reserve the most that a request can take.

        Returns:
            Whether it is reserved; if not, it may fit once requests that are in flight have taken less than they could.

        Raises:
            BudgetError: It cannot fit any more.
        """
        if self._broken is not None:
            raise BudgetError(self._broken)
        self.require(charge, "the next request")
        if self._exceeded(self.spent + self.reserved + charge) is not None:
            return False
        self.reserved += charge
        return True

    def require(self, charge: Charge, what: str) -> None:
        """Check that so much more may be spent.

        Raises:
            BudgetError: It may not; the message says what was spent and reserved, what ``what`` could take, and what to
                raise.
        """
        key = self._exceeded(self.spent + charge)
        if key is not None:
            limit, spent, reserved, more = (
                _show(key, amount)
                for amount in (self._limits[key], *(_part(each, key) for each in (self.spent, self.reserved, charge)))
            )
            raise BudgetError(
                f"budget.{key} is {limit}: {spent} spent, {reserved} reserved for requests in flight, and {what} could take "
                f"{more}, so nothing more is sent; raise budget.{key} and continue (a training with --resume)"
            )

    def settle(self, reserved: Charge, actual: Charge) -> None:
        """Replace a reservation by what the request took.

        If that is more, the server does not count tokens as it should, and the limits cannot be kept: nothing is reserved
        any more.
        """
        self.reserved -= reserved
        self.spent += actual
        if self.limited and (actual.tokens > reserved.tokens or actual.cost > reserved.cost):
            self._broken = (
                f"budget: the server charged {actual.tokens} tokens for a request that could take {reserved.tokens}; it is "
                f"counted, but the budget cannot be kept: nothing more is sent; raise prompt_overhead if the server adds text "
                "of its own to prompts, and continue (a training with --resume)"
            )

    def _exceeded(self, total: Charge) -> Limited | None:
        return next((key for key, limit in self._limits.items() if _part(total, key) > limit), None)


def _limits(config: BudgetConfig) -> dict[Limited, int]:
    """Return the limits in the units of `Charge`; money that is not a whole number of picodollars is rounded down."""
    usd = None if config.usd is None else math.floor(Fraction(config.usd) * PICODOLLARS)
    limits: dict[Limited, int | None] = {"usd": usd, "requests": config.requests, "tokens": config.tokens}
    return {key: limit for key, limit in limits.items() if limit is not None}


def _part(charge: Charge, key: Limited) -> int:
    return charge.cost if key == "usd" else charge.requests if key == "requests" else charge.tokens


def _show(key: Limited, amount: int) -> str:
    return show_dollars(amount) if key == "usd" else str(amount)
