"""A line of JSON for every request. It holds no text of prompts or answers, unless the operator asks for prompts and rewrites."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

from alignpro.config import ServeLogConfig
from alignpro.errors import ConfigError
from alignpro.serving.contract import Outcome
from alignpro.serving.exchange import Exchange
from alignpro.serving.headers import rewrite_hash


class AccessLog:
    """Where requests are recorded.

    Raises:
        ConfigError: The file cannot be opened.
    """

    def __init__(self, config: ServeLogConfig) -> None:
        self._config = config
        self._file = self._open()

    def _open(self) -> TextIO | None:
        if self._config.file is None:
            return None
        try:
            return self._config.file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(f"log.file: {self._config.file} cannot be written: {error}") from None

    def reopen(self) -> None:
        """Open the file anew: it may have been moved away."""
        before, self._file = self._file, self._open()
        if before is not None:
            before.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def write(self, exchange: Exchange) -> None:
        """Record a request that has ended."""
        if not self._config.requests:
            return
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.request_id,
            "method": exchange.method,
            "path": exchange.path,
            "status": exchange.status,  # 0: the client left before the answer began
            "ms": _ms(time.perf_counter() - exchange.began),
            "bytes_in": exchange.bytes_in,
            "bytes_out": exchange.bytes_out,
        }
        if exchange.first_byte is not None:
            line["first_byte_ms"] = _ms(exchange.first_byte - exchange.began)
        line |= {f"{phase}_ms": _ms(seconds) for phase, seconds in exchange.phases.items()}
        line |= {f"{kind}_tokens": count for kind, count in exchange.tokens.items()}
        for name in ("model", "user", "error", "detail"):
            if (value := getattr(exchange, name)) is not None:
                line[name] = value
        if exchange.is_stream:
            line["stream"] = True
        if exchange.outcome is not None:
            line |= self._of_outcome(exchange.outcome)
        self._print(line)

    def write_later(self, request_id: str, outcome: Outcome) -> None:
        """Record what a rewrite that was not waited for became."""
        if self._config.requests:
            self._print({"request_id": request_id, "later": True, **self._of_outcome(outcome)})

    def _of_outcome(self, outcome: Outcome) -> dict[str, Any]:
        line: dict[str, Any] = {"rewrite": "applied" if outcome.skipped is None else f"skipped:{outcome.skipped}"}
        line["rewrite_ms"] = _ms(outcome.seconds)
        if outcome.run is not None:
            line["run"] = outcome.run
        if outcome.rewrite is not None:
            line["rewrite_hash"] = rewrite_hash(outcome.rewrite)
        if outcome.details:
            line["details"] = dict(outcome.details)
        if self._config.prompts:
            line["prompt_text"], line["rewrite_text"] = outcome.original, outcome.rewrite
        return line

    def _print(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._file or sys.stderr)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
