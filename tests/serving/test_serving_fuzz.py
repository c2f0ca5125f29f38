"""Random requests: no error of the proxy's own, no hang, and bytes that are the target's."""

from __future__ import annotations

import gzip
import json
import random
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from proxies import CHAT, Proxy, proxied
from upstream import DONE, EVENTS, Upstream, chat_answer

_CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
_CLIENTS = 16
_ANSWERS = {False: chat_answer(), True: b"".join(EVENTS) + DONE}


def _mutated(draw: random.Random, data: bytes) -> bytes:
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


def _value(draw: random.Random, depth: int = 0) -> Any:
    kinds = [None, True, 0, -1.5e300, 2**70, "", "häß", "\ud800", "data: x\n\n", [], {}]
    if depth < 3 and draw.random() < 0.3:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    if depth < 3 and draw.random() < 0.3:
        return {draw.choice(["a", "role", "content", "stream"]): _value(draw, depth + 1) for _ in range(2)}
    return draw.choice(kinds)


def _request(draw: random.Random) -> tuple[bytes, bool | None]:
    """A request, and for a good one whether it streams."""
    fields: dict[str, Any] = dict(CHAT)
    stream = draw.random() < 0.3
    if stream:
        fields["stream"] = True
    kind = draw.random()
    if 0.3 < kind < 0.6:
        names = ["messages", "stream", "user", "alignpro", "n", "tools", "prompt"]
        fields[draw.choice(names)] = _value(draw)
    body = json.dumps(fields).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    if kind >= 0.6:
        body = _mutated(draw, body)
    if draw.random() < 0.2:
        body = gzip.compress(body, 1)
        head += b"content-encoding: gzip\r\n"
        if draw.random() < 0.3:
            body = _mutated(draw, body)
            kind = 1
    whole = head + b"content-length: %d\r\n\r\n" % len(body) + body
    if kind > 0.9:
        whole = _mutated(draw, whole)
    return whole, stream if kind <= 0.3 else None


def _answer(proxy: Proxy, data: bytes) -> bytes:
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


def _body(answer: bytes) -> bytes:
    """The body, of either framing."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


def _ask_at_random(proxy: Proxy, upstream: Upstream, count: int, seed: int) -> Counter[bytes]:
    """The statuses of the answers to random requests, each after the other."""
    draw = random.Random(seed)
    statuses: Counter[bytes] = Counter()
    for _ in range(count):
        upstream.received.clear()
        data, stream = _request(draw)
        answer = _answer(proxy, data)
        status = answer[9:12]
        statuses[status] += 1
        assert not status.startswith(b"5") or status == b"501", (data, answer)
        if stream is not None:
            assert (status, _body(answer)) == (b"200", _ANSWERS[stream]), (data, answer)
    return statuses


@pytest.mark.parametrize("count", [320, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_requests_give_no_error_of_the_proxys_own(upstream: Upstream, count: int) -> None:
    """Several clients ask at once: most of the time is that of requests whose ends do not come."""
    upstream.pause = 0
    limits = {"header_seconds": 0.2, "body_seconds": 0.2, "keep_alive_seconds": 1, "body_bytes": 1 << 20}
    with proxied(upstream.url, limits=limits) as proxy, ThreadPoolExecutor(_CLIENTS) as clients:
        asked = partial(_ask_at_random, proxy, upstream, count // _CLIENTS)
        statuses = sum(clients.map(asked, range(_CLIENTS)), Counter[bytes]())
        assert proxy.metric('alignpro_errors_total{code="internal_error"}') == 0
        proxy.settle()
    assert statuses.total() == count
    assert statuses[b"200"] > 0.25 * count
    assert statuses[b"400"] > 0.2 * count


@pytest.mark.slow
def test_requests_by_the_proxys_own_description_give_what_it_describes(upstream: Upstream) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    upstream.pause = 0
    with proxied(upstream.url) as proxy:
        root = proxy.url.removesuffix("/v1")
        schemathesis.checks.load_all_checks()
        checks = [schemathesis.checks.CHECKS.get_one(name) for name in _CHECKS]
        asked = 0
        for found in schemathesis.openapi.from_url(f"{root}/openapi.json").get_all_operations():
            for mode in schemathesis.GenerationMode:

                @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
                @given(case=found.ok().as_strategy(generation_mode=mode))
                def ask(case: Any) -> None:
                    nonlocal asked
                    asked += 1
                    case.call_and_validate(base_url=root, checks=checks)

                try:
                    ask()
                except Unsatisfiable:  # there is nothing to get wrong
                    continue
        assert asked > 500
        assert proxy.metric('alignpro_errors_total{code="internal_error"}') == 0
