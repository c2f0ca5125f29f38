"""How questions and answers are hashed, and how they become rows of a ledger and back."""

from __future__ import annotations

import hashlib
import json
import sqlite3

from alignpro.endpoints.types import Answer, DrawKey

ANSWER_COLUMNS = "finish_reason, text, reasoning, model, fingerprint"


def encode(text: str) -> bytes:
    """Return UTF-8, with lone surrogates as they are: a JSON string may hold them."""
    return text.encode("utf-8", "surrogatepass")


def decode(stored: bytes) -> str:
    """Invert `encode`."""
    return stored.decode("utf-8", "surrogatepass")


def hash_question(base_url: str, model: str, api: str, body: str) -> bytes:
    """Return the SHA-256 of what is asked: with the draw, it is the key of an answer."""
    return hashlib.sha256(json.dumps([base_url, model, api, body]).encode()).digest()


def hash_answer(text: bytes, reasoning: bytes) -> bytes:
    """Return the SHA-256 of an answer as stored; the length tells where the text ends."""
    return hashlib.sha256(len(text).to_bytes(8, "big") + text + reasoning).digest()


def question_of(key: DrawKey) -> bytes:
    """Return the hash of the question of a draw."""
    return hash_question(key.base_url, key.model, key.api, key.body)


def answer_values(answer: Answer) -> tuple[str, bytes, bytes, bytes, bytes, bytes]:
    """Return the values of `ANSWER_COLUMNS` and the digest."""
    text, reasoning = encode(answer.text), encode(answer.reasoning)
    return (
        answer.finish_reason,
        text,
        reasoning,
        encode(answer.model),
        encode(answer.fingerprint),
        hash_answer(text, reasoning),
    )


def find_question(connection: sqlite3.Connection, question: bytes) -> int | None:
    """Return the row of a question; None if it has never been asked."""
    row = connection.execute("SELECT id FROM questions WHERE hash = ?", (question,)).fetchone()
    return None if row is None else row[0]


def find_answer(connection: sqlite3.Connection, question: int, draw: int) -> Answer | None:
    """Return a draw that has been received and not purged; None otherwise."""
    row = connection.execute(
        f"SELECT {ANSWER_COLUMNS} FROM answers WHERE question = ? AND draw = ? AND text IS NOT NULL", (question, draw)
    ).fetchone()
    if row is None:
        return None
    finish_reason, *texts = row
    text, reasoning, model, fingerprint = map(decode, texts)
    return Answer(text, finish_reason, reasoning, model, fingerprint, replayed=True)
