"""The books of a run: what the ledger holds is not bought again, and what the budget does not allow is not sent."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal

from alignpro.config import BudgetConfig, PriceConfig
from alignpro.endpoints.budget import Budget, Charge
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.prices import Prices, dollars
from alignpro.endpoints.types import Answer, DrawKey, Purchase, Usage
from alignpro.errors import PeerError


@dataclass(frozen=True)
class Spending:
    """What a run has spent, earlier parts of it included; ``replayed`` counts since the books were opened."""

    usd: Decimal
    """Of the requests whose price is known."""
    requests: int
    tokens: int
    unknown: int
    """Requests whose outcome is unknown; they are charged at their bound."""
    unpriced: int
    """Requests to models without a price."""
    replayed: int
    """Answers that came from the ledger."""


class LedgerBooks:
    """`Books` on a ledger. Its methods may be awaited in event loops of several threads.

    A request that does not fit beside those that are in flight waits, since they seldom take all that is reserved for them;
    those that wait proceed in the order in which they came. An error is raised once a request could not fit even then.

    Args:
        ledger: The ledger, which stays open until its owner closes it.
        budget: The limits of the run.
        prices: Model → what it costs.
        run_id: Identity of the run, whose earlier parts count.

    Raises:
        ConfigError: There is a limit in dollars, and the price of a model that the run has asked is not known.
    """

    def __init__(self, ledger: Ledger, budget: BudgetConfig, prices: Mapping[str, PriceConfig], run_id: str) -> None:
        self._ledger = ledger
        self._run = run_id
        self._prices = Prices(prices)
        self._capped = budget.usd is not None
        self._lock = threading.Lock()  # of all that follows
        self._unknown = self._unpriced = self._replayed = 0
        self._budget = Budget(budget, self._spent_before())
        self._reserved: dict[int, Charge] = {}
        self._waiting: deque[Future[None]] = deque()
        self._stopped: str | None = None

    async def find(self, keys: Sequence[DrawKey]) -> list[Answer | None]:
        """The answers that have been received before."""
        found = await self._ledger.wait(self._ledger.find(keys))
        with self._lock:
            self._replayed += sum(answer is not None for answer in found)
        return found

    async def reserve(self, keys: Sequence[DrawKey], bound: Usage) -> Purchase:
        """Reserve the cost of one request for these draws, and commit the intent to send it.

        Raises:
            BudgetError: The request could exceed the budget, or the server has charged more than a request could take.
            ConfigError: There is a limit in dollars, and the price of the model is not known.
            LedgerError: The intent cannot be written.
            PeerError: `stop` was called.
        """
        model = keys[0].model
        if self._capped:
            self._prices.require([model])
        cost = self._prices.cost(model, bound)
        charge = Charge(1, bound.total, cost or 0)
        await self._admit(charge)
        try:
            written = self._ledger.intend(self._run, keys, bound, cost)
        except BaseException:
            self._free(charge)
            raise
        written.add_done_callback(lambda done: self._register(done, charge))
        try:
            purchase = await self._ledger.wait(written)
        except asyncio.CancelledError:
            written.add_done_callback(self._abandon)
            raise
        return Purchase(purchase, tuple(keys), bound)

    async def settle(
        self, purchase: Purchase, answers: Sequence[Answer | None], usage: Usage | None
    ) -> list[Answer | None]:
        """Record what came back for each key, and the tokens that it took; without ``usage`` the bound is charged.

        So it is if ``usage`` is no number of tokens. What is charged is what the server reports, even beyond the bound.

        Returns:
            The answers that the ledger holds from now on: where another request for a draw was faster, its answer.

        Raises:
            LedgerError: They cannot be written.
        """
        if usage is not None and min(usage.input, usage.output) < 0:
            usage = None
        model = purchase.keys[0].model
        cost = self._prices.cost(model, usage or purchase.bound)
        actual = Charge(1, (usage or purchase.bound).total, cost or 0)
        written = self._ledger.settle(purchase.id, purchase.keys, answers, usage, cost)
        self._close(purchase, actual, unpriced=cost is None)
        return await self._ledger.wait(written)

    async def refund(self, purchase: Purchase, reason: str) -> None:
        """The request certainly was not processed: it costs nothing."""
        written = self._ledger.refund(purchase.id, reason)
        self._close(purchase, Charge())
        await self._ledger.wait(written)

    async def write_off(self, purchase: Purchase, reason: str) -> None:
        """The outcome of the request is unknown (it was reset or timed out in flight): it is charged at its bound."""
        written = self._ledger.write_off(purchase.id, reason)
        cost = self._prices.cost(purchase.keys[0].model, purchase.bound)
        self._close(purchase, Charge(1, purchase.bound.total, cost or 0), unpriced=cost is None, unknown=True)
        await self._ledger.wait(written)

    def require(self, model: str, requests: int, most: Usage, what: str) -> None:
        """Check that a piece of work fits in what is left of the budget, before it begins.

        Args:
            model: Whom it asks.
            requests: How many requests it takes.
            most: The most tokens that they can take together.
            what: What it is, such as ``the next step``.

        Raises:
            BudgetError: It could exceed the budget.
            ConfigError: There is a limit in dollars, and the price of the model is not known.
        """
        if self._capped:
            self._prices.require([model])
        cost = self._prices.cost(model, most, requests) or 0
        with self._lock:
            self._budget.require(Charge(requests, most.total, cost), what)

    def spending(self) -> Spending:
        """Return what has been spent so far."""
        with self._lock:
            spent = self._budget.spent
            return Spending(
                dollars(spent.cost), spent.requests, spent.tokens, self._unknown, self._unpriced, self._replayed
            )

    def stop(self, reason: str) -> None:
        """Let every reservation fail from now on, those that wait included: the run ends."""
        with self._lock:
            self._stopped = reason
            for waiting in self._waiting:
                if not waiting.done():
                    waiting.set_result(None)

    def _spent_before(self) -> Charge:
        spent = Charge()
        for charge in self._ledger.charges(self._run):
            cost = charge.cost
            if cost is None:  # it had no price at the time
                if self._capped:
                    self._prices.require([charge.model])
                cost = self._prices.cost(charge.model, charge.usage)
            self._unpriced += cost is None
            self._unknown += charge.unknown
            spent += Charge(1, charge.usage.total, cost or 0)
        return spent

    async def _admit(self, charge: Charge) -> None:
        """Reserve in the budget; wait for requests in flight if it only fits once they have taken less than they could."""
        place: Future[None] | None = None
        try:
            while True:
                with self._lock:
                    self._check_running()
                    first = not self._waiting or self._waiting[0] is place
                    if first and self._budget.reserve(charge):
                        return
                    fresh: Future[None] = Future()
                    fresh.set_running_or_notify_cancel()  # only `_wake` and `stop` end it
                    if place is None:
                        self._waiting.append(fresh)
                    else:
                        self._waiting[self._waiting.index(place)] = fresh
                    place = fresh
                await asyncio.wrap_future(place)
        finally:
            if place is not None:
                with self._lock:
                    self._waiting.remove(place)
                    self._wake()

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise PeerError(self._stopped)

    def _register(self, done: Future[int], charge: Charge) -> None:
        """Note a reservation under the id of its purchase, or free it if the intent could not be written."""
        if done.exception() is not None:
            self._free(charge)
            return
        with self._lock:
            self._reserved[done.result()] = charge

    def _abandon(self, done: Future[int]) -> None:
        """Nobody waits for the purchase any more, so it is not sent."""
        if done.exception() is None:
            purchase = done.result()
            self._ledger.refund(purchase, "it was cancelled before it was sent")
            with self._lock:
                charge = self._reserved.pop(purchase)
            self._free(charge)

    def _free(self, charge: Charge) -> None:
        with self._lock:
            self._budget.settle(charge, Charge())
            self._wake()

    def _close(self, purchase: Purchase, actual: Charge, *, unpriced: bool = False, unknown: bool = False) -> None:
        with self._lock:
            reserved = self._reserved.pop(purchase.id, None)
            if reserved is None:
                raise ValueError(f"purchase {purchase.id} is not open")
            self._budget.settle(reserved, actual)
            self._unpriced += unpriced
            self._unknown += unknown
            self._wake()

    def _wake(self) -> None:
        if self._waiting and not self._waiting[0].done():
            self._waiting[0].set_result(None)
