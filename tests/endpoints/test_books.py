"""The books of a run: reservations are on disk, parts of a run add up, and requests wait for those in flight."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from random import Random

import pytest
from purchases import BOUND, answer, key

from alignpro.config import BudgetConfig, PriceConfig
from alignpro.endpoints.books import LedgerBooks, Spending
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.types import Purchase, Usage
from alignpro.errors import BudgetError, ConfigError, LedgerError, PeerError

DOLLAR_A_TOKEN = {"m": PriceConfig(input=Decimal(10**6), output=Decimal(10**6))}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


def books(ledger: Ledger, **limits: int) -> LedgerBooks:
    return LedgerBooks(ledger, BudgetConfig(**limits), DOLLAR_A_TOKEN, "run")


def states(ledger: Ledger) -> list[str]:
    with sqlite3.connect(ledger.path) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM purchases ORDER BY id")]


def test_the_intent_is_on_disk_before_the_request_may_be_sent(ledger: Ledger) -> None:
    async def run() -> None:
        own = books(ledger)
        purchase = await own.reserve([key(1), key(2)], BOUND)
        assert states(ledger) == ["open"]
        assert purchase == Purchase(purchase.id, (key(1), key(2)), BOUND)

    asyncio.run(run())


def test_what_was_answered_is_replayed_and_counted(ledger: Ledger) -> None:
    async def run() -> Spending:
        own = books(ledger)
        purchase = await own.reserve([key(1), key(2)], BOUND)
        await own.settle(purchase, [answer("a"), None], Usage(30, 12))
        found = await own.find([key(1), key(2), key(3)])
        assert [each and each.text for each in found] == ["a", None, None]
        return own.spending()

    assert asyncio.run(run()) == Spending(Decimal(42), 1, 42, unknown=0, unpriced=0, replayed=1)


def test_earlier_parts_of_a_run_count_and_a_higher_limit_goes_on(ledger: Ledger) -> None:
    async def part() -> None:
        own = books(ledger, usd=350)
        for draw in range(3):
            await own.settle(await own.reserve([key(draw)], BOUND), [answer()], Usage(80, 20))
        with pytest.raises(BudgetError, match=r"budget.usd is \$350.00: \$300.00 spent, \$0.00 reserved"):
            await own.reserve([key(99)], BOUND)

    asyncio.run(part())
    with pytest.raises(BudgetError, match=r"\$300.00 spent"):
        asyncio.run(books(ledger, usd=350).reserve([key(99)], BOUND))
    other = LedgerBooks(ledger, BudgetConfig(usd=Decimal(350)), DOLLAR_A_TOKEN, "another run")
    assert other.spending().usd == 0
    higher = books(ledger, usd=600)
    assert asyncio.run(higher.reserve([key(99)], BOUND)).bound == BOUND


def test_unknown_outcomes_are_charged_at_their_bound_and_counted(ledger: Ledger) -> None:
    async def run() -> Spending:
        own = books(ledger)
        await own.write_off(await own.reserve([key(1)], BOUND), "reset")
        await own.refund(await own.reserve([key(2)], BOUND), "429")
        await own.settle(await own.reserve([key(3)], BOUND), [answer()], None)
        return own.spending()

    expected = Spending(Decimal(300), 2, 300, unknown=1, unpriced=0, replayed=0)
    assert asyncio.run(run()) == expected
    assert books(ledger).spending() == expected
    assert states(ledger) == ["written_off", "refunded", "settled"]


def test_a_usage_that_is_no_number_of_tokens_is_charged_at_the_bound(ledger: Ledger) -> None:
    async def run() -> Spending:
        own = books(ledger)
        await own.settle(await own.reserve([key(1)], BOUND), [answer()], Usage(-5, 3))
        return own.spending()

    assert asyncio.run(run()).tokens == BOUND.total
    assert books(ledger).spending().tokens == BOUND.total


def test_a_request_waits_for_those_in_flight_rather_than_fail(ledger: Ledger) -> None:
    """150 of 200 are reserved; the second fits once the first has taken 30, the third not even after the second."""

    async def run() -> None:
        own = books(ledger, tokens=200)
        first = await own.reserve([key(1)], BOUND)
        second = asyncio.create_task(own.reserve([key(2)], BOUND))
        third = asyncio.create_task(own.reserve([key(3)], BOUND))
        await asyncio.sleep(0.02)
        assert not second.done() and not third.done() and states(ledger) == ["open"]
        await own.settle(first, [answer()], Usage(20, 10))
        await own.settle(await second, [answer()], Usage(90, 40))
        with pytest.raises(BudgetError, match=r"budget.tokens is 200: 160 spent, 0 reserved"):
            await third
        small = await own.reserve([key(4)], Usage(30, 10))
        await own.refund(small, "429")

    asyncio.run(run())


def test_one_that_is_cancelled_while_it_waits_leaves_its_place(ledger: Ledger) -> None:
    async def run() -> None:
        own = books(ledger, tokens=200)
        first = await own.reserve([key(1)], BOUND)
        tasks = [asyncio.create_task(own.reserve([key(draw)], BOUND)) for draw in (2, 3)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await own.refund(first, "429")
        assert (await tasks[1]).keys == (key(3),)
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    asyncio.run(run())


def test_one_that_is_cancelled_while_its_intent_is_written_costs_nothing(ledger: Ledger) -> None:
    async def run() -> None:
        own = books(ledger, requests=1)
        task = asyncio.create_task(own.reserve([key(1)], BOUND))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        purchase = await own.reserve([key(2)], BOUND)  # waits for the refund
        await own.settle(purchase, [answer()], None)

    asyncio.run(run())
    assert states(ledger) == ["refunded", "settled"]


def test_what_was_cancelled_before_the_ledger_closes_costs_nothing(tmp_path: Path) -> None:
    async def run(ledger: Ledger) -> None:
        ledger._writer.submit(lambda _: time.sleep(0.05))  # so that the intent is written while it closes
        task = asyncio.create_task(books(ledger).reserve([key(1)], BOUND))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asyncio.run(run(ledger))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert list(ledger.charges("run")) == [] and states(ledger) == ["refunded"]


def test_stopping_fails_what_waits_and_what_comes(ledger: Ledger) -> None:
    async def run() -> None:
        own = books(ledger, requests=1)
        first = await own.reserve([key(1)], BOUND)
        waiting = asyncio.create_task(own.reserve([key(2)], BOUND))
        await asyncio.sleep(0.01)
        own.stop("rank 3 failed")
        for refused in (waiting, own.reserve([key(3)], BOUND)):
            with pytest.raises(PeerError, match="rank 3 failed"):
                await refused
        await own.settle(first, [answer()], None)

    asyncio.run(run())


def test_more_than_the_bound_is_on_record_and_nothing_is_sent_after_it(ledger: Ledger) -> None:
    async def run() -> None:
        own = books(ledger, usd=10**6)
        await own.settle(await own.reserve([key(1)], BOUND), [answer()], Usage(1000, 50))
        with pytest.raises(BudgetError, match="charged 1050 tokens for a request that could take 150"):
            await own.reserve([key(2)], BOUND)
        assert own.spending().usd == 1050

    asyncio.run(run())
    assert books(ledger).spending().usd == 1050


def test_a_limit_in_dollars_needs_the_price_of_every_model(ledger: Ledger) -> None:
    async def run() -> None:
        free = LedgerBooks(ledger, BudgetConfig(), {}, "run")
        await free.settle(await free.reserve([key(1)], BOUND), [answer()], Usage(10, 5))
        assert free.spending().unpriced == 1
        capped = books(ledger, usd=1000)
        assert capped.spending().usd == 15 and capped.spending().unpriced == 0
        with pytest.raises(ConfigError, match="prices: has no price of unheard-of"):
            await capped.reserve([key(2, model="unheard-of")], BOUND)
        capped.require("m", 5, Usage(500, 400), "the next step")
        with pytest.raises(BudgetError, match=r"the next step could take \$1000.00"):
            capped.require("m", 5, Usage(500, 500), "the next step")
        await free.write_off(await free.reserve([key(2, model="unheard-of")], BOUND), "reset")

    asyncio.run(run())
    with pytest.raises(ConfigError, match="prices: has no price of unheard-of"):
        books(ledger, usd=1000)


def test_draws_of_two_questions_are_two_requests(ledger: Ledger) -> None:
    async def run() -> None:
        own = books(ledger, requests=1)
        with pytest.raises(ValueError, match="one question"):
            await own.reserve([key(1), key(1, body="{}")], BOUND)
        await own.reserve([key(1)], BOUND)

    asyncio.run(run())


def test_an_intent_that_cannot_be_written_is_not_sent_and_frees_its_reservation(ledger: Ledger) -> None:
    async def run() -> None:
        own = books(ledger, requests=1)
        with sqlite3.connect(ledger.path) as connection:
            connection.execute("DROP TABLE answers")
            connection.execute("ALTER TABLE purchases RENAME TO lost")
        with pytest.raises(LedgerError, match=rf"ledger {ledger.path}: cannot be used: no such table"):
            await own.reserve([key(1)], BOUND)
        with sqlite3.connect(ledger.path) as connection:
            connection.execute("ALTER TABLE lost RENAME TO purchases")
        await own.reserve([key(1)], BOUND)

    asyncio.run(run())


def test_many_at_once_never_exceed_the_limit(ledger: Ledger) -> None:
    async def run() -> None:
        random, own, refused = Random(0), books(ledger, tokens=5000), []

        async def one(draw: int) -> None:
            try:
                purchase = await own.reserve([key(draw)], BOUND)
            except BudgetError:
                refused.append(draw)
                return
            await asyncio.sleep(random.random() / 500)
            outcome = random.randrange(4)
            if outcome == 0:
                await own.refund(purchase, "429")
            elif outcome == 1:
                await own.write_off(purchase, "reset")
            else:
                await own.settle(purchase, [answer()], Usage(random.randrange(101), random.randrange(51)))

        await asyncio.gather(*(one(draw) for draw in range(200)))
        assert 5000 - BOUND.total < own.spending().tokens <= 5000 and refused
        assert own.spending() == books(ledger).spending()

    asyncio.run(run())
