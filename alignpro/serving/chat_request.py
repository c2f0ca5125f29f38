"""Reads a request for a model in this process, strictly: what cannot be honoured is refused, and the answer names the field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from alignpro.data import Message, replace_lone_surrogates
from alignpro.engine import SamplingParams
from alignpro.engine.types import LEAST_TEMPERATURE
from alignpro.errors import ConfigError
from alignpro.serving.contract import Api
from alignpro.serving.prompt_span import ROLES

MAX_STOPS = 16
MAX_LOGPROBS = 20
"""Likeliest tokens of a position that can be asked for."""
LARGEST = 1e300
"""An integer of JSON can be larger than any float."""
MAX_TEMPERATURE = 100.0
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""Fields that change nothing about an answer."""
_ASKING_NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that are not supported, with the values that ask for nothing; all of them may be null."""
_READ = frozenset(
    {
        *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stop", "n", "seed"),
        *("temperature", "top_p", "top_k", "min_p", "stream", "stream_options", "logprobs", "top_logprobs"),
    }
)


class RefusedRequestError(Exception):
    """A request that is not answered; it becomes an error in OpenAI's form.

    Args:
        message: What is wrong.
        param: The field.
        code: OpenAI's word for it.
        status: Of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class ModelRequest:
    """A request that the model can answer."""

    api: Api
    messages: tuple[Message, ...]
    """The conversation; of a completion one turn with its prompt."""
    params: SamplingParams
    """Without the ends of turns; ``max_tokens`` is at most what the client asked for."""
    max_tokens_asked: bool
    """Whether the client named a limit."""
    seed: int | None
    draws_itself: bool
    """Whether the only draw takes the seed itself, since the client did not set ``n``."""
    stream: bool
    usage_in_stream: bool


def read_request(api: Api, content: bytes, model: str, *, max_tokens: int, max_draws: int) -> ModelRequest:
    """Read the body of a request.

    Args:
        api: Which path it was sent to.
        content: JSON.
        model: The model's name.
        max_tokens: Length of a response to a request that names none.
        max_draws: The largest ``n``.

    Raises:
        RefusedRequestError: It cannot be honoured.
    """
    body = _parse(content)
    _check_model(body.get("model"), model)
    _check_fields(body, "prompt" if api == "chat" else "messages")
    stream = _of(body, "stream", bool, "a boolean") or False
    options = _of(body, "stream_options", dict, "an object") or {}
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise _refused(f"stream_options.{min(unknown)}", "is not supported")
    n, asked = _of(body, "n", int, "an integer"), _max_tokens(body)
    if n is not None and not 1 <= n <= max_draws:
        raise _refused("n", f"is {n}: expected 1 to {max_draws}")
    return ModelRequest(
        api,
        _messages(body.get("messages")) if api == "chat" else (_prompt(body.get("prompt")),),
        replace(_sampling(body, n or 1, asked or max_tokens), top_logprobs=_top_logprobs(body, api)),
        asked is not None,
        _seed(body),
        n is None,
        stream,
        stream and options.get("include_usage") is True,
    )


def _parse(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedRequestError(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise RefusedRequestError("the body is no JSON object")
    return body


def _check_model(name: Any, model: str) -> None:
    if not isinstance(name, str):
        raise _refused("model", "is required: a string")
    if name != model:
        raise RefusedRequestError(
            f"the model {name[:100]!r} does not exist; there is {model}", "model", "model_not_found", 404
        )


def _check_fields(body: Mapping[str, Any], of_other_api: str) -> None:
    """Refuse the first field that would be ignored."""
    for name, value in body.items():
        read = name in _READ and name != of_other_api
        if value is not None and not read and name not in _WITHOUT_EFFECT and not _asks_nothing(name, value):
            raise _refused(name, "is not supported by this model")


def _asks_nothing(name: str, value: Any) -> bool:
    neutral = _ASKING_NOTHING.get(name, ())
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _of(body: Mapping[str, Any], name: str, kind: type, expected: str) -> Any:
    """A field of a type, or None."""
    value = body.get(name)
    if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    raise _refused(name, f"is of another type: expected {expected}")


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise _refused(name, "is no finite number")
    return float(max(-LARGEST, min(value, LARGEST)))


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = _of(body, name, int, "an integer")
        if value is not None:
            if value < 1:
                raise _refused(name, f"is {value}: expected at least 1")
            return int(value)
    return None


def _seed(body: Mapping[str, Any]) -> int | None:
    seed = _of(body, "seed", int, "an integer")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise _refused("seed", "has more than 64 bits")
    return None if seed is None else int(seed)


def _top_logprobs(body: Mapping[str, Any], api: Api) -> int | None:
    """How many likeliest tokens are wanted at each position, beside the own one; None if no log-probabilities are."""
    name, count = _of_chat(body) if api == "chat" else _of_completion(body)
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise _refused(name, f"is {count}: expected 0 to {MAX_LOGPROBS}")
    return count


def _of_chat(body: Mapping[str, Any]) -> tuple[str, int | None]:
    """A chat asks with a boolean ``logprobs`` and the number ``top_logprobs``."""
    wanted, count = _of(body, "logprobs", bool, "a boolean"), _of(body, "top_logprobs", int, "an integer") or 0
    if count and not wanted:
        raise _refused("top_logprobs", "needs logprobs: true")
    return "top_logprobs", count if wanted else None


def _of_completion(body: Mapping[str, Any]) -> tuple[str, int | None]:
    """A completion asks with a number in ``logprobs``."""
    if body.get("top_logprobs") not in (None, 0):
        raise _refused("top_logprobs", "is a field of chats: a completion gives the number in logprobs")
    return "logprobs", None if body.get("logprobs") is False else _of(body, "logprobs", int, "an integer")


def _sampling(body: Mapping[str, Any], n: int, max_tokens: int) -> SamplingParams:
    top_k = _of(body, "top_k", int, "an integer") or 0
    values: dict[str, Callable[[], Any]] = {
        "temperature": lambda: _temperature(body),
        "top_p": lambda: _number(body, "top_p", 1.0),
        "min_p": lambda: _number(body, "min_p", 0.0),
        "top_k": lambda: max(top_k, 0) if top_k >= -1 else top_k,
        "stop": lambda: _stops(body.get("stop")),
    }
    read = {name: value() for name, value in values.items()}
    for name, value in read.items():
        try:
            SamplingParams(**{name: value})
        except (ConfigError, OverflowError) as error:
            raise _refused(name, f"cannot be used: {error}") from None
    return SamplingParams(n=n, max_tokens=max_tokens, **read)


def _temperature(body: Mapping[str, Any]) -> float:
    value = _number(body, "temperature", 1.0)
    if value > MAX_TEMPERATURE:
        raise _refused("temperature", f"is {value:g}: expected at most {MAX_TEMPERATURE:g}")
    return 0.0 if 0 < value < LEAST_TEMPERATURE else value  # lower ones are greedy


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise _refused("stop", "is no text and no list of texts that are not empty")
    if len(stops) > MAX_STOPS:
        raise _refused("stop", f"has {len(stops)} texts: at most {MAX_STOPS}")
    if any(replace_lone_surrogates(each) != each for each in stops):
        raise _refused("stop", "has half of a surrogate pair, which no text can hold")
    return tuple(stops)


def _prompt(prompt: Any) -> Message:
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str) or not prompt:
        raise _refused("prompt", "is no text: several prompts, and token ids, are not supported")
    return Message("user", prompt)


def _messages(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise _refused("messages", "is no list of messages, or empty")
    found = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    if found[-1].role != "user":
        raise _refused(
            f"messages[{len(found) - 1}].role", "is not user: an answer to the last message is all that is supported"
        )
    return found


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise _refused(place, "is no object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _refused(f"{place}.role", f"is {str(role)[:40]!r}: expected {', '.join(ROLES)}")
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, [], ""):
            raise _refused(f"{place}.{name}", "is not supported by this model")
    return Message(ROLES[role], _text(message.get("content"), f"{place}.content"))


def _text(content: Any, place: str) -> str:
    """The text of a message, which has no other parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refused(place, "is no text and no list of parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _refused(f"{place}[{i}]", f"is of type {str(kind)[:40]}: this model reads text alone")
        texts.append(part["text"])
    return "\n".join(texts)


def _refused(param: str, problem: str) -> RefusedRequestError:
    return RefusedRequestError(f"{param} {problem}", param)
