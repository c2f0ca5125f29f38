"""What `alignpro ledger purge` does: texts go, hashes and costs stay."""

from __future__ import annotations

from pathlib import Path

from alignpro.endpoints.ledger_lock import lock_ledger
from alignpro.endpoints.ledger_schema import ledger_errors, open_for_writing
from alignpro.errors import LedgerError


def purge(path: Path) -> int:
    """Remove all that was asked and answered from the file and what SQLite keeps beside it.

    Hashes, draws, usage and costs stay, so budgets are as before; an answer that is wanted again is bought again.

    Returns:
        The number of answers whose text was removed.

    Raises:
        LedgerError: There is no such ledger, it is in use, or it cannot be written.
    """
    if not path.is_file():
        raise LedgerError(f"ledger {path}: there is no such file")
    path = path.resolve()
    with lock_ledger(path), ledger_errors(path):
        connection = open_for_writing(path)
        try:
            connection.execute("PRAGMA busy_timeout = 500")  # nobody writes; a reader may take long
            connection.execute("BEGIN IMMEDIATE")
            count = connection.execute(
                "UPDATE answers SET text = NULL, reasoning = NULL WHERE text IS NOT NULL"
            ).rowcount
            connection.execute("UPDATE questions SET body = NULL")
            connection.execute("UPDATE purchases SET reason = NULL")  # it may quote the server, which quotes the prompt
            connection.execute("COMMIT")
            connection.execute("VACUUM")
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            connection.close()
        if busy:
            raise LedgerError(f"ledger {path}: another process reads it, so its texts are still there; purge it again")
    return count
