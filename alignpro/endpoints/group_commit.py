"""One thread that owns a connection and commits the work of many callers in one transaction.

A commit waits for the disk. While it does, further work arrives; all of it goes into the next transaction, so the number of
commits does not grow with the number of callers.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")
Work = Callable[[sqlite3.Connection], Any]
Wake = tuple["asyncio.Future[Any]", "Future[Any]"]

_MOST = 1024
"""Pieces of work in a transaction."""


class GroupCommit:
    """Runs work on a connection in the order of its submission.

    Args:
        connection: In autocommit mode; from now on it belongs to the thread.
        explain: What callers get to see of an error of SQLite.
    """

    def __init__(self, connection: sqlite3.Connection, explain: Callable[[Exception], Exception]) -> None:
        self._connection = connection
        self._explain = explain
        self._queue: SimpleQueue[tuple[Work, Future[Any]] | None] = SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._wakes: defaultdict[asyncio.AbstractEventLoop, list[Wake]] = defaultdict(list)  # of the thread alone
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[sqlite3.Connection], ResultT]) -> Future[ResultT]:
        """Queue work, which may run twice, the first time in a transaction that is rolled back.

        Returns:
            A future that gets the result once it is on disk. It cannot be cancelled.
        """
        future: Future[ResultT] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed and threading.current_thread() is not self._thread:
                raise RuntimeError("the ledger is closed")
            self._queue.put((work, future))
        return future

    async def wait(self, future: Future[ResultT]) -> ResultT:
        """Return the result of submitted work; a caller that is cancelled leaves it as it is.

        All that wait in an event loop for a transaction are woken by one call: `asyncio.wrap_future` makes one for each.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[ResultT] = loop.create_future()

        def wake(done: Future[ResultT]) -> None:
            if threading.current_thread() is self._thread:
                self._wakes[loop].append((waiter, done))
            else:  # it was done before: this is the thread of the loop
                _deliver([(waiter, done)])

        future.add_done_callback(wake)
        return await waiter

    def close(self) -> None:
        """Finish what was submitted, and close the connection."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        try:
            self._connection.close()
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _run(self) -> None:
        is_open = True
        while is_open or not self._queue.empty():  # what is done at the end may submit more
            batch = [self._queue.get()]
            while len(batch) < _MOST and not self._queue.empty():
                batch.append(self._queue.get())
            is_open = is_open and None not in batch
            if work := [each for each in batch if each is not None]:
                self._commit(work)
                self._wake()

    def _commit(self, batch: list[tuple[Work, Future[Any]]]) -> None:
        try:
            results = self._transaction([work for work, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(self._explain(error) if isinstance(error, sqlite3.Error) else error)
                return
            for item in batch:  # one damaged page must not cost the others their answers
                self._commit([item])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)

    def _wake(self) -> None:
        for loop, wakes in self._wakes.items():
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(_deliver, wakes)
        self._wakes.clear()

    def _transaction(self, works: list[Work]) -> list[Any]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            results = [work(self._connection) for work in works]
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return results


def _deliver(wakes: list[Wake]) -> None:
    for waiter, done in wakes:
        if waiter.done():  # cancelled
            continue
        error = done.exception()
        if error is None:
            waiter.set_result(done.result())
        else:
            waiter.set_exception(error)
