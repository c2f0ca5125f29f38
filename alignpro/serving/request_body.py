"""The body of a request: read within limits, decompressed, and checked as far as the proxy needs it.

What the target gets is the bytes that came. The proxy's own field ``alignpro`` alone is cut out of them; nothing is written anew.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from json.decoder import JSONDecoder
from typing import Any, Literal, NoReturn

from starlette.types import Receive

from alignpro.config import ServeLimitsConfig
from alignpro.serving.contract import Api
from alignpro.serving.json_spans import each_member, root
from alignpro.serving.refusals import Refusal

FIELD = "alignpro"
"""The field of a request and of an answer that is the proxy's own."""


_MOST_MEMBERS = 16
"""Of gzip, one after another in a body. Each may be empty, and takes a copy of what is left."""


class ClientGone(Exception):  # noqa: N818
    """The client has disconnected."""


@dataclass(frozen=True)
class Wishes:
    """What a request asks of the proxy itself."""

    run: str | None = None
    opt_out: bool = False
    give: Literal["body", "header"] | None = None
    """Where the rewrite is to be given back."""


@dataclass(frozen=True)
class Document:
    """A request of a rewritable route."""

    body: Mapping[str, Any]
    """The JSON object without the proxy's own field."""
    raw: bytes
    """The same in UTF-8, as it came."""
    wishes: Wishes


async def read_body(receive: Receive, declared: bytes | None, limits: ServeLimitsConfig) -> bytes:
    """Read the body as it was sent.

    Args:
        receive: Of ASGI.
        declared: The header ``content-length``.
        limits: Its size and time.

    Raises:
        Refusal: It is too large (413), or does not come (408).
        ClientGone: The client has disconnected.
    """
    if declared is not None and int(declared) > limits.body_bytes:
        raise _too_large(limits)
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(limits.body_seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.body_bytes:
                    raise _too_large(limits)
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(
            408, f"The body did not come within {limits.body_seconds:g} s.", "request_timeout", headers=[_CLOSE]
        ) from None
    return b"".join(parts)


_CLOSE = (b"connection", b"close")


def _too_large(limits: ServeLimitsConfig) -> Refusal:
    message = f"The body is larger than {limits.body_bytes} bytes."
    return Refusal(413, message, "request_too_large", headers=[_CLOSE])


def decompress(body: bytes, encoding: bytes, limits: ServeLimitsConfig) -> bytes:
    """Undo the content encoding of a body.

    Raises:
        Refusal: The encoding is unknown (415), the body is damaged (400) or becomes too large (413).
    """
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"x-gzip"):
        raise Refusal(415, "The body's encoding is not known: send it plain, or with gzip.", "unsupported_encoding")
    parts: list[bytes] = []
    size = 0
    try:
        while body:  # a file of gzip may have several members
            if len(parts) == _MOST_MEMBERS:
                raise Refusal(400, f"The body has more than {_MOST_MEMBERS} members of gzip.", "invalid_encoding")
            member = zlib.decompressobj(wbits=31)
            parts.append(member.decompress(body, limits.body_bytes + 1 - size))
            size += len(parts[-1])
            if size > limits.body_bytes:
                raise _too_large(limits)
            if not member.eof:
                raise zlib.error("it ends too early")
            body = member.unused_data
    except zlib.error as error:
        raise Refusal(400, f"The body is not valid gzip: {error}.", "invalid_encoding") from None
    return b"".join(parts)


def parse(raw: bytes, api: Api) -> Document:
    """Parse and check a body.

    Args:
        raw: Decompressed.
        api: Of which route it is.

    Raises:
        Refusal: With 400, which names the field: it is no JSON object in UTF-8, or a field that the proxy reads has a wrong type.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Refusal(400, f"The body is not valid UTF-8 at byte {error.start}.", "invalid_utf8") from None
    body = _parse_json(text)
    if not isinstance(body, dict):
        raise Refusal(400, "The body is not a JSON object.", "invalid_json")
    wishes = _wishes(body.pop(FIELD)) if FIELD in body else None
    _check_fields(body, api)
    if wishes is None:
        return Document(body, raw, Wishes())
    return Document(body, _cut(raw, FIELD), wishes)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = JSONDecoder(parse_constant=_refuse_constant)


def _parse_json(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, f"The body is not valid JSON: {error.msg} at {where}.", "invalid_json") from None
    except RecursionError:
        raise Refusal(400, "The body is nested too deeply.", "invalid_json") from None
    except ValueError as error:  # a constant such as NaN, or a number of thousands of digits
        raise Refusal(400, f"The body is not valid JSON: {error}.", "invalid_json") from None


def _wrong(param: str, expected: str) -> Refusal:
    return Refusal(400, f"{param}: expected {expected}.", "invalid_type", param)


def _check_fields(body: dict[str, Any], api: Api) -> None:
    if not isinstance(body.get("model", ""), str):
        raise _wrong("model", "a string")
    if not isinstance(body.get("stream"), bool | None):
        raise _wrong("stream", "true or false")
    if not isinstance(body.get("user"), str | None):
        raise _wrong("user", "a string")
    if api == "completions":
        if not isinstance(body.get("prompt", ""), str | list):
            raise _wrong("prompt", "a string or an array")
        return
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise _wrong("messages", "an array of messages")
    if not messages:
        raise Refusal(400, "messages: expected at least one message.", "empty_array", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(f"messages[{index}]", "an object")
        if not isinstance(message.get("role"), str):
            raise _wrong(f"messages[{index}].role", "a string")


def _wishes(field: Any) -> Wishes:
    if not isinstance(field, dict):
        raise _wrong(FIELD, "an object with run, opt_out or return")
    for name in field:
        if name not in ("run", "opt_out", "return"):
            raise Refusal(400, f"{FIELD}.{name}: unknown; known are run, opt_out, return.", "unknown_field", FIELD)
    if not isinstance(run := field.get("run"), str | None):
        raise _wrong(f"{FIELD}.run", "the id of a run")
    if not isinstance(opt_out := field.get("opt_out", False), bool):
        raise _wrong(f"{FIELD}.opt_out", "true or false")
    if (give := field.get("return")) not in (None, "body", "header"):
        raise _wrong(f"{FIELD}.return", "body or header")
    return Wishes(run, opt_out, give)


def _cut(raw: bytes, name: str) -> bytes:
    """A JSON object without the members of this name; all other bytes stay, but for one comma each."""
    found = list(each_member(raw, root(raw)))
    if not any(member.key != name for member in found):
        return raw[: found[0].start] + raw[found[-1].value.end :]
    pieces, first = [raw[: found[0].start]], True
    for index, member in enumerate(found):
        if member.key == name:
            continue
        if not first:
            pieces.append(raw[found[index - 1].value.end : member.start])  # the comma with the space around it
        pieces.append(raw[member.start : member.value.end])
        first = False
    pieces.append(raw[found[-1].value.end :])
    return b"".join(pieces)
