"""Rank 0's side of a job's common books and limits: it grants what the other ranks ask for.

Under a launcher rank 0 alone has the ledger, the budget and the limits of the servers. The others reach them through
`alignpro.endpoints.remote`. What a rank holds is known here: if its connection ends, its purchases are written off, since
nobody knows what became of its requests, and its permits return.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.rank_frames import (
    greet,
    notice_death,
    pack_answers,
    receive,
    send,
    unpack_answers,
    unpack_keys,
    unpack_usage,
)
from alignpro.endpoints.types import Limits, Permit, Purchase, Verdict
from alignpro.errors import AlignProError, EndpointError

logger = logging.getLogger(__name__)


def new_token() -> str:
    """Return a token for a job: rank 0 makes it, and sends it to the others through the process group."""
    return secrets.token_hex(32)


class GrantServer:
    """Serves `LedgerBooks` and limits to other ranks, in the event loop in which `start` was awaited.

    Args:
        books: The books of the run.
        limits: Name → the limits of a server.
        token: From `new_token`.
    """

    def __init__(self, books: LedgerBooks, limits: Mapping[str, Limits], token: str) -> None:
        self._books = books
        self._limits = limits
        self._token = token.encode()
        self._ranks: dict[_Rank, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self._failed: str | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen.

        Args:
            host: The address of this host on which the other ranks reach it.
            port: 0 lets the operating system choose.

        Returns:
            Host and port.

        Raises:
            EndpointError: It is not an address of this host, or is in use.
        """
        try:
            self._server = await asyncio.start_server(self._serve, host, port)
        except OSError as error:
            raise EndpointError(f"{host}:{port}: rank 0 cannot listen there for other ranks: {error}") from error
        address = self._server.sockets[0].getsockname()
        return address[0], address[1]

    async def fail(self, reason: str) -> None:
        """Stop all ranks: nothing more is reserved. What they have bought they can still settle."""
        if self._failed is None:
            self._failed = reason
            self._books.stop(reason)
            await asyncio.gather(*(rank.tell_failure(reason) for rank in self._ranks))

    async def close(self, grace_seconds: float = 10.0) -> None:
        """Wait for the ranks to leave; those that do not are cut off, and their purchases written off."""
        if self._server is not None:
            self._server.close()
        if self._ranks:
            await asyncio.wait(self._ranks.values(), timeout=grace_seconds)
        for rank in self._ranks:
            rank.cut_off()
        await asyncio.gather(*self._ranks.values(), return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            notice_death(writer)
            if not await greet(reader, writer, self._token, server=True):
                logger.warning("refused a connection that does not know this job's token")
                return
            rank = _Rank(self._books, self._limits, writer, self.fail)
            self._ranks[rank] = task
            try:
                if self._failed is not None:
                    await rank.tell_failure(self._failed)
                await rank.serve(reader)
            finally:
                try:
                    await rank.bury()
                finally:
                    del self._ranks[rank]
        finally:
            writer.close()


class _Rank:
    """What one rank asks for and holds."""

    def __init__(
        self,
        books: LedgerBooks,
        limits: Mapping[str, Limits],
        writer: asyncio.StreamWriter,
        fail: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        self._books = books
        self._limits = limits
        self._writer = writer
        self._fail = fail
        self._purchases: dict[int, Purchase] = {}
        self._permits: dict[int, Permit] = {}
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._recording: set[asyncio.Task[None]] = set()
        self._gone = False

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Answer until the rank leaves or dies."""
        while True:
            try:
                message = await receive(reader)
            except (EOFError, OSError, EndpointError):
                return
            if "cancel" in message:
                if message["cancel"] in self._asking:
                    self._asking[message["cancel"]].cancel()
            elif "fatal" in message:
                self._record(self._fail(message["fatal"]))
            elif message["call"] in ("find", "reserve", "acquire"):
                number = message["id"]
                self._asking[number] = asyncio.create_task(self._call(message))
                self._asking[number].add_done_callback(partial(self._forget, number))
            else:
                self._record(self._call(message))

    async def tell_failure(self, reason: str) -> None:
        """Tell the rank that the job has failed."""
        await self._send({"fatal": reason})

    def cut_off(self) -> None:
        """End the connection."""
        self._gone = True
        self._writer.transport.abort()

    async def bury(self) -> None:
        """Give back what the rank held."""
        self._gone = True
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), *self._recording, return_exceptions=True)
        for purchase in self._purchases.values():
            await self._books.write_off(purchase, "the rank that sent it ended before an answer was recorded")
        for permit in self._permits.values():
            await permit.release(Verdict("failed"))

    async def _call(self, message: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"id": message["id"]}
        try:
            reply["result"] = await self._answer(message["id"], message["call"], message["arguments"])
        except (AlignProError, ValueError) as error:
            reply["error"] = [type(error).__name__, str(error)]
        await self._send(reply)

    def _forget(self, number: int, task: asyncio.Task[None]) -> None:
        """End a call; one that was cancelled, maybe before it began, has its answer too."""
        del self._asking[number]
        if task.cancelled() and not self._gone:
            self._record(self._send({"id": number, "error": ["CancelledError", ""]}))

    def _record(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin what is not cancelled, even if the rank goes: what it has bought is settled."""
        task = asyncio.create_task(work)
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)

    async def _answer(self, number: int, call: str, arguments: list[Any]) -> Any:
        match call, arguments:
            case "find", [keys]:
                return pack_answers(await self._books.find(unpack_keys(keys)))
            case "reserve", [keys, bound]:
                bounds = unpack_usage(bound)
                assert bounds is not None
                purchase = await self._books.reserve(unpack_keys(keys), bounds)
                self._purchases[purchase.id] = purchase
                return purchase.id
            case "settle", [purchase_id, answers, usage]:
                purchase = self._own(purchase_id)
                return pack_answers(await self._books.settle(purchase, unpack_answers(answers), unpack_usage(usage)))
            case "refund", [purchase_id, reason]:
                return await self._books.refund(self._own(purchase_id), reason)
            case "write_off", [purchase_id, reason]:
                return await self._books.write_off(self._own(purchase_id), reason)
            case "acquire", [limit, tokens]:
                self._permits[number] = await self._limits[limit].acquire(tokens)
                return number
            case "release", [permit_id, verdict]:
                return await self._permits.pop(permit_id).release(Verdict(*verdict))
        raise ValueError(f"another rank asks for {call}, which this version does not know")

    def _own(self, purchase_id: int) -> Purchase:
        if purchase_id not in self._purchases:
            raise ValueError(f"purchase {purchase_id} is not open")
        return self._purchases.pop(purchase_id)

    async def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the rank has gone; `serve` sees it too
            await send(self._writer, message)
