"""Books and limits of a rank other than 0: every call is one message to rank 0 and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import alignpro.errors
from alignpro.endpoints.rank_frames import (
    greet,
    notice_death,
    pack_answers,
    pack_keys,
    pack_usage,
    receive,
    send,
    unpack_answers,
)
from alignpro.endpoints.types import Answer, DrawKey, Permit, Purchase, Usage, Verdict
from alignpro.errors import AlignProError, EndpointError, PeerError


@dataclass
class _Pending:
    """A call whose answer is awaited."""

    reply: asyncio.Future[Any]
    grants: bool
    """Whether it lets something begin; it fails once the job has."""
    undo: Callable[[Any], None] | None
    """Gives back what was granted to a caller that has been cancelled."""


class RankConnection:
    """A connection to rank 0's `GrantServer`; from `connect`.

    Args:
        reader: Of a connection whose two ends have greeted each other.
        writer: Of the same.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._pending: dict[int, _Pending] = {}
        self._ids = count(1)
        self._failed: str | None = None
        self._lost: str | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start(self._listen())

    @classmethod
    async def connect(cls, host: str, port: int, token: str) -> RankConnection:
        """Connect to rank 0.

        Args:
            host: From `GrantServer.start`.
            port: From `GrantServer.start`.
            token: From `new_token`.

        Raises:
            EndpointError: It cannot be reached, or is another job's.
        """
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError as error:
            raise EndpointError(f"{host}:{port}: rank 0, which has the ledger, cannot be reached: {error}") from error
        notice_death(writer)
        if not await greet(reader, writer, token.encode(), server=False):
            writer.close()
            raise EndpointError(f"{host}:{port}: what listens there is not rank 0 of this job")
        return cls(reader, writer)

    async def call(
        self, name: str, *arguments: Any, grants: bool = False, undo: Callable[[Any], None] | None = None
    ) -> Any:
        """Let rank 0 do something, and return what it answers.

        Args:
            name: What, and its arguments.
            arguments: As JSON.
            grants: Whether it lets something begin: it then fails once the job has failed.
            undo: Gives back what was granted, if the caller has been cancelled meanwhile.

        Raises:
            PeerError: Rank 0 has gone, or another rank has failed.
            AlignProError: Rank 0's error.
        """
        reason = self._lost or (self._failed if grants else None)
        if reason is not None:
            raise PeerError(reason)
        number = next(self._ids)
        pending = _Pending(asyncio.get_running_loop().create_future(), grants, undo)
        self._pending[number] = pending
        try:
            await self._send({"id": number, "call": name, "arguments": arguments})
            return await pending.reply
        except asyncio.CancelledError:
            if number in self._pending:
                self._start(self._send({"cancel": number}))
            elif undo is not None and not pending.reply.cancelled() and pending.reply.exception() is None:
                undo(pending.reply.result())  # it has arrived, and this caller will not see it
            raise

    async def fail(self, reason: str) -> None:
        """Report a fatal error of this rank: rank 0 stops all."""
        await self._send({"fatal": reason})

    async def close(self) -> None:
        """Leave; what is still held is written off and returned by rank 0."""
        self._writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start_call(self, name: str, *arguments: Any) -> None:
        """Do the same as `call`, without waiting for the answer."""
        self._start(self.call(name, *arguments))

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, message: object) -> None:
        try:
            await send(self._writer, message)
        except OSError:
            self._lose()

    async def _listen(self) -> None:
        try:
            while True:
                message = await receive(self._reader)
                if "fatal" in message:
                    self._failed = message["fatal"]
                    self._end(message["fatal"], [number for number, each in self._pending.items() if each.grants])
                else:
                    self._deliver(message)
        except (EOFError, OSError, EndpointError):
            self._lose()

    def _lose(self) -> None:
        self._lost = "rank 0, which has the ledger and the budget, has ended"
        self._end(self._lost, list(self._pending))

    def _end(self, reason: str, numbers: list[int]) -> None:
        for number in numbers:
            if not self._pending[number].reply.done():
                self._pending[number].reply.set_exception(PeerError(reason))

    def _deliver(self, message: dict[str, Any]) -> None:
        pending = self._pending.pop(message["id"], None)
        if pending is None:  # it was answered and cancelled at once
            return
        if pending.reply.done():  # nobody waits any more
            if pending.undo is not None and "result" in message:
                pending.undo(message["result"])
        elif "error" in message:
            pending.reply.set_exception(_rebuild(*message["error"]))
        else:
            pending.reply.set_result(message["result"])


def _rebuild(name: str, message: str) -> Exception:
    kind = getattr(alignpro.errors, name, None)
    if isinstance(kind, type) and issubclass(kind, AlignProError):
        return kind(message)
    return ValueError(message)


class RemoteBooks:
    """`Books` of rank 0."""

    def __init__(self, connection: RankConnection) -> None:
        self._connection = connection

    async def find(self, keys: Sequence[DrawKey]) -> list[Answer | None]:
        """The answers that have been received before."""
        return unpack_answers(await self._connection.call("find", pack_keys(keys)))

    async def reserve(self, keys: Sequence[DrawKey], bound: Usage) -> Purchase:
        """Reserve the cost of one request for these draws, and commit the intent to send it.

        Raises:
            BudgetError: The request could exceed the budget; nothing is reserved.
            PeerError: Rank 0 has gone, or another rank has failed.
        """

        def undo(purchase: int) -> None:
            self._connection.start_call("refund", purchase, "it was cancelled before it was sent")

        number = await self._connection.call("reserve", pack_keys(keys), pack_usage(bound), grants=True, undo=undo)
        return Purchase(number, tuple(keys), bound)

    async def settle(
        self, purchase: Purchase, answers: Sequence[Answer | None], usage: Usage | None
    ) -> list[Answer | None]:
        """Record what came back for each key, and the tokens that it took; see `Books`."""
        settled = await self._connection.call("settle", purchase.id, pack_answers(answers), pack_usage(usage))
        return unpack_answers(settled)

    async def refund(self, purchase: Purchase, reason: str) -> None:
        """The request certainly was not processed: it costs nothing."""
        await self._connection.call("refund", purchase.id, reason)

    async def write_off(self, purchase: Purchase, reason: str) -> None:
        """The outcome of the request is unknown: it is charged at its bound."""
        await self._connection.call("write_off", purchase.id, reason)


class RemoteLimits:
    """`Limits` of rank 0.

    Args:
        connection: The connection to rank 0.
        name: Of the limits, as rank 0 has named them.
    """

    def __init__(self, connection: RankConnection, name: str) -> None:
        self._connection = connection
        self._name = name

    async def acquire(self, tokens: int) -> Permit:
        """Wait until a request of at most this many tokens may be sent.

        Raises:
            PeerError: Rank 0 has gone, or another rank has failed.
        """

        def undo(permit: int) -> None:
            self._connection.start_call("release", permit, ["failed", 0, None])

        number = await self._connection.call("acquire", self._name, tokens, grants=True, undo=undo)
        return _RemotePermit(self._connection, number)


@dataclass(frozen=True)
class _RemotePermit:
    connection: RankConnection
    number: int

    async def release(self, verdict: Verdict) -> None:
        await self.connection.call("release", self.number, [verdict.kind, verdict.tokens, verdict.retry_after])
