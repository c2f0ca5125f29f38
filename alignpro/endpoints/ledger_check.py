"""What `alignpro ledger verify` checks: the file is intact, texts are those that were stored, and the accounts add up."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from alignpro.endpoints.ledger_rows import decode, hash_answer, hash_question
from alignpro.endpoints.ledger_schema import open_for_reading
from alignpro.errors import LedgerError

_SHOWN = 20


def verify(path: Path) -> None:
    """Check a ledger.

    Raises:
        LedgerError: It cannot be opened, or something is wrong with it; the message says what.
    """
    shown, count = [], 0
    for problem in find_problems(path):
        count += 1
        if count <= _SHOWN:
            shown.append(problem)
    if count > len(shown):
        shown.append(f"and {count - len(shown)} more")
    if shown:
        raise LedgerError(f"ledger {path}: is damaged:" + "".join(f"\n  {problem}" for problem in shown))


def find_problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with a ledger, which another process may be using; nothing if it is intact.

    Raises:
        LedgerError: It cannot be opened.
    """
    with open_for_reading(path) as connection:
        connection.execute("BEGIN")  # one moment of a ledger that is in use
        intact = True
        for check in (_damage, _questions, _answers, _charges, _deliveries):
            try:
                for problem in check(connection):
                    intact = False
                    yield problem
            except sqlite3.DatabaseError as error:
                if intact:
                    yield f"it cannot be read: {error}"
                return


def _damage(connection: sqlite3.Connection) -> Iterator[str]:
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            yield str(line)
    for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check"):
        yield f"{table} {row}: what it refers to in {parent} is missing"


def _questions(connection: sqlite3.Connection) -> Iterator[str]:
    rows = connection.execute("SELECT id, hash, base_url, model, api, body FROM questions WHERE body IS NOT NULL")
    for row, digest, base_url, model, api, body in rows:
        if hash_question(decode(base_url), decode(model), api, decode(body)) != digest:
            yield f"question {row}: its body is not what its hash says"


def _answers(connection: sqlite3.Connection) -> Iterator[str]:
    rows = connection.execute("SELECT question, draw, text, reasoning, digest FROM answers WHERE text IS NOT NULL")
    for question, draw, text, reasoning, digest in rows:
        if hash_answer(text, reasoning) != digest:
            yield f"answer to question {question}, draw {draw}: its text is not what its hash says"


def _charges(connection: sqlite3.Connection) -> Iterator[str]:
    """A refund costs nothing; an outcome that is unknown or without usage costs the bound."""
    for (row,) in connection.execute(
        "SELECT id FROM purchases WHERE state = 'refunded' AND (input, output, cost) != (0, 0, 0)"
    ):
        yield f"purchase {row}: was refunded, and is charged all the same"
    for (row,) in connection.execute(
        "SELECT id FROM purchases WHERE state != 'refunded' AND NOT reported "
        "AND (input, output) != (bound_input, bound_output) OR state IN ('open', 'written_off') AND cost IS NOT bound_cost"
    ):
        yield f"purchase {row}: its usage is unknown, and it is not charged at its bound"


def _deliveries(connection: sqlite3.Connection) -> Iterator[str]:
    """Every draw of a settled purchase has its answer, or is listed as missing; no answer comes from nowhere."""
    for row, question, draws, missing in connection.execute(
        "SELECT id, question, draws, missing FROM purchases WHERE state = 'settled'"
    ):
        wanted, absent = json.loads(draws), set(json.loads(missing))
        if not absent <= set(wanted):
            yield f"purchase {row}: misses draws that it was not for"
        for draw in set(wanted) - absent:
            if (
                connection.execute("SELECT 1 FROM answers WHERE question = ? AND draw = ?", (question, draw)).fetchone()
                is None
            ):
                yield f"purchase {row}: is settled, and the answer to draw {draw} is missing"
    for question, draw in connection.execute(
        "SELECT a.question, a.draw FROM answers a LEFT JOIN purchases p ON p.id = a.purchase "
        "WHERE p.id IS NULL OR p.question != a.question OR p.state != 'settled' "
        "OR a.draw NOT IN (SELECT value FROM json_each(p.draws))"
    ):
        yield f"answer to question {question}, draw {draw}: was never bought"
