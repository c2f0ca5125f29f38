"""Limits of the proxy and bad input: each has one outcome."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hmac import compare_digest
from pathlib import Path
from typing import Any

import pytest
from proxies import CHAT, Proxy, Reply, proxied
from upstream import Upstream

from alignpro.config import AccessConfig
from alignpro.errors import ConfigError
from alignpro.serving.authentication import Tokens, client_tokens
from alignpro.serving.refusals import Refusal

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"


def _error(reply: Reply) -> tuple[int, str]:
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return reply.status, error["code"]


def _raw(proxy: Proxy, data: bytes, seconds: float = 5) -> bytes:
    """What comes back for these bytes until the connection is closed."""
    with socket.create_connection(("127.0.0.1", proxy.port), seconds) as client:
        client.sendall(data)
        parts = []
        try:
            while part := client.recv(65536):
                parts.append(part)
        except ConnectionError:
            pass
        return b"".join(parts)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        (b"{", {}, (400, "invalid_json")),
        (b'{"messages": "hi"}', {}, (400, "invalid_type")),
        (b'{"messages": []}', {}, (400, "empty_array")),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', {}, (400, "invalid_utf8")),
        (b"not gzip", {"content_encoding": "gzip"}, (400, "invalid_encoding")),
        (gzip.compress(b"{}", mtime=0)[:-3], {"content_encoding": "gzip"}, (400, "invalid_encoding")),
        (17 * gzip.compress(b"", mtime=0), {"content_encoding": "gzip"}, (400, "invalid_encoding")),
        (b"{}", {"content_encoding": "br"}, (415, "unsupported_encoding")),
        (b" " * 3000, {}, (413, "request_too_large")),
        (gzip.compress(b" " * 3000, mtime=0), {"content_encoding": "gzip"}, (413, "request_too_large")),
    ],
)
def test_a_bad_body_never_reaches_the_target(
    upstream: Upstream, body: bytes, headers: dict[str, str], expected: tuple[int, str]
) -> None:
    with proxied(upstream.url, limits={"body_bytes": 2000}) as proxy:
        reply = proxy.ask(body, **headers)
        assert _error(reply) == expected
        assert reply.headers["x-alignpro-rewrite"] == "skipped:refused"
        assert not upstream.received
        assert proxy.ask(CHAT).status == 200


def test_a_chunked_body_has_the_same_limit(upstream: Upstream) -> None:
    with proxied(upstream.url, limits={"body_bytes": 2000}) as proxy:
        chunks = b"".join(b"%x\r\n%b\r\n" % (900, 900 * b" ") for _ in range(3)) + b"0\r\n\r\n"
        answer = _raw(proxy, HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + chunks)
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_unknown_paths_methods_and_models(upstream: Upstream) -> None:
    with proxied(upstream.url, model="m") as proxy:
        assert _error(proxy.ask(path="/v2/models", method="GET")) == (404, "not_found")
        assert _error(proxy.ask(path="/admin/reload")) == (404, "not_found")
        refused = proxy.ask(path="/health")
        assert _error(refused) == (405, "method_not_allowed")
        assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD"}
        refused = proxy.ask(CHAT | {"model": "other"})
        assert (_error(refused), refused.json()["error"]["param"]) == ((404, "model_not_found"), "model")
        for path in ("/v1/responses", "/v1/embeddings"):
            assert _error(proxy.ask({"model": "other"}, path=path)) == (404, "model_not_found")
            packed = gzip.compress(b'{"model": "other"}')
            assert _error(proxy.ask(packed, path=path, content_encoding="gzip")) == (404, "model_not_found")
        assert _error(proxy.ask(CHAT, path="/v1/chat/completions/")) == (404, "not_found")
        assert not upstream.received
        assert proxy.ask(CHAT).status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a host
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + 70_000 * b"y",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"transfer-encoding: gzip\r\n\r\n",
        b"GET /a\x00b HTTP/1.1\r\nhost: a\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_same_form(proxy: Proxy, data: bytes) -> None:
    head, _, body = _raw(proxy, data).partition(b"\r\n\r\n")
    assert head.split()[1] == b"400"
    assert b"x-request-id: req_" in head
    assert json.loads(body)["error"]["code"] in ("invalid_http", "invalid_request")
    assert proxy.ask(CHAT).status == 200


# --------------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def guarded(upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    (tmp_path / "tokens").write_text("# of applications\n\nsecret-of-a-file\n")
    monkeypatch.setenv("CLIENTS", "secret-1, secret-2")
    with proxied(upstream.url, access={"tokens_env": "CLIENTS", "tokens_file": str(tmp_path / "tokens")}) as served:
        yield served


def test_a_token_is_required(upstream: Upstream, guarded: Proxy) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/echo"):
        reply = guarded.ask(b"{", path=path)
        assert _error(reply) == (401, "missing_token")
        assert reply.headers["www-authenticate"] == "Bearer"
    for wrong in (
        "Bearer secret-3",
        "Bearer secret-1x",
        "Bearer",
        "Bearer ",
        "Basic secret-1",
        "secret-1",
        "Bearer a b",
    ):
        assert guarded.ask(CHAT, authorization=wrong).status == 401
    assert not upstream.received
    for right in ("Bearer secret-1", "bearer secret-2", "Bearer  secret-of-a-file"):
        assert guarded.ask(CHAT, authorization=right).status == 200
    assert all(each.header("authorization") is None for each in upstream.received)
    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert guarded.ask(path=path, method="GET").status == 200


def test_every_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is: how long a refusal takes tells nothing of how much was right."""
    compared: list[int] = []

    def compare(given: bytes, kept: bytes) -> bool:
        compared.append(len(given))
        return compare_digest(given, kept)

    monkeypatch.setattr("alignpro.serving.authentication.compare_digest", compare)
    tokens = Tokens(["first", "second", "third"])
    tokens.require(b"Bearer first")
    with pytest.raises(Refusal):
        tokens.require(b"Bearer " + 1000 * b"f")
    assert compared == [32] * 6, "hashes of one length, and all of them each time"


def test_tokens_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", " , ")
    (tmp_path / "none").write_text("# nothing\n")
    given: dict[str, Any] = {
        "variable EMPTY is not set": {"tokens_env": "EMPTY"},
        "variable NOWHERE is not set": {"tokens_env": "NOWHERE"},
        "absent cannot be read": {"tokens_file": tmp_path / "absent"},
        "none holds no token": {"tokens_file": tmp_path / "none"},
    }
    for said, access in given.items():
        with pytest.raises(ConfigError, match=said):
            client_tokens(AccessConfig(**access))


# ------------------------------------------------------------------------------------------------------------- overload


def test_overload_is_refused_and_passes(upstream: Upstream) -> None:
    with proxied(upstream.url, limits={"concurrent": 2, "queued": 3}) as proxy, ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: proxy.ask(CHAT | {"model": "slow"}), range(20)))
        refused = [reply for reply in replies if reply.status != 200]
        assert 8 <= len(refused) <= 15
        for reply in refused:
            assert _error(reply) == (429, "overloaded")
            assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert all(reply.status == 200 for reply in pool.map(lambda _: proxy.ask(CHAT), range(5)))
        assert proxy.metric('alignpro_errors_total{code="overloaded"}') == len(refused)


def test_a_place_that_does_not_come_in_time_is_refused(upstream: Upstream) -> None:
    with proxied(upstream.url, limits={"concurrent": 1, "queued": 5, "queue_seconds": 0.1}) as proxy:
        holder = threading.Thread(target=proxy.ask, args=[CHAT | {"model": "slow"}])
        holder.start()
        upstream.wait_for(lambda: len(upstream.received) == 1)
        assert _error(proxy.ask(CHAT)) == (429, "overloaded")
        holder.join()
        assert proxy.ask(CHAT).status == 200


def test_connections_beyond_the_limit_are_closed(upstream: Upstream) -> None:
    with proxied(upstream.url, limits={"connections": 2}) as proxy:
        address = ("127.0.0.1", proxy.port)
        with socket.create_connection(address), socket.create_connection(address):
            upstream.wait_for(lambda: len(proxy.server.server_state.connections) == 2)
            assert _raw(proxy, b"") == b""
        upstream.wait_for(lambda: not proxy.server.server_state.connections)
        assert proxy.ask(CHAT).status == 200


# ------------------------------------------------------------------------------------------------- clients that are slow


def test_slow_clients_are_cut_off(upstream: Upstream) -> None:
    limits = {"header_seconds": 0.3, "body_seconds": 0.3, "keep_alive_seconds": 1}
    whole = HEAD + b"content-length: 9\r\n\r\n"
    with proxied(upstream.url, limits=limits) as proxy:
        began = time.monotonic()
        assert _raw(proxy, b"") == b""
        assert b"408" in _raw(proxy, HEAD).split(b"\r\n")[0]
        assert b"408" in _raw(proxy, whole + b"{").split(b"\r\n")[0]
        unauthenticated = b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"
        assert _raw(proxy, unauthenticated).startswith(b"HTTP/1.1 404")  # and then the rest is not awaited for ever
        assert _raw(proxy, b"GET /health HTTP/1.1\r\nhost: a\r\n\r\nGET").startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < 8
        assert not proxy.server.server_state.connections


def test_a_head_that_trickles_has_one_limit(upstream: Upstream) -> None:
    with (
        proxied(upstream.url, limits={"header_seconds": 0.4}) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), 5) as client,
    ):
        began = time.monotonic()
        with pytest.raises(OSError, match=r"pipe|reset"):
            for byte in HEAD * 3:
                client.sendall(bytes([byte]))
                time.sleep(0.03)
        assert time.monotonic() - began < 3
