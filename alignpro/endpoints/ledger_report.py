"""What `alignpro ledger show` and `export` say of a ledger, which another process may be using."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignpro.endpoints.ledger_rows import decode
from alignpro.endpoints.ledger_schema import FILE_NAME, open_for_reading
from alignpro.endpoints.prices import dollars, show_dollars
from alignpro.errors import LedgerError

_NEWEST = 10


def ledger_of(path: Path) -> Path:
    """Return the ledger that a path means: the file, or that of a run directory.

    Raises:
        LedgerError: There is none.
    """
    if not path.is_dir():
        return path
    if not (path / FILE_NAME).is_file():
        raise LedgerError(f"run directory {path}: has no {FILE_NAME}; give the file that its configuration names")
    return path / FILE_NAME


def describe(path: Path) -> list[str]:
    """Return lines with the totals of a ledger by model and state, and its newest purchases.

    Raises:
        LedgerError: It cannot be read.
    """
    with open_for_reading(path) as connection:
        connection.execute("BEGIN")  # one moment of a ledger that is in use
        connection.create_aggregate("exact_sum", 1, _ExactSum)  # type: ignore[arg-type]
        totals = connection.execute(
            "SELECT q.model, p.state, count(*), exact_sum(json_array_length(p.draws)), exact_sum(p.input), "
            "exact_sum(p.output), exact_sum(p.cost), count(*) - count(p.cost) FROM purchases p "
            "JOIN questions q ON q.id = p.question GROUP BY q.model, p.state ORDER BY q.model, p.state"
        ).fetchall()
        answers, purged = connection.execute("SELECT count(*), count(*) - count(text) FROM answers").fetchone()
        newest = connection.execute(
            "SELECT p.time, p.state, q.model, json_array_length(p.draws), p.input, p.output, p.cost, p.reason "
            "FROM purchases p JOIN questions q ON q.id = p.question ORDER BY p.id DESC LIMIT ?",
            (_NEWEST,),
        ).fetchall()
    return [
        _summary(path, totals, answers, purged),
        *(_totals_table(totals) if totals else []),
        *(_newest_table(newest) if newest else []),
    ]


def export(path: Path, out: Path, *, force: bool = False) -> int:
    """Write every purchase, with what was asked and answered, as a line of JSON, readable by its owner only.

    Args:
        path: The ledger.
        out: The file to write.
        force: Whether it may replace a file.

    Returns:
        The number of lines.

    Raises:
        LedgerError: The ledger cannot be read, or the file cannot be written.
    """
    if out.exists() and not force:
        raise LedgerError(f"{out}: exists already; --force replaces it, or name another file")
    partial = out.with_name(f".partial-{out.name}")
    count = 0
    with open_for_reading(path) as connection:
        try:
            with open(partial, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                for record in _purchases(connection):
                    file.write(json.dumps(record) + "\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            partial.replace(out)
        except OSError as error:
            raise LedgerError(f"{out}: cannot be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return count


def _purchases(connection: sqlite3.Connection) -> Iterator[dict[str, Any]]:
    connection.execute("BEGIN")
    rows = connection.execute(
        "SELECT p.id, p.time, p.run, p.state, p.draws, p.bound_input, p.bound_output, p.input, p.output, p.reported, p.cost, "
        "p.reason, q.id, q.hash, q.base_url, q.model, q.api, q.body FROM purchases p JOIN questions q ON q.id = p.question "
        "ORDER BY p.id"
    )
    for row in rows:
        (number, time, run, state, draws, bound_input, bound_output, input, output, reported, cost, reason) = row[:12]
        question, digest, base_url, model, api, body = row[12:]
        yield {
            "purchase": number,
            "time": _when(time),
            "run": run,
            "state": state,
            "base_url": decode(base_url),
            "model": decode(model),
            "api": api,
            "question": digest.hex(),
            "body": None if body is None else decode(body),
            "draws": json.loads(draws),
            "bound": {"input": bound_input, "output": bound_output},
            "charged": {"input": input, "output": output, "usd": None if cost is None else str(dollars(cost))},
            "usage_reported": bool(reported),
            "reason": None if reason is None else decode(reason),
            "answers": list(_answers(connection, question, number)),
        }


def _answers(connection: sqlite3.Connection, question: int, purchase: int) -> Iterator[dict[str, Any]]:
    rows = connection.execute(
        "SELECT draw, finish_reason, text, reasoning, model, fingerprint, digest FROM answers "
        "WHERE question = ? AND purchase = ? ORDER BY draw",
        (question, purchase),
    )
    for draw, finish_reason, text, reasoning, model, fingerprint, digest in rows:
        yield {
            "draw": draw,
            "finish_reason": finish_reason,
            "text": None if text is None else decode(text),
            "reasoning": None if reasoning is None else decode(reasoning),
            "model": decode(model),
            "fingerprint": decode(fingerprint),
            "digest": digest.hex(),
        }


class _ExactSum:
    """SQLite's sum fails beyond 64 bits."""

    def __init__(self) -> None:
        self._sum = 0

    def step(self, value: int | None) -> None:
        self._sum += value or 0

    def finalize(self) -> str:
        return str(self._sum)


def _summary(path: Path, totals: Sequence[tuple[Any, ...]], answers: int, purged: int) -> str:
    requests = sum(row[2] for row in totals)
    cost = sum(int(row[6]) for row in totals)
    parts = [f"{requests:,} requests", f"{answers:,} answers", show_dollars(cost)]
    for count, what in (
        (sum(row[7] for row in totals), "requests without a price"),
        (sum(row[2] for row in totals if row[1] == "written_off"), "of unknown outcome, charged at their bound"),
        (sum(row[2] for row in totals if row[1] == "open"), "in flight, or left so by a process that was killed"),
        (purged, "answers purged"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    return f"ledger {path}: {'; '.join(parts)}"


def _totals_table(totals: Sequence[tuple[Any, ...]]) -> list[str]:
    header = ("model", "state", "requests", "draws", "input", "output", "cost")
    rows = [
        (
            _plain(model),
            state,
            f"{count:,}",
            *(f"{int(each):,}" for each in (draws, input, output)),
            _cost(cost, unpriced),
        )
        for model, state, count, draws, input, output, cost, unpriced in totals
    ]
    return ["", *_align([header, *rows], left=2)]


def _newest_table(newest: Sequence[tuple[Any, ...]]) -> list[str]:
    header = ("newest", "state", "model", "draws", "input", "output", "cost", "reason")
    rows = [
        (
            _when(time),
            state,
            _plain(model),
            *(f"{each:,}" for each in (draws, input, output)),
            "?" if cost is None else show_dollars(cost),
            "" if reason is None else _plain(reason)[:60],
        )
        for time, state, model, draws, input, output, cost, reason in newest
    ]
    return ["", *_align([header, *rows], left=3)]


def _cost(cost: str, unpriced: int) -> str:
    return show_dollars(int(cost)) + (" + ?" if unpriced else "")


def _align(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Align columns: the first ones and the reason at the left, numbers at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left or index == 7 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _plain(stored: bytes) -> str:
    """Return text that comes from a server without what could control a terminal."""
    return "".join(char if char.isprintable() else "�" for char in stored.decode("utf-8", "replace"))


def _when(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00") + "Z"
