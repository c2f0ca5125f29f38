"""Books in memory that hold callers to the protocol: every purchase ends exactly once, and none is forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from alignpro.endpoints.types import Answer, DrawKey, Purchase, Usage
from alignpro.errors import BudgetError


@dataclass
class MemoryBooks:
    """Records answers by draw, and how each purchase ended."""

    most_requests: int | None = None
    """The budget."""
    is_bounded: bool = True
    """Whether no request may take more than its bound."""
    answers: dict[DrawKey, Answer] = field(default_factory=dict)
    open: dict[int, Purchase] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    """settled, refunded, written off."""
    reasons: list[str] = field(default_factory=list)
    """Of refunds and write-offs."""
    bought: Counter[DrawKey] = field(default_factory=Counter)
    """How often an answer to a draw was settled."""
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    """What was charged."""
    count: int = 0

    async def find(self, keys: Sequence[DrawKey]) -> list[Answer | None]:
        found = [self.answers.get(key) for key in keys]
        return [None if answer is None else replace(answer, replayed=True) for answer in found]

    async def reserve(self, keys: Sequence[DrawKey], bound: Usage) -> Purchase:
        assert keys and len(set(keys)) == len(keys) and bound.total >= 0
        spent = self.ended["settled"] + self.ended["written off"] + len(self.open)
        if self.most_requests is not None and spent >= self.most_requests:
            raise BudgetError(
                f"budget: {spent} requests were sent, and the next would be one more than {self.most_requests}"
            )
        self.count += 1
        self.open[self.count] = Purchase(self.count, tuple(keys), bound)
        return self.open[self.count]

    async def settle(
        self, purchase: Purchase, answers: Sequence[Answer | None], usage: Usage | None
    ) -> list[Answer | None]:
        self._end(purchase, "settled", usage or purchase.bound)
        assert len(answers) == len(purchase.keys)
        if usage is not None and usage.total and self.is_bounded:
            assert usage.input <= purchase.bound.input and usage.output <= purchase.bound.output
        for key, answer in zip(purchase.keys, answers, strict=True):
            if answer is not None:
                self.bought[key] += 1
                self.answers.setdefault(key, answer)
        return [
            None if answer is None else self.answers[key] for key, answer in zip(purchase.keys, answers, strict=True)
        ]

    async def refund(self, purchase: Purchase, reason: str) -> None:
        self._end(purchase, "refunded", Usage(0, 0))
        self.reasons.append(reason)

    async def write_off(self, purchase: Purchase, reason: str) -> None:
        self._end(purchase, "written off", purchase.bound)
        self.reasons.append(reason)

    def _end(self, purchase: Purchase, how: str, usage: Usage) -> None:
        assert self.open.pop(purchase.id) is purchase, "a purchase ended twice"
        self.ended[how] += 1
        self.usage = Usage(self.usage.input + usage.input, self.usage.output + usage.output)

    def check(self) -> None:
        """Assert that every purchase has ended, and that no answer was bought twice."""
        assert not self.open
        assert sum(self.ended.values()) == self.count
        assert max(self.bought.values(), default=0) <= 1
