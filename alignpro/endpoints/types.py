"""What is asked of a server and what comes back, and the two parties that every request passes: books and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. ``temperature=0`` is greedy. What is not set here is not sent."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """A prompt, and the draws that are wanted of the answer to it."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) of each turn. Servers of plain completions get the content of the last."""
    sampling: Sampling
    seed: int
    """Of a request for all draws at once, 63 bits."""
    draws: tuple[int, ...]
    """The seed of each draw, 63 bits: which answer is meant, among those to the same prompt. At temperature 0 all are the
    same answer."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, or an upper bound of them."""

    input: int
    output: int
    """Reasoning included."""

    @property
    def total(self) -> int:
        """Input and output."""
        return self.input + self.output


@dataclass(frozen=True)
class Answer:
    """One draw of the answer to a prompt. It is data: nothing in it is a template, a path or markup."""

    text: str
    finish_reason: Literal["stop", "length", "filtered", "overflow"]
    """``filtered``: the server's content filter refused the prompt or the answer; ``overflow``: the prompt does not fit in
    its context. Both depend on what was asked, so they are outcomes and not failures; their text is empty."""
    reasoning: str = ""
    """What the model thought before it answered, where the server tells; it is not scored."""
    model: str = ""
    """The model that answered, as the server names it."""
    fingerprint: str = ""
    """The server's ``system_fingerprint``."""
    replayed: bool = False
    """Whether it comes from the ledger."""


@dataclass(frozen=True)
class DrawKey:
    """What identifies an answer in the ledger: no secret, no time-out, no retry."""

    base_url: str
    model: str
    api: str
    body: str
    """Canonical JSON of all that is sent apart from ``n`` and ``seed``: messages, sampling, extra fields."""
    draw: int
    """The seed of the draw; 0 at temperature 0."""


@dataclass(frozen=True)
class Purchase:
    """A request that may be sent: its cost is reserved, and its intent is on disk."""

    id: int
    keys: tuple[DrawKey, ...]
    bound: Usage


class Books(Protocol):
    """The ledger and the budget of a run, as the client sees them. Every method returns once its effect is durable."""

    async def find(self, keys: Sequence[DrawKey]) -> list[Answer | None]:
        """The answers that have been received before."""

    async def reserve(self, keys: Sequence[DrawKey], bound: Usage) -> Purchase:
        """Reserve the cost of one request for these draws, and commit the intent to send it.

        Raises:
            BudgetError: The request could exceed the budget; nothing is reserved.
        """

    async def settle(
        self, purchase: Purchase, answers: Sequence[Answer | None], usage: Usage | None
    ) -> list[Answer | None]:
        """Record what came back for each key, and the tokens that it took; without ``usage`` the bound is charged.

        None stands for a draw that did not come back: it is not replayed, and may be bought again.

        Returns:
            The answers that are on record from now on, and so the ones to use: where another request for the same draw
            was faster, its answer.
        """

    async def refund(self, purchase: Purchase, reason: str) -> None:
        """The request certainly was not processed: it costs nothing."""

    async def write_off(self, purchase: Purchase, reason: str) -> None:
        """The outcome of the request is unknown (it was reset or timed out in flight): it is charged at its bound."""


class Permit(Protocol):
    """The right to have one request in flight."""

    async def release(self, verdict: Verdict) -> None:
        """Report how the request ended."""


@dataclass(frozen=True)
class Verdict:
    """How a request ended, as far as limits are concerned."""

    kind: Literal["ok", "throttled", "server_error", "failed"]
    tokens: int | None = None
    """What it took of the limit of tokens; None if unknown, then its bound counts."""
    retry_after: float | None = None
    """Seconds for which the server asks to be left alone."""


class Limits(Protocol):
    """The rate limits of one server, shared by all that ask it."""

    async def acquire(self, tokens: int) -> Permit:
        """Wait until a request of at most this many tokens may be sent."""
