"""Ranks that share the ledger, the budget and the limits of rank 0, over loopback."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from purchases import BOUND, answer, key

from alignpro.config import BudgetConfig
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.grants import GrantServer, new_token
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.rank_frames import pack_answers, pack_keys, unpack_answers, unpack_keys
from alignpro.endpoints.remote import RankConnection, RemoteBooks, RemoteLimits
from alignpro.endpoints.types import Answer, Usage, Verdict
from alignpro.errors import BudgetError, EndpointError, PeerError

TOKEN = new_token()


class OneAtATime:
    """Limits that allow one request at a time, and note how each ended."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.verdicts: list[Verdict] = []

    async def acquire(self, tokens: int) -> OneAtATime:
        await self.lock.acquire()
        return self

    async def release(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self.lock.release()


class Job:
    """Rank 0, and connections of others to it."""

    def __init__(self, ledger: Ledger, **limits: int) -> None:
        self.books = LedgerBooks(ledger, BudgetConfig(**limits), {}, "run")
        self.limits = OneAtATime()
        self.server = GrantServer(self.books, {"target": self.limits}, TOKEN)
        self.address = ("", 0)

    async def join(self) -> tuple[RankConnection, RemoteBooks, RemoteLimits]:
        connection = await RankConnection.connect(*self.address, TOKEN)
        return connection, RemoteBooks(connection), RemoteLimits(connection, "target")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


@asynccontextmanager
async def job(ledger: Ledger, **limits: int) -> AsyncIterator[Job]:
    job = Job(ledger, **limits)
    job.address = await job.server.start()
    try:
        yield job
    finally:
        await job.server.close(grace_seconds=0.1)


def within_seconds(work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
    asyncio.run(asyncio.wait_for(work(*arguments), 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def states(ledger: Ledger) -> list[str]:
    with sqlite3.connect(ledger.path) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM purchases ORDER BY id")]


def test_draws_and_answers_cross_unchanged() -> None:
    keys = (key(1), key(2**63 - 1), key(1, body="\ud800 ﷺ"), key(2))
    assert unpack_keys(pack_keys(keys)) == keys
    assert len(pack_keys(keys)[0]) == 2
    answers = [None, answer("\ud800"), Answer("", "filtered", replayed=True)]
    assert unpack_answers(pack_answers(answers)) == answers


def test_a_rank_buys_replays_and_settles_through_rank_0(ledger: Ledger) -> None:
    async def run() -> None:
        async with job(ledger, tokens=1000) as here:
            _, one, _ = await here.join()
            _, two, _ = await here.join()
            purchase = await one.reserve([key(1), key(2)], BOUND)
            assert await one.settle(purchase, [answer("a"), None], Usage(3, 2)) == [answer("a"), None]
            assert [each and each.text for each in await two.find([key(1), key(2)])] == ["a", None]
            await two.refund(await two.reserve([key(2)], BOUND), "429")
            await two.write_off(await two.reserve([key(2)], BOUND), "reset")
            assert here.books.spending().tokens == 5 + BOUND.total
            with pytest.raises(BudgetError, match=r"budget.tokens is 1000: 155 spent"):
                await one.reserve([key(3)], Usage(900, 1))
            with pytest.raises(ValueError, match="is not open"):
                await one.refund(purchase, "again")

    within_seconds(run)
    assert states(ledger) == ["settled", "refunded", "written_off"]


def test_ranks_share_one_budget(ledger: Ledger) -> None:
    async def run() -> None:
        async with job(ledger, tokens=20 * BOUND.total) as here:
            refused = 0

            async def rank(number: int) -> None:
                nonlocal refused
                connection, books, _ = await here.join()
                for draw in range(10):
                    try:
                        purchase = await books.reserve([key(100 * number + draw)], BOUND)
                    except BudgetError:
                        refused += 1
                    else:
                        await books.settle(purchase, [answer()], BOUND)
                await connection.close()

            await asyncio.gather(*map(rank, range(4)))
            assert (here.books.spending().requests, refused) == (20, 20)

    within_seconds(run)


def test_ranks_share_permits(ledger: Ledger) -> None:
    async def run() -> None:
        async with job(ledger) as here:
            (_, _, one), (_, _, two) = await here.join(), await here.join()
            permit = await one.acquire(10)
            waiting = asyncio.create_task(two.acquire(10))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            await permit.release(Verdict("throttled", 7, retry_after=2.5))
            await (await waiting).release(Verdict("ok"))
            assert here.limits.verdicts == [Verdict("throttled", 7, 2.5), Verdict("ok")]

    within_seconds(run)


def test_what_a_cancelled_caller_is_granted_returns(ledger: Ledger) -> None:
    async def run() -> None:
        async with job(ledger, requests=1) as here:
            _, books, limits = await here.join()
            permit = await limits.acquire(10)
            purchase = await books.reserve([key(1)], BOUND)
            waiting: list[asyncio.Task[Any]] = [
                asyncio.create_task(limits.acquire(10)),
                asyncio.create_task(books.reserve([key(2)], BOUND)),
            ]
            await asyncio.sleep(0.02)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await books.refund(purchase, "429")
            await permit.release(Verdict("ok"))
            for steps in range(12):  # cancelled at every point of the way
                for ask in (limits.acquire(10), books.reserve([key(3)], BOUND)):
                    task = asyncio.create_task(ask)
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    task.cancel()
                    result = (await asyncio.gather(task, return_exceptions=True))[0]
                    if not isinstance(result, BaseException):
                        await (
                            result.release(Verdict("ok")) if hasattr(result, "release") else books.refund(result, "")
                        )
            await (await limits.acquire(10)).release(Verdict("ok"))
            await books.settle(await books.reserve([key(4)], BOUND), [answer()], None)

    within_seconds(run)
    assert set(states(ledger)[:-1]) == {"refunded"} and states(ledger)[-1] == "settled"


RANK = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[4])
from purchases import BOUND, answer, key
from alignpro.endpoints.remote import RankConnection, RemoteBooks, RemoteLimits

async def main():
    connection = await RankConnection.connect(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    books, limits = RemoteBooks(connection), RemoteLimits(connection, "target")
    await limits.acquire(10)
    await books.settle(await books.reserve([key(1)], BOUND), [answer("kept")], BOUND)
    await books.reserve([key(2)], BOUND)
    print("holding", flush=True)
    time.sleep(60)

asyncio.run(main())
"""


def test_a_rank_that_is_killed_gives_back_its_permits_and_its_purchases_are_written_off(ledger: Ledger) -> None:
    async def run() -> None:
        async with job(ledger, requests=3) as here:
            host, port = here.address
            rank = await asyncio.create_subprocess_exec(
                sys.executable, "-c", RANK, host, str(port), TOKEN, str(Path(__file__).parent), stdout=-1
            )
            assert rank.stdout is not None and await rank.stdout.readline() == b"holding\n"
            _, books, limits = await here.join()
            waiting = asyncio.create_task(limits.acquire(10))
            rank.send_signal(signal.SIGKILL)
            await rank.wait()
            await waiting
            assert here.limits.verdicts == [Verdict("failed")]
            assert here.books.spending().unknown == 1 and here.books.spending().requests == 2
            assert [each and each.text for each in await books.find([key(1), key(2)])] == ["kept", None]

    within_seconds(run)
    assert states(ledger) == ["settled", "written_off"]


def test_one_ranks_fatal_error_stops_all_but_keeps_what_was_bought(ledger: Ledger) -> None:
    async def run() -> None:
        async with job(ledger) as here:
            (failing, _, _), (_, books, limits) = await here.join(), await here.join()
            purchase = await books.reserve([key(1)], BOUND)
            await limits.acquire(10)
            waiting = asyncio.create_task(limits.acquire(10))
            await asyncio.sleep(0.02)
            await failing.fail("rank 2: http://localhost/v1: 401, the key is wrong")
            with pytest.raises(PeerError, match=r"rank 2: .* the key is wrong"):
                await waiting
            for refused in (books.reserve([key(2)], BOUND), here.books.reserve([key(3)], BOUND)):
                with pytest.raises(PeerError, match="the key is wrong"):
                    await refused
            await books.settle(purchase, [answer("kept")], None)
            assert (await books.find([key(1)]))[0] is not None
            _, late, _ = await here.join()
            with pytest.raises(PeerError, match="the key is wrong"):
                await late.reserve([key(4)], BOUND)

    within_seconds(run)
    assert states(ledger) == ["settled"]


def test_when_rank_0_ends_the_others_are_told(ledger: Ledger) -> None:
    async def run() -> None:
        async with job(ledger) as here:
            connection, books, limits = await here.join()
            await limits.acquire(1)
            purchase = await books.reserve([key(1)], BOUND)
            waiting = asyncio.create_task(limits.acquire(1))
            await asyncio.sleep(0.02)
            await here.server.close(grace_seconds=0)
            for call in (waiting, books.find([key(1)]), books.settle(purchase, [answer()], None)):
                with pytest.raises(PeerError, match="rank 0, which has the ledger and the budget, has ended"):
                    await call
            await connection.close()
            with pytest.raises(EndpointError, match="rank 0, which has the ledger, cannot be reached"):
                await here.join()

    within_seconds(run)
    assert states(ledger) == ["written_off"]


def test_a_stranger_learns_and_does_nothing(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with job(ledger) as here:
            with pytest.raises(EndpointError, match="is not rank 0 of this job"):
                await RankConnection.connect(*here.address, new_token())
            for first in (b"GET / HTTP/1.1\r\n\r\n", b'\0\0\0\x06"hello', b"\xff\xff\xff\xff", b""):
                reader, writer = await asyncio.open_connection(*here.address)
                greeting = await reader.readexactly(4 + 34)
                writer.write(first)
                writer.write_eof()
                assert await reader.read() == b"" and TOKEN.encode() not in greeting
                writer.close()
            reader, writer = await asyncio.open_connection(*here.address)
            writer.write(await reader.readexactly(4 + 34))  # its own greeting back
            assert await reader.read() == b""
            writer.close()

    within_seconds(run)
    assert "refused a connection that does not know this job's token" in caplog.text
    assert states(ledger) == []


def test_an_address_in_use_is_an_error(ledger: Ledger) -> None:
    async def run() -> None:
        async with job(ledger) as here:
            with pytest.raises(EndpointError, match="rank 0 cannot listen there"):
                await GrantServer(here.books, {}, TOKEN).start(*here.address)

    within_seconds(run)
