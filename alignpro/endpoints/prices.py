"""What requests cost, in exact arithmetic: money is a whole number of picodollars (10⁻¹² $)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction

from alignpro.config import PriceConfig
from alignpro.endpoints.types import Usage
from alignpro.errors import ConfigError

PICODOLLARS = 10**12
_PRICED_TOKENS = 10**6


class Prices:
    """The price table of a configuration.

    Args:
        models: Model → what it costs.
    """

    def __init__(self, models: Mapping[str, PriceConfig]) -> None:
        token = Fraction(PICODOLLARS, _PRICED_TOKENS)
        self._models = {
            model: (
                Fraction(price.input) * token,
                Fraction(price.output) * token,
                Fraction(price.request) * PICODOLLARS,
            )
            for model, price in models.items()
        }

    def require(self, models: Iterable[str]) -> None:
        """Check that the price of every model is known.

        Raises:
            ConfigError: One is not; the message names it.
        """
        for model in models:
            if model not in self._models:
                known = ", ".join(sorted(self._models)) or "none"
                raise ConfigError(
                    f"prices: has no price of {model} (it has: {known}), and budget.usd limits what may be spent: an unknown "
                    "price is not 0; add it, 0 if the server costs nothing"
                )

    def cost(self, model: str, usage: Usage, requests: int = 1) -> int | None:
        """Return the cost in picodollars, a fraction of one rounded up; None if the price is not known."""
        if model not in self._models:
            return None
        input_price, output_price, request_price = self._models[model]
        return math.ceil(usage.input * input_price + usage.output * output_price + requests * request_price)


def dollars(picodollars: int) -> Decimal:
    """Return an amount in dollars, exactly."""
    return Decimal(picodollars).scaleb(-12)


def show_dollars(picodollars: int) -> str:
    """Write an amount exactly, with at least two decimals: ``$1.50``, ``$0.000012``."""
    whole, fraction = divmod(picodollars, PICODOLLARS)
    return f"${whole}.{f'{fraction:012}'.rstrip('0').ljust(2, '0')}"
