"""Draws and answers for the tests of ledger, budget and books."""

from __future__ import annotations

from alignpro.endpoints.types import Answer, DrawKey, Usage

BOUND = Usage(100, 50)


def key(draw: int = 1, body: str = '{"messages":[]}', model: str = "m") -> DrawKey:
    return DrawKey("http://localhost/v1", model, "chat", body, draw)


def answer(text: str = "stone") -> Answer:
    return Answer(text, "stop", reasoning="hm", model="m-1", fingerprint="fp")
