"""How ranks talk about purchases and permits: JSON frames on a TCP connection whose two ends prove that they know a token.

A frame is its length, 4 bytes, most significant first, and that many bytes of JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import socket
from collections.abc import Sequence
from typing import Any

from alignpro.endpoints.types import Answer, DrawKey, Usage
from alignpro.errors import EndpointError

_LONGEST = 1 << 28
_LONGEST_GREETING = 1 << 10
_GREETING_SECONDS = 30


async def send(writer: asyncio.StreamWriter, message: object) -> None:
    """Send a frame."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    writer.write(len(payload).to_bytes(4, "big") + payload)
    await writer.drain()


async def receive(reader: asyncio.StreamReader, longest: int = _LONGEST) -> Any:
    """Receive a frame.

    Raises:
        EOFError: The other end has gone.
        EndpointError: It does not speak this protocol.
    """
    length = int.from_bytes(await reader.readexactly(4), "big")
    if length > longest:
        raise EndpointError(f"a message of {length} bytes from another rank: at most {longest} are expected")
    try:
        return json.loads(await reader.readexactly(length))
    except ValueError as error:
        raise EndpointError(f"a message from another rank is not JSON: {error}") from error


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes, *, server: bool) -> bool:
    """Prove to the other end that this one knows the token, without sending it, and check that the other does.

    Returns:
        Whether it does. The server proves itself second, so that a stranger learns nothing from it.
    """
    try:
        async with asyncio.timeout(_GREETING_SECONDS):
            own = secrets.token_hex(16)
            await send(writer, own)
            other = await receive(reader, _LONGEST_GREETING)
            if not isinstance(other, str) or len(other) != len(own) or other == own:
                return False
            proofs = [_prove(token, b"rank", own, other), _prove(token, b"server", own, other)]
            if not server:
                await send(writer, proofs[0])
            proof = await receive(reader, _LONGEST_GREETING)
            if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), proofs[not server].encode()):
                return False
            if server:
                await send(writer, proofs[1])
            return True
    except (EOFError, OSError, EndpointError):  # TimeoutError is an OSError
        return False


def notice_death(writer: asyncio.StreamWriter) -> None:
    """Let the operating system end the connection within a minute if the other host is gone without a word."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def pack_keys(keys: Sequence[DrawKey]) -> list[Any]:
    """Return draws as JSON, each question once."""
    questions = {(key.base_url, key.model, key.api, key.body): 0 for key in keys}
    questions = {question: index for index, question in enumerate(questions)}
    draws = [[questions[key.base_url, key.model, key.api, key.body], key.draw] for key in keys]
    return [list(map(list, questions)), draws]


def unpack_keys(packed: list[Any]) -> tuple[DrawKey, ...]:
    """Invert `pack_keys`."""
    questions, draws = packed
    keys = []
    for index, draw in draws:
        base_url, model, api, body = questions[index]
        keys.append(DrawKey(base_url, model, api, body, draw))
    return tuple(keys)


def pack_answers(answers: Sequence[Answer | None]) -> list[Any]:
    """Return answers as JSON."""
    return [
        answer
        and [answer.text, answer.finish_reason, answer.reasoning, answer.model, answer.fingerprint, answer.replayed]
        for answer in answers
    ]


def unpack_answers(packed: list[Any]) -> list[Answer | None]:
    """Invert `pack_answers`."""
    return [None if each is None else Answer(*each) for each in packed]


def pack_usage(usage: Usage | None) -> list[int] | None:
    """Return tokens as JSON."""
    return None if usage is None else [usage.input, usage.output]


def unpack_usage(packed: list[int] | None) -> Usage | None:
    """Invert `pack_usage`."""
    return None if packed is None else Usage(*packed)


def _prove(token: bytes, role: bytes, own: str, other: str) -> str:
    """Both ends compute the same: the two numbers are sorted, and the role says whose proof it is."""
    first, second = sorted((own, other))
    return hmac.new(token, role + first.encode() + second.encode(), hashlib.sha256).hexdigest()
