"""The ledger: every request and answer, on disk before anyone acts on it.

The intent to send a request is committed before it is sent, an answer before it is used. So after a kill at any moment each
answer that was used is there and is not bought again, and each request whose outcome is unknown is a purchase that is still
open: whoever opens the ledger next charges it at its bound.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from alignpro.endpoints.group_commit import GroupCommit
from alignpro.endpoints.ledger_lock import lock_ledger
from alignpro.endpoints.ledger_rows import answer_values, decode, encode, find_answer, find_question, question_of
from alignpro.endpoints.ledger_schema import explain, ledger_errors, open_for_writing
from alignpro.endpoints.types import Answer, DrawKey, Usage

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_LARGEST = 2**62
"""What does not fit in a column is no number of tokens; the budget has long failed."""


@dataclass(frozen=True)
class RecordedCharge:
    """What a purchase was charged."""

    model: str
    usage: Usage
    cost: int | None
    """Picodollars; None if no price was known."""
    unknown: bool
    """Whether the outcome of the request is unknown."""


class Ledger:
    """A ledger, locked for this process until `close`. Its methods may be called from any thread.

    Args:
        path: The file; it is created if it does not exist.

    Raises:
        LedgerError: It is in use, is not a ledger, is damaged, has a newer version, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._lock = lock_ledger(self.path)
        try:
            with ledger_errors(self.path):
                connection = open_for_writing(self.path)
                try:
                    _write_off_open(connection, self.path)
                except BaseException:
                    connection.close()
                    raise
        except BaseException:
            self._lock.close()
            raise
        self._writer = GroupCommit(connection, lambda error: explain(self.path, error))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what was submitted, and unlock the file. Purchases that are open stay so, and are written off later."""
        try:
            self._writer.close()
        finally:
            self._lock.close()

    def charges(self, run: str) -> Iterator[RecordedCharge]:
        """Yield what was charged for the purchases of a run, those of earlier processes included."""
        last = 0
        while rows := self._writer.submit(partial(_charges, run=run, after=last)).result():
            last = rows[-1][0]
            yield from (charge for _, charge in rows)

    async def wait(self, future: Future[ResultT]) -> ResultT:
        """Wait, in an event loop, until what the other methods return is on disk."""
        return await self._writer.wait(future)

    def find(self, keys: Sequence[DrawKey]) -> Future[list[Answer | None]]:
        """Look up the answers that have been received before."""

        def work(connection: sqlite3.Connection) -> list[Answer | None]:
            rows = {key: find_question(connection, key) for key in map(question_of, keys)}
            questions = [rows[question_of(key)] for key in keys]
            return [
                None if question is None else find_answer(connection, question, key.draw)
                for question, key in zip(questions, keys, strict=True)
            ]

        return self._writer.submit(work)

    def intend(self, run: str, keys: Sequence[DrawKey], bound: Usage, cost: int | None) -> Future[int]:
        """Record the intent to send one request.

        Args:
            run: Identity of the run that pays.
            keys: The draws that it is for, all of one question.
            bound: The most that it can take.
            cost: The most that it can cost, in picodollars; None if no price is known.

        Returns:
            The id of the purchase.
        """
        question = question_of(keys[0])
        if any(question_of(key) != question for key in keys[1:]):
            raise ValueError("a request is for draws of one question")
        draws = json.dumps([key.draw for key in keys])

        def work(connection: sqlite3.Connection) -> int:
            row = _require_question(connection, keys[0], question)
            cursor = connection.execute(
                "INSERT INTO purchases(time, run, question, draws, bound_input, bound_output, bound_cost, state, input, "
                "output, cost) VALUES (?, ?, ?, ?, ?, ?, ?, 'open', ?, ?, ?)",
                (time.time(), run, row, draws, bound.input, bound.output, cost, bound.input, bound.output, cost),
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

        return self._writer.submit(work)

    def settle(
        self,
        purchase: int,
        keys: Sequence[DrawKey],
        answers: Sequence[Answer | None],
        usage: Usage | None,
        cost: int | None,
    ) -> Future[list[Answer | None]]:
        """Record what came back.

        Args:
            purchase: The id.
            keys: Its draws.
            answers: The answer to each, or None.
            usage: What the server says that it took; None: the bound stays charged, whatever ``cost`` is.
            cost: Its cost in picodollars; None if no price is known.

        Returns:
            The answers that the ledger holds from now on: where another request for a draw was faster, its answer.
        """
        missing = json.dumps([key.draw for key, answer in zip(keys, answers, strict=True) if answer is None])

        def work(connection: sqlite3.Connection) -> list[Answer | None]:
            if usage is None:
                question = _close(connection, purchase, "state = 'settled', missing = ?", (missing,))
            else:
                charged = [min(each, _LARGEST) for each in (usage.input, usage.output)]
                question = _close(
                    connection,
                    purchase,
                    "state = 'settled', missing = ?, reported = 1, input = ?, output = ?, cost = ?",
                    (missing, *charged, None if cost is None else min(cost, _LARGEST)),
                )
            return [
                None if answer is None else _record(connection, purchase, question, key.draw, answer)
                for key, answer in zip(keys, answers, strict=True)
            ]

        return self._writer.submit(work)

    def refund(self, purchase: int, reason: str) -> Future[int]:
        """Record that a request was certainly not processed; the result has no meaning."""
        changes = "state = 'refunded', input = 0, output = 0, cost = 0, reason = ?"
        return self._writer.submit(partial(_close, purchase=purchase, changes=changes, values=(encode(reason),)))

    def write_off(self, purchase: int, reason: str) -> Future[int]:
        """Record that the outcome of a request is unknown; its bound stays charged. The result has no meaning."""
        changes = "state = 'written_off', reason = ?"
        return self._writer.submit(partial(_close, purchase=purchase, changes=changes, values=(encode(reason),)))


def _write_off_open(connection: sqlite3.Connection, path: Path) -> None:
    """Close the purchases that a process left open when it died."""
    count = connection.execute(
        "UPDATE purchases SET state = 'written_off', reason = ? WHERE state = 'open'",
        (encode("the process that sent it ended before an answer was recorded"),),
    ).rowcount
    if count:
        logger.warning(
            "ledger %s: %d requests were in flight when the process that used it ended; their outcome is unknown, and they "
            "are charged at their bound",
            path,
            count,
        )


def _charges(connection: sqlite3.Connection, run: str, after: int) -> list[tuple[int, RecordedCharge]]:
    rows = connection.execute(
        "SELECT p.id, q.model, p.input, p.output, p.cost, p.state FROM purchases p JOIN questions q ON q.id = p.question "
        "WHERE p.run = ? AND p.id > ? AND p.state IN ('settled', 'written_off') ORDER BY p.id LIMIT 4096",
        (run, after),
    )
    return [
        (row, RecordedCharge(decode(model), Usage(input, output), cost, state == "written_off"))
        for row, model, input, output, cost, state in rows
    ]


def _require_question(connection: sqlite3.Connection, key: DrawKey, question: bytes) -> int:
    found = connection.execute("SELECT id, body IS NULL FROM questions WHERE hash = ?", (question,)).fetchone()
    if found is not None:
        row, purged = found
        if purged:  # it is asked again
            connection.execute("UPDATE questions SET body = ? WHERE id = ?", (encode(key.body), row))
        return int(row)
    cursor = connection.execute(
        "INSERT INTO questions(hash, base_url, model, api, body) VALUES (?, ?, ?, ?, ?)",
        (question, encode(key.base_url), encode(key.model), key.api, encode(key.body)),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _close(connection: sqlite3.Connection, purchase: int, changes: str, values: Sequence[object]) -> int:
    """Change a purchase that is open; return its question."""
    row = connection.execute(
        f"UPDATE purchases SET {changes} WHERE id = ? AND state = 'open' RETURNING question", (*values, purchase)
    ).fetchone()
    if row is None:
        raise ValueError(f"purchase {purchase} is not open")
    return int(row[0])


def _record(connection: sqlite3.Connection, purchase: int, question: int, draw: int, answer: Answer) -> Answer | None:
    cursor = connection.execute(
        "INSERT INTO answers(question, draw, purchase, finish_reason, text, reasoning, model, fingerprint, digest) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(question, draw) DO UPDATE SET purchase = excluded.purchase, "
        "finish_reason = excluded.finish_reason, text = excluded.text, reasoning = excluded.reasoning, "
        "model = excluded.model, fingerprint = excluded.fingerprint, digest = excluded.digest WHERE text IS NULL",
        (question, draw, purchase, *answer_values(answer)),
    )
    return answer if cursor.rowcount else find_answer(connection, question, draw)
