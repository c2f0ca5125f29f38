"""Random requests as bytes, good and broken ones, and the answers to them."""

from __future__ import annotations

import gzip
import json
import random
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from proxies import Proxy

FIELDS = ("messages", "stream", "user", "alignpro", "n", "tools", "prompt")


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut out, doubled, or put in."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(changed) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            changed[at:at] = bytes(draw.choice(b'{}[]",:\\\x00\xff\r\n \t0e') for _ in range(draw.randrange(1, 4)))
        elif kind == 1:
            del changed[at : at + draw.randrange(1, 20)]
        elif kind == 2:
            changed[at:at] = changed[at : at + draw.randrange(1, 20)]
        elif at < len(changed):
            changed[at] = draw.randrange(256)
    return bytes(changed)


def any_value(draw: random.Random, depth: int = 0) -> Any:
    kinds = [None, True, 0, -1.5e300, 2**70, "", "häß", "\ud800", "data: x\n\n", [], {}]
    if depth < 3 and draw.random() < 0.3:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    if depth < 3 and draw.random() < 0.3:
        return {draw.choice(["a", "role", "content", "stream"]): any_value(draw, depth + 1) for _ in range(2)}
    return draw.choice(kinds)


def random_request(
    draw: random.Random, body: Mapping[str, Any], path: bytes, names: Sequence[str] = FIELDS
) -> tuple[bytes, bool | None]:
    """A request, and for a good one whether it streams.

    Args:
        draw: Decides.
        body: That of a good one.
        path: Where it goes.
        names: Fields that get any value.
    """
    fields = dict(body)
    stream = draw.random() < 0.3
    if stream:
        fields["stream"] = True
    kind = draw.random()
    if 0.3 < kind < 0.6:
        fields[draw.choice(names)] = any_value(draw)
    raw = json.dumps(fields).encode()
    head = b"POST " + path + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    if kind >= 0.6:
        raw = mutated(draw, raw)
    if draw.random() < 0.2:
        raw = gzip.compress(raw, 1)
        head += b"content-encoding: gzip\r\n"
        if draw.random() < 0.3:
            raw = mutated(draw, raw)
            kind = 1
    whole = head + b"content-length: %d\r\n\r\n" % len(raw) + raw
    if kind > 0.9:
        whole = mutated(draw, whole)
    return whole, stream if kind <= 0.3 else None


def answer_to(proxy: Proxy, data: bytes) -> bytes:
    """All that comes back; a proxy that is silent for long fails."""
    with socket.create_connection(("127.0.0.1", proxy.port), 20) as client:
        parts = []
        try:
            client.sendall(data)
            while not _is_whole(b"".join(parts)) and (part := client.recv(65536)):
                parts.append(part)
        except ConnectionError:  # refused in the middle
            pass
        return b"".join(parts)


def _is_whole(answer: bytes) -> bool:
    """Whether an answer with a length is there; after it the connection may stay open."""
    head, end, body = answer.partition(b"\r\n\r\n")
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(end and length and len(body) >= int(length))


def body_of(answer: bytes) -> bytes:
    """The body, of either framing."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body
