"""One thread that owns a connection and commits the work of many callers in one transaction.

A commit waits for the disk. While it does, further work arrives; all of it goes into the next transaction, so the number of
commits does not grow with the number of callers.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")
Work = Callable[[sqlite3.Connection], Any]

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
            if self._closed:
                raise RuntimeError("the ledger is closed")
            self._queue.put((work, future))
        return future

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
        ended = False
        while not ended:
            batch = []
            item = self._queue.get()
            while True:
                if item is None:
                    ended = True
                    break
                batch.append(item)
                if len(batch) == _MOST:
                    break
                try:
                    item = self._queue.get_nowait()
                except Empty:
                    break
            if batch:
                self._commit(batch)

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
