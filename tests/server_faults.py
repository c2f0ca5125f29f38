"""What can go wrong between a client and a server, and plans of when it does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "status",  # another status than 200, before any work is done
    "reset_before",  # the connection is reset once the request was read, and nothing was computed
    "reset_after",  # ... once the answer was computed, and before any of it was sent
    "reset_inside",  # ... after half of the answer
    "stall",  # the answer is computed and never sent
    "slow",  # the answer comes in ten pieces, with `seconds` between them
    "truncated",  # half of the answer's JSON, with a Content-Length that fits
    "invalid",  # HTML instead of JSON, with status 200
    "short",  # a Content-Length that is larger than the answer, then the connection is closed
    "body",  # `body` instead of the answer, with status 200
]


@dataclass(frozen=True)
class Fault:
    """One fault."""

    kind: Kind
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seconds: float = 0.0

    @property
    def is_computed(self) -> bool:
        """Whether the server does the work, so that a real one would charge for it."""
        return self.kind not in ("status", "reset_before", "body")


FaultPlan = Callable[[int, Mapping[str, Any]], Fault | None]
"""From the number of a request, counted from 0, and its JSON to the fault that strikes it."""


def throttled(**headers: str) -> Fault:
    """429; ``retry_after="1"`` becomes the header Retry-After."""
    return Fault("status", 429, {name.replace("_", "-"): value for name, value in headers.items()})


COMMON = (
    throttled(retry_after="0.01"),
    throttled(retry_after_ms="10"),
    throttled(x_ratelimit_reset_requests="10ms"),
    throttled(retry_after="Sun, 09 Sep 2001 02:00:00 GMT", date="Sun, 09 Sep 2001 02:00:00 GMT"),
    throttled(),
    Fault("status", 500),
    Fault("status", 503, {"retry-after": "0.01"}),
    Fault("reset_before"),
    Fault("reset_after"),
    Fault("reset_inside"),
    Fault("truncated"),
    Fault("invalid"),
    Fault("short"),
)
"""Faults that pass, and take no time."""


def at(faults: Mapping[int, Fault]) -> FaultPlan:
    """Faults by the number of the request."""
    return lambda number, request: faults.get(number)


def always(fault: Fault) -> FaultPlan:
    """The same fault every time."""
    return lambda number, request: fault


def randomly(share: float, seed: int, faults: Iterable[Fault] = COMMON) -> FaultPlan:
    """A random fault for this share of all requests."""
    generator, choices = random.Random(seed), tuple(faults)
    return lambda number, request: generator.choice(choices) if generator.random() < share else None
