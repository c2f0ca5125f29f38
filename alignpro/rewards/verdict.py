"""What a judge's answer says. An answer that does not have the form that was asked for says nothing.

There are two forms, for a score and for a comparison: the whole answer is a JSON object with the key ``score`` or ``verdict``,
or its last line is ``Score: N`` or ``Verdict: A``, in any case and with or without Markdown's emphasis.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

Preference = Literal["A", "B", "tie"]

_LONGEST_LINE = 200
_DECORATION = r"[\s*_`#>]*"
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)


class UnreadableAnswerError(Exception):
    """An answer that does not have the form that was asked for; the message quotes its end."""


def parse_score(answer: str, low: float, high: float) -> float:
    """The score that an answer gives.

    Raises:
        UnreadableAnswerError: It gives none, or one outside [low, high].
    """
    value = _value_of("score", answer)
    if isinstance(value, str) and not _is_json(answer):
        value = float(value) if _NUMBER.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnreadableAnswerError(f"it ends with {_end(answer)}, not with `Score: N`")
    if not low <= value <= high:  # NaN is not
        raise UnreadableAnswerError(f"it ends with {_end(answer)}, a score outside [{low:g}, {high:g}]")
    return float(value)


def parse_preference(answer: str) -> Preference:
    """Which of two responses an answer prefers.

    Raises:
        UnreadableAnswerError: It does not say.
    """
    value = _value_of("verdict", answer)
    words: dict[Any, Preference] = {"a": "A", "b": "B", "tie": "tie"}
    preference = words.get(value.casefold()) if isinstance(value, str) else None
    if preference is None:
        raise UnreadableAnswerError(
            f"it ends with {_end(answer)}, not with `Verdict: A`, `Verdict: B` or `Verdict: tie`"
        )
    return preference


def _value_of(name: str, answer: str) -> Any:
    """The value behind ``name`` in a JSON object, or the text behind it in the last line; None if there is neither."""
    if _is_json(answer):
        return _json_object(answer).get(name)
    line = _last_line(answer.strip())
    found = re.fullmatch(
        rf"{_DECORATION}{name}{_DECORATION}:{_DECORATION}([\w.+-]+?){_DECORATION}\.?", line, re.IGNORECASE
    )
    return found[1] if found else None


def _is_json(answer: str) -> bool:
    return answer.lstrip().startswith("{")


def _json_object(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object that says the same thing twice says nothing."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _last_line(text: str) -> str:
    line = text.rpartition("\n")[2].strip()
    return line if len(line) <= _LONGEST_LINE else ""


def _end(answer: str) -> str:
    """The end of an answer, to be quoted in a message: one line, without control characters."""
    end = answer.strip()[-80:]
    return repr(end.rpartition("\n")[2]) if end else "nothing"
