"""Money: exact costs, bounds that hold, and a budget that is never exceeded, whatever is charged, fails or is killed."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.config import BudgetConfig, PriceConfig, SpendingConfig, validate_config
from alignpro.endpoints.budget import Budget, Charge
from alignpro.endpoints.prices import Prices, dollars, show_dollars
from alignpro.endpoints.types import Usage
from alignpro.errors import BudgetError, ConfigError


def price(input: str, output: str, request: str = "0") -> PriceConfig:
    return PriceConfig(input=Decimal(input), output=Decimal(output), request=Decimal(request))


# -------------------------------------------------------------------------------------------------------------- prices


def test_costs_are_exact() -> None:
    prices = Prices({"m": price("0.15", "0.6", "0.001")})
    cost = prices.cost("m", Usage(1_000, 200))
    assert cost == 1_270_000_000 and show_dollars(cost) == "$0.00127"
    assert 1000 * dollars(cost) == Decimal("1.27")
    assert prices.cost("m", Usage(1_000_000, 200_000), requests=1000) == 1000 * cost


def test_a_fraction_of_a_picodollar_is_rounded_up() -> None:
    prices = Prices({"m": price("0.0000001", "0")})
    assert [prices.cost("m", Usage(tokens, 0)) for tokens in (0, 1, 10, 11)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    "amount, shown", [(0, "$0.00"), (1, "$0.000000000001"), (1_500_000_000_000, "$1.50"), (12 * 10**12, "$12.00")]
)
def test_amounts_are_shown_exactly(amount: int, shown: str) -> None:
    assert show_dollars(amount) == shown and Decimal(shown[1:]) == dollars(amount)


def test_an_unknown_price_is_not_zero() -> None:
    prices = Prices({"a": price("1", "1")})
    assert prices.cost("b", Usage(1, 1)) is None
    prices.require(["a"])
    with pytest.raises(ConfigError, match=r"prices: has no price of b \(it has: a\), and budget.usd limits"):
        prices.require(["a", "b"])


def test_a_limit_in_dollars_without_any_price_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=re.escape("budget.usd needs `prices`: an unknown price is not 0")):
        validate_config(SpendingConfig, {"budget": {"usd": 1}})


# -------------------------------------------------------------------------------------------------------------- budget


def test_a_request_that_cannot_fit_is_refused_in_one_plain_sentence() -> None:
    budget = Budget(BudgetConfig(usd=Decimal("1.00")), Charge(3, 900, 600_000_000_000))
    assert budget.reserve(Charge(1, 10, 300_000_000_000))
    with pytest.raises(BudgetError) as refused:
        budget.reserve(Charge(1, 10, 400_000_000_001))
    assert str(refused.value) == (
        "budget.usd is $1.00: $0.60 spent, $0.30 reserved for requests in flight, and the next request could take "
        "$0.400000000001, so nothing more is sent; raise budget.usd and continue (a training with --resume)"
    )
    with pytest.raises(BudgetError, match=r"and the next step could take \$0.50, so nothing"):
        budget.require(Charge(8, 80, 500_000_000_000), "the next step")


def test_a_request_that_may_fit_later_is_not_reserved_now() -> None:
    budget = Budget(BudgetConfig(tokens=100), Charge())
    assert budget.reserve(Charge(1, 60))
    assert not budget.reserve(Charge(1, 60))
    budget.settle(Charge(1, 60), Charge(1, 40))
    assert budget.reserve(Charge(1, 60))
    assert (budget.spent, budget.reserved) == (Charge(1, 40), Charge(1, 60))


@pytest.mark.parametrize("config", [BudgetConfig(requests=0), BudgetConfig(tokens=0), BudgetConfig(usd=Decimal(0))])
def test_a_limit_of_zero_buys_nothing(config: BudgetConfig) -> None:
    with pytest.raises(BudgetError, match=r"is \$?0"):
        Budget(config, Charge()).reserve(Charge(1, 1, 1))


def test_a_free_model_fits_in_zero_dollars() -> None:
    assert Budget(BudgetConfig(usd=Decimal(0)), Charge()).reserve(Charge(1, 100, 0))


def test_without_limits_all_is_allowed_and_counted() -> None:
    budget = Budget(BudgetConfig(), Charge())
    assert budget.reserve(Charge(1, 10))
    budget.settle(Charge(1, 10), Charge(1, 10**9))
    assert budget.reserve(Charge(1, 10)) and budget.spent.tokens == 10**9


def test_more_than_the_bound_is_charged_and_nothing_is_sent_after_it() -> None:
    budget = Budget(BudgetConfig(tokens=1000), Charge())
    assert budget.reserve(Charge(1, 10))
    budget.settle(Charge(1, 10), Charge(1, 12))
    assert budget.spent == Charge(1, 12)
    with pytest.raises(
        BudgetError, match=r"charged 12 tokens for a request that could take 10; .*raise prompt_overhead"
    ):
        budget.reserve(Charge(1, 1))


@given(
    cap=st.integers(0, 10**7),
    units=st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**3)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=1000)
def test_a_budget_is_never_exceeded(cap: int, units: tuple[int, int, int], seed: int) -> None:
    """A run of two parts that end in kills; what the server really takes is summed independently, in fractions.

    The limit is in nanodollars, prices of a million tokens in units of 10⁻⁷ $, that of a request in microdollars.
    """
    usd = Decimal(cap).scaleb(-9)
    prices = (Decimal(units[0]).scaleb(-7), Decimal(units[1]).scaleb(-7), Decimal(units[2]).scaleb(-6))
    table = Prices({"m": PriceConfig(input=prices[0], output=prices[1], request=prices[2])})
    random = Random(seed)
    ledger: list[Charge] = []
    billed = Fraction(0)
    for _ in range(2):
        budget = Budget(BudgetConfig(usd=usd), sum(ledger, Charge()))
        flight: list[tuple[Charge, Usage]] = []
        for _ in range(12):
            bound = Usage(random.randrange(1, 200), random.randrange(1, 100))
            if len(flight) < 4:
                charge = Charge(1, bound.total, table.cost("m", bound) or 0)
                try:
                    if budget.reserve(charge):
                        flight.append((charge, bound))
                        continue
                except BudgetError:
                    pass
            if not flight:
                continue
            charge, bound = flight.pop(random.randrange(len(flight)))
            used = Usage(random.randrange(bound.input + 1), random.randrange(bound.output + 1))
            outcome = random.choice(["usage", "no usage", "unknown", "refused"])
            actual = Charge() if outcome == "refused" else charge
            if outcome != "refused":
                billed += bill(used, prices)
            if outcome == "usage":
                actual = Charge(1, used.total, table.cost("m", used) or 0)
            budget.settle(charge, actual)
            ledger.append(actual)
        for charge, bound in flight:  # killed in flight: the server may have done all of it
            ledger.append(charge)
            billed += bill(bound, prices)
        spent = sum(ledger, Charge())
        assert billed <= Fraction(spent.cost, 10**12) <= Fraction(usd)


def bill(usage: Usage, prices: tuple[Decimal, Decimal, Decimal]) -> Fraction:
    input, output, request = map(Fraction, prices)
    return (usage.input * input + usage.output * output) / 1_000_000 + request
