"""For how long a server asks to be left alone, in every form in which servers say so."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST = 3600.0
"""Seconds; a server that asks for more is asked again after that."""

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_RESET = "x-ratelimit-reset"
_EPOCH = 1e9
"""Numbers from here on are a time since 1970, in seconds or, from a thousand times that, in milliseconds."""


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """For how long an answer asks to be left alone, in seconds; None if it does not say.

    Read are ``Retry-After`` (seconds or an HTTP date, counted from the answer's own ``Date`` if it has one) and
    ``retry-after-ms``, of which the longer one counts. Without either, all that begin with ``x-ratelimit-reset`` are read
    (``1m30s``, ``350ms``, seconds, or a time since 1970): when a limit is whole again, which of a limit by the day may be hours
    away. So those count of which nothing remains (``x-ratelimit-remaining…``), or, if none says so, the shortest.

    Args:
        headers: Of the answer, with names in lower case.
        now: Seconds since 1970; by default the clock's.
    """
    now = time.time() if now is None else now
    milliseconds = _number(headers.get("retry-after-ms", ""))
    asked = _finite(
        [
            _seconds_or_date(headers.get("retry-after", ""), _date(headers.get("date", "")) or now),
            None if milliseconds is None else milliseconds / 1000,
        ]
    )
    if not asked:
        resets = {name: _reset(value, now) for name, value in headers.items() if name.startswith(_RESET)}
        spent = _finite([each for name, each in resets.items() if _is_spent(headers, name.removeprefix(_RESET))])
        asked = spent or sorted(_finite(list(resets.values())))[:1]
    return min(max(0.0, *asked), LONGEST) if asked else None


def _is_spent(headers: Mapping[str, str], limit: str) -> bool:
    """Whether nothing remains of a limit."""
    return _number(headers.get(f"x-ratelimit-remaining{limit}", "")) == 0


def _finite(values: Sequence[float | None]) -> list[float]:
    return [each for each in values if each is not None and math.isfinite(each)]


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text.strip()) else None


def _date(text: str) -> float | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _seconds_or_date(text: str, now: float) -> float | None:
    seconds = _number(text)
    if seconds is not None:
        return seconds
    at = _date(text)
    return None if at is None else at - now


def _reset(text: str, now: float) -> float | None:
    text = text.strip()
    number = _number(text)
    if number is not None:
        if number < _EPOCH:
            return number
        return (number / 1000 if number >= 1000 * _EPOCH else number) - now
    if _DURATION.fullmatch(text):
        return sum(float(value) * _UNITS[unit] for value, unit in _PART.findall(text))
    try:
        return datetime.fromisoformat(text).astimezone(UTC).timestamp() - now
    except ValueError:
        return None
