"""What is sent and what comes back: the JSON of chat and plain completions, and how it is read.

The body of a request is canonical JSON, so that the same bytes that are sent, apart from ``n`` and ``seed``, identify the
answer in the ledger. Answers are read strictly: what does not have the form that the protocol gives it is not an answer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignpro.config import EndpointConfig
from alignpro.endpoints.types import Answer, DrawKey, Query, Usage
from alignpro.errors import EndpointError

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
EXCERPT = 300
"""Characters of what a server said that a message quotes."""


class MalformedAnswerError(Exception):
    """An answer that does not have the form that the protocol gives it."""


class ErrorInsideError(Exception):
    """An error that a gateway reports with status 200."""

    def __init__(self, code: object) -> None:
        super().__init__(code)
        self.status = code if type(code) is int and 400 <= code < 600 else 500


@dataclass(frozen=True)
class Received:
    """An answer to one request."""

    answers: list[Answer | None]
    """By the index of the choice; None: it holds no text that could be scored."""
    usage: Usage | None
    """None if the server does not say, or says something that cannot be."""
    choices: int
    """How many choices came back."""
    problem: str = ""
    """Why answers are missing."""


def request_body(config: EndpointConfig, query: Query) -> str:
    """The canonical JSON of a request, apart from ``n`` and ``seed``.

    ``extra_body`` goes over what follows from the query; a field that it sets to null is not sent, and
    ``max_completion_tokens`` takes the place of ``max_tokens``. Temperature and top_p are always sent, since servers have
    defaults of their own; top_k and min_p, which not all servers know, only if they are set.

    Raises:
        EndpointError: The prompt is not valid Unicode.
    """
    sampling = query.sampling
    body: dict[str, Any] = {"model": config.model, "max_tokens": sampling.max_tokens}
    if config.api == "chat":
        body["messages"] = [{"role": role, "content": content} for role, content in query.messages]
    else:
        body["prompt"] = query.messages[-1][1]
    body["temperature"] = sampling.temperature
    if sampling.temperature > 0:
        body["top_p"] = sampling.top_p
        if sampling.top_k > 0:
            body["top_k"] = sampling.top_k
        if sampling.min_p > 0:
            body["min_p"] = sampling.min_p
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if config.extra_body.get("max_completion_tokens") is not None:
        del body["max_tokens"]
    body |= config.extra_body
    kept = {name: value for name, value in body.items() if value is not None}
    text = _CANONICAL.encode(kept)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EndpointError(f"a prompt for {config.base_url} holds half of a surrogate pair: {error}") from None
    return text


def with_draws(body: str, n: int | None, seed: int | None) -> bytes:
    """The bytes of a request: its body with the number of draws and the seed."""
    more = "".join(f',"{name}":{value}' for name, value in (("n", n), ("seed", seed)) if value is not None)
    return f"{body[:-1]}{more}}}".encode()


def upper_bound(config: EndpointConfig, query: Query, body: str, n: int) -> Usage:
    """The most tokens that a request for ``n`` draws can take.

    No token stands for less than a byte, also of what a tokenizer makes of the text if it normalises it first (NFKC). The body
    holds all that the prompt does, and its own syntax allows for the marks between turns.
    """
    bytes_of = [len(body.encode())]
    if not body.isascii():
        bytes_of.append(len(unicodedata.normalize("NFKC", body).encode()))
    return Usage(max(bytes_of) + config.prompt_overhead, n * max_tokens_of(config, query))


def max_tokens_of(config: EndpointConfig, query: Query) -> int:
    """The most tokens of one draw."""
    limits = [config.extra_body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return max([one for one in limits if isinstance(one, int)], default=query.sampling.max_tokens)


def draw_keys(config: EndpointConfig, query: Query, body: str) -> list[DrawKey]:
    """What identifies each draw of a query."""
    draws = query.draws if query.sampling.temperature > 0 else (0,) * len(query.draws)
    return [DrawKey(config.base_url, config.model, config.api, body, draw) for draw in draws]


def read_answer(body: bytes, api: Literal["chat", "completions"], n: int) -> Received:
    """Read the answer to a request for ``n`` draws.

    Raises:
        ErrorInsideError: It holds an error instead of choices.
        MalformedAnswerError: It is not JSON, or has no choices. A choice without text is None, as is one that is lacking.
    """
    document = parse_json(body)
    if not isinstance(document, dict):
        raise MalformedAnswerError("the answer is not a JSON object")
    choices = document.get("choices")
    if not choices and isinstance(document.get("error"), dict):
        raise ErrorInsideError(document["error"].get("code"))
    if not isinstance(choices, list) or not choices:
        raise MalformedAnswerError(f"the answer has no choices: {excerpt(body)}")
    usage = _usage(document.get("usage"))
    model, fingerprint = (_text(document.get(name)) for name in ("model", "system_fingerprint"))
    ordered = _by_index(choices)
    answers = [_answer(choice, api, model, fingerprint) for choice in ordered[:n]]
    problem = "" if all(answers) else f"a choice holds no text: {excerpt(body)}"
    answers += [None] * (n - len(answers))
    return Received(answers, usage, len(choices), problem)


def parse_json(body: bytes) -> Any:
    """Parse an answer.

    Raises:
        MalformedAnswerError: It is no JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise MalformedAnswerError(f"the answer is not valid JSON: {excerpt(body)}") from None


def _by_index(choices: Sequence[Any]) -> Sequence[Any]:
    """In the order of their index, if they have one."""
    indices = [choice.get("index") if isinstance(choice, dict) else None for choice in choices]
    if sorted(one for one in indices if type(one) is int) != list(range(len(choices))):
        return choices
    return [choices[indices.index(index)] for index in range(len(choices))]


def _answer(choice: Any, api: str, model: str, fingerprint: str) -> Answer | None:
    if not isinstance(choice, dict):
        return None
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        return Answer("", "filtered", model=model, fingerprint=fingerprint)
    if not isinstance(reason, str) or reason in ("abort", "error"):
        return None
    ended: Literal["stop", "length"] = "length" if reason == "length" else "stop"
    if api == "completions":
        text = choice.get("text")
        return Answer(text, ended, "", model, fingerprint) if isinstance(text, str) else None
    message = choice.get("message")
    if not isinstance(message, dict):
        return None
    reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    text = message.get("content")
    if text is None:
        text = message.get("refusal")  # the model's own, not the filter's: it is an answer
    if isinstance(text, list):  # parts, as those of inputs
        parts = [
            each.get("text") for each in text if isinstance(each, dict) and each.get("type") in ("text", "output_text")
        ]
        text = "".join(each for each in parts if isinstance(each, str)) if parts else text
    calls = reason in ("tool_calls", "function_call") or message.get("tool_calls") or message.get("function_call")
    if text is None and not calls:
        text = ""  # all its tokens were spent on reasoning, or it ended at once
    return Answer(text, ended, reasoning, model, fingerprint) if isinstance(text, str) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    counts = [_count(value.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    return None if None in counts else Usage(counts[0] or 0, counts[1] or 0)


def _count(value: Any) -> int | None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < 1 << 53
        or value != int(value)
    ):
        return None
    return int(value)


_OVERFLOW = re.compile(
    r"context_length_exceeded|exceed_context_size_error|maximum context length|exceeds? the (available )?context size"
    r"|context window|is longer than the model's context|must have less than \d+ tokens|prompt is too long",
    re.IGNORECASE,
)
_FILTERED = re.compile(r"content_filter|content_policy_violation|ResponsibleAIPolicyViolation", re.IGNORECASE)


def outcome_of(status: int, body: bytes) -> Literal["filtered", "overflow"] | None:
    """Whether a refusal depends on the text of the prompt, so that it is an outcome: codes of OpenAI, texts of the others."""
    if status not in (400, 413, 422):
        return None
    codes, message = _error_of(body)
    if _FILTERED.search(codes):
        return "filtered"
    return "overflow" if _OVERFLOW.search(f"{codes} {message}") else None


def _error_of(body: bytes) -> tuple[str, str]:
    """The codes and the message of an error, which servers put at different places."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return "", body[:4096].decode(errors="replace")
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return "", str(error)
    inner = error.get("innererror")
    codes = [error.get("code"), error.get("type"), inner.get("code") if isinstance(inner, dict) else None]
    return " ".join(str(code) for code in codes if code is not None), str(error.get("message", ""))


def error_code(body: bytes) -> str:
    """The codes by which an error calls itself."""
    return _error_of(body)[0]


def excerpt(body: bytes) -> str:
    """What a server said, in one line."""
    text = " ".join(body[: 4 * EXCERPT].decode(errors="replace").split())
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"
