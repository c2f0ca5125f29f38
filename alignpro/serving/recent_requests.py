"""The last requests, kept in memory for the page, if the operator wants it."""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

from alignpro.config import PageConfig
from alignpro.serving.exchange import Exchange

LONGEST_TEXT = 2000
"""Characters of a prompt or rewrite that are kept."""


class RecentRequests:
    """A bounded list of requests whose prompts could be rewritten.

    Args:
        config: How many are kept, and whether their texts are.
    """

    def __init__(self, config: PageConfig) -> None:
        self._has_texts = config.recent_texts
        self._kept: deque[dict[str, Any]] = deque(maxlen=config.recent_requests)

    def add(self, exchange: Exchange) -> None:
        """Keep a request that has ended, in place of the oldest one."""
        if exchange.api is None or not self._kept.maxlen:
            return
        entry: dict[str, Any] = {
            "request_id": exchange.request_id,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "path": exchange.path,
            "status": exchange.status,
            "ms": round(1000 * (time.perf_counter() - exchange.began), 1),
            "model": exchange.model,
            "error": exchange.error,
            "tokens": sum(exchange.tokens.values()) or None,
        }
        if (outcome := exchange.outcome) is not None:
            entry["rewrite"] = "applied" if outcome.skipped is None else f"skipped:{outcome.skipped}"
            entry["run"] = outcome.run
            if self._has_texts:
                entry["prompt_text"], entry["rewrite_text"] = _cut(outcome.original), _cut(outcome.rewrite)
        self._kept.append(entry)

    def newest_first(self) -> list[dict[str, Any]]:
        """The requests as JSON objects."""
        return list(reversed(self._kept))


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
