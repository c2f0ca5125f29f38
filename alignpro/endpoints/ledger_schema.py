"""The file of a ledger: its tables, its version, and how it is opened for writing and for reading.

A *question* is all that is sent apart from n and seed; a *purchase* is one request for draws of its answer; an *answer* is
one draw. Money is in picodollars (10⁻¹² $), so that sums are exact. What comes from outside is stored as bytes, since a JSON
string may hold what UTF-8 cannot encode.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from alignpro.errors import LedgerError

FILE_NAME = "ledger.sqlite"
"""Name of a ledger in a run directory."""
VERSION = 1
_APPLICATION_ID = int.from_bytes(b"AlPr", "big")

TABLES = (
    """CREATE TABLE questions(
        id INTEGER PRIMARY KEY,
        hash BLOB NOT NULL UNIQUE,  -- SHA-256 of what follows
        base_url BLOB NOT NULL,
        model BLOB NOT NULL,
        api TEXT NOT NULL,
        body BLOB                   -- NULL: purged
    ) STRICT""",
    """CREATE TABLE purchases(
        id INTEGER PRIMARY KEY,
        time REAL NOT NULL,         -- of the intent, in seconds since 1970
        run TEXT NOT NULL,
        question INTEGER NOT NULL REFERENCES questions,
        draws TEXT NOT NULL,        -- JSON list
        bound_input INTEGER NOT NULL,
        bound_output INTEGER NOT NULL,
        bound_cost INTEGER,         -- NULL: no price was known
        state TEXT NOT NULL CHECK(state IN ('open', 'settled', 'refunded', 'written_off')),
        input INTEGER NOT NULL,     -- what is charged; while it is open, and if the outcome is unknown, the bound
        output INTEGER NOT NULL,
        cost INTEGER,
        reported INTEGER NOT NULL DEFAULT 0,  -- whether the server said what it took
        missing TEXT NOT NULL DEFAULT '[]',   -- JSON list of the draws that did not come back
        reason BLOB                 -- of a refund, of an unknown outcome
    ) STRICT""",
    "CREATE INDEX purchases_of_run ON purchases(run)",
    "CREATE INDEX open_purchases ON purchases(id) WHERE state = 'open'",
    """CREATE TABLE answers(
        question INTEGER NOT NULL REFERENCES questions,
        draw INTEGER NOT NULL,
        purchase INTEGER NOT NULL REFERENCES purchases,
        finish_reason TEXT NOT NULL,
        text BLOB,                  -- NULL: purged
        reasoning BLOB,
        model BLOB NOT NULL,
        fingerprint BLOB NOT NULL,
        digest BLOB NOT NULL,       -- SHA-256 of text and reasoning
        UNIQUE(question, draw)
    ) STRICT""",
)


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open a ledger, or create it, readable by its owner only. The caller holds its lock.

    Raises:
        LedgerError: It is not a ledger, is damaged, was written by a newer version, or cannot be written.
    """
    with ledger_errors(path):
        _make_private(path)
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        try:
            new = _check(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # in WAL mode the default does not sync a commit
            connection.execute("PRAGMA secure_delete = ON")
            if new:
                _create(connection)
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def open_for_reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a ledger that another process may be writing.

    Raises:
        LedgerError: It does not exist, is not a ledger, is damaged, or was written by a newer version.
    """
    if not path.is_file():
        raise LedgerError(f"ledger {path}: there is no such file")
    file = path.resolve()
    uri = f"file:{quote(str(file))}?mode=ro"
    if not os.access(file.parent, os.W_OK) and not file.with_name(f"{file.name}-wal").exists():
        uri += "&immutable=1"  # SQLite could not create the shared memory that it reads a WAL database by
    with ledger_errors(path):
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)
        try:
            if _check(connection, path):
                raise LedgerError(f"ledger {path}: is empty")
            yield connection
        finally:
            connection.close()


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the operating system into a `LedgerError` that names the file."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise explain(path, error) from error


def explain(path: Path, error: Exception) -> LedgerError:
    """Return the error that says what is wrong with a ledger, and what to do."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_NOTADB:
        return LedgerError(f"ledger {path}: is not a ledger, or its beginning is damaged; move it away")
    if code == sqlite3.SQLITE_CORRUPT:
        return LedgerError(
            f"ledger {path}: is damaged ({error}); `alignpro ledger verify` says where; move it away, and answers that "
            "were paid for will be bought again"
        )
    if code == sqlite3.SQLITE_FULL:
        return LedgerError(f"ledger {path}: the disk is full; free some space and continue (a training with --resume)")
    return LedgerError(f"ledger {path}: cannot be used: {error}")


def _make_private(path: Path) -> None:
    """SQLite gives the files beside it the mode of the database."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        path.chmod(0o600)


def _check(connection: sqlite3.Connection, path: Path) -> bool:
    """Check whose database it is and of which version; return whether nothing has been written yet."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application == 0 and connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
        return True
    if application != _APPLICATION_ID:
        raise LedgerError(f"ledger {path}: is a database of another program; name another file")
    if version > VERSION:
        raise LedgerError(
            f"ledger {path}: has version {version}, of a newer Align-Pro (this one knows {VERSION}); update Align-Pro, or "
            "name another file"
        )
    return False


def _create(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for table in TABLES:
        connection.execute(table)
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")
