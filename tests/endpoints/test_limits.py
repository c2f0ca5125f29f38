"""Rate limits hold in every minute, and concurrency settles at what the server takes; all in virtual time."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.endpoints.limits import AdaptiveConcurrency, RateLimits
from alignpro.endpoints.types import Verdict
from alignpro.errors import EndpointError


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, heapq.nsmallest(1, self._scheduled)[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def simulate(work: Callable[[VirtualTime], Coroutine[Any, Any, Any]]) -> Any:
    loop = VirtualTime()
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.close()


async def all_of(work: list[Awaitable[None]]) -> None:
    await asyncio.gather(*work)


@settings(max_examples=40)
@given(
    rpm=st.one_of(st.none(), st.floats(0.5, 90)),
    tpm=st.one_of(st.none(), st.integers(100, 2000)),
    requests=st.lists(st.tuples(st.floats(0, 150), st.integers(1, 100), st.floats(0.01, 90)), min_size=1, max_size=60),
)
def test_no_minute_has_more_requests_or_tokens_than_the_limits(
    rpm: float | None, tpm: int | None, requests: list[tuple[float, int, float]]
) -> None:
    """Tokens are settled at a part of what was reserved."""
    sent: list[tuple[float, int]] = []

    async def work(loop: VirtualTime) -> None:
        limits = RateLimits(16, rpm, tpm, clock=loop.time)

        async def one(at: float, bound: int, latency: float) -> None:
            await asyncio.sleep(at)
            permit = await limits.acquire(bound)
            actual = max(1, bound // 3)
            sent.append((loop.time(), actual))
            await asyncio.sleep(latency)
            await permit.release(Verdict("ok", actual))

        await all_of([one(*request) for request in requests])
        assert limits.concurrency.in_flight == 0

    simulate(work)
    assert len(sent) == len(requests)
    for start, _ in sent:
        minute = [tokens for at, tokens in sent if start <= at < start + 59.999999]
        assert rpm is None or len(minute) <= max(rpm, 1)
        assert tpm is None or sum(minute) <= tpm
        if rpm is not None and rpm < 1:
            assert sum(start <= at < start + 60 / rpm - 1e-6 for at, _ in sent) == 1


def test_the_limit_of_tokens_is_used_and_not_what_was_reserved() -> None:
    """Requests that take a tenth of their bound pass at nearly ten times the pace that bounds would allow."""

    async def work(loop: VirtualTime) -> int:
        limits, count = RateLimits(4, None, 1000, clock=loop.time), 0
        while loop.time() < 600:
            permit = await limits.acquire(200)
            await asyncio.sleep(0.1)
            await permit.release(Verdict("ok", 20))
            count += 1
        return count

    assert simulate(work) >= 0.8 * 10 * 1000 / 20


def test_a_request_that_never_fits_is_an_error() -> None:
    async def work(loop: VirtualTime) -> None:
        await RateLimits(4, None, 1000, clock=loop.time).acquire(1001)

    with pytest.raises(EndpointError, match=r"1001 tokens .* tokens_per_minute=1000"):
        simulate(work)


@pytest.mark.parametrize("capacity", [1, 3, 12, 50])
def test_concurrency_settles_near_the_capacity_of_the_server(capacity: int) -> None:
    duration = 40 + 800 / capacity

    async def work(loop: VirtualTime) -> tuple[float, int, int]:
        limits = RateLimits(200, clock=loop.time)
        generator = random.Random(0)
        in_server = served = refused = 0
        seen: list[int] = []

        async def client() -> None:
            nonlocal in_server, served, refused
            while loop.time() < duration:
                permit = await limits.acquire(1)
                if in_server >= capacity:
                    refused += 1
                    await asyncio.sleep(0.01)
                    await permit.release(Verdict("throttled", 0, retry_after=0.5))
                    continue
                in_server += 1
                await asyncio.sleep(generator.uniform(0.2, 0.4))
                in_server -= 1
                served += 1
                if loop.time() > duration / 3:
                    seen.append(limits.concurrency.limit)
                await permit.release(Verdict("ok", 1))

        await all_of([client() for _ in range(100)])
        return sum(seen) / len(seen), served, refused

    mean, served, refused = simulate(work)
    assert 0.7 * capacity <= mean <= 1.3 * capacity + 1
    assert served >= 0.6 * capacity * duration / 0.3
    assert refused < 0.2 * served


def test_it_doubles_until_the_first_429_and_an_episode_is_one_cut() -> None:
    concurrency = AdaptiveConcurrency(64)
    for limit in (8, 16, 32):
        assert concurrency.limit == limit
        epochs = [concurrency.start() for _ in range(limit)]
        for epoch in epochs:
            concurrency.end("ok", epoch)
    epochs = [concurrency.start() for _ in range(64)]
    for epoch in epochs[:40]:
        concurrency.end("throttled", epoch)
    assert concurrency.limit == 32
    for epoch in epochs[40:]:
        concurrency.end("ok", epoch)
    assert concurrency.limit == 32, "what was sent before the cut does not count"
    epochs = [concurrency.start() for _ in range(32)]
    for epoch in epochs:
        concurrency.end("ok", epoch)
    assert concurrency.limit == 34
    concurrency.end("throttled", concurrency.start())
    assert concurrency.limit == 27


def test_it_grows_only_when_it_is_used_and_pauses_after_server_errors() -> None:
    concurrency = AdaptiveConcurrency(64)
    for _ in range(100):
        concurrency.end("ok", concurrency.start())
    assert concurrency.limit == 8
    for _ in range(20):
        epochs = [concurrency.start() for _ in range(8)]
        for kind, epoch in zip(["server_error"] + ["ok"] * 7, epochs, strict=True):
            concurrency.end(kind, epoch)
    assert concurrency.limit == 8


def test_after_retry_after_nothing_is_sent_until_then() -> None:
    async def work(loop: VirtualTime) -> float:
        limits = RateLimits(8, clock=loop.time)
        await (await limits.acquire(1)).release(Verdict("throttled", 0, retry_after=12.5))
        await limits.acquire(1)
        return loop.time()

    assert simulate(work) == pytest.approx(12.5)


def test_who_stops_waiting_takes_nothing() -> None:
    async def work(loop: VirtualTime) -> None:
        limits = RateLimits(1, clock=loop.time)
        permit = await limits.acquire(1)
        waiting = [loop.create_task(limits.acquire(1)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await permit.release(Verdict("ok", 1))
        waiting[1].cancel()  # its permit has been granted, and nobody will use it
        permit = await waiting[2]
        assert limits.concurrency.in_flight == 1
        await permit.release(Verdict("ok", 1))
        assert limits.concurrency.in_flight == 0

    simulate(work)
