"""A server's model as a target uses it, and what was asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from alignpro.endpoints.types import Answer, Query


@dataclass(frozen=True)
class AskedSoFar:
    """What was asked of a server since it was connected to."""

    requests: int = 0
    tokens: int = 0
    """Of prompts and answers, as far as they are charged."""
    usd: float = 0.0
    throttled: int = 0
    """Answers 429."""
    retries: int = 0
    replayed: int = 0
    """Answers that came from the ledger."""
    concurrency: float = 0.0
    """How many requests are allowed at the same time now; 0 if another rank decides."""

    def since(self, before: AskedSoFar) -> dict[str, float]:
        """The differences to an earlier moment by name; the present concurrency."""
        counts = ("requests", "tokens", "usd", "throttled", "retries", "replayed")
        differences = {name: float(getattr(self, name) - getattr(before, name)) for name in counts}
        return differences | {"concurrency": self.concurrency}


class Connection(Protocol):
    """A server's model. Its methods may be called from any thread."""

    def submit(self, query: Query) -> Future[list[Answer]]:
        """Ask for the draws of a query; returns at once.

        The future raises:
            EndpointError: The server has failed for good.
            BudgetError: The answer could exceed the budget.
        """

    def asked(self) -> AskedSoFar:
        """What was asked so far."""

    def describe_most(self, queries: Sequence[Query]) -> str:
        """The most that queries can take, in words: requests, tokens and, if there is a price, money."""
