"""The key stays in the headers of requests to the one server, and TLS is verified."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import ssl
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from memory_books import MemoryBooks
from server_faults import Fault, at, randomly
from tenacity import wait_none
from tiny_server import TinyServer

from alignpro.config import EndpointConfig
from alignpro.endpoints.client import HttpClient
from alignpro.endpoints.endpoint import Endpoint
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Query, Sampling
from alignpro.errors import EndpointError

KEY = "sk-proj-4fQ0vJ2mXyZ8bN6tR1cW5dL9"
HEADER = "another-secret-of-a-gateway"
SECRETS = (KEY, KEY[:10], KEY[-10:], HEADER, base64.b64encode(KEY.encode()).decode())
HELLO = Query((("user", "hello"),), Sampling(max_tokens=8), 1, (1,))


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    monkeypatch.setenv("GATEWAY_KEY", HEADER)


def config(url: str, **changes: Any) -> EndpointConfig:
    headers = {"X-Gateway": "env:GATEWAY_KEY", "X-Title": "alignpro"}
    settings = {"api_key_env": "TINY_KEY", "extra_headers": headers, "n": True, "seed": True} | changes
    return EndpointConfig(base_url=url, model="tiny", **settings)


@contextmanager
def opened(url: str, books: MemoryBooks | None = None, **changes: Any) -> Iterator[Endpoint]:
    books = books or MemoryBooks()
    with EndpointSession(books, backoff=wait_none()) as session:
        yield session.endpoint(config(url, **changes))
    books.check()


def problem(endpoint: Endpoint) -> str:
    error = endpoint.submit(HELLO).exception()
    assert isinstance(error, EndpointError)
    return str(error)


def test_key_headers_and_query_are_sent() -> None:
    with TinyServer(key=KEY) as server, opened(server.url, extra_query={"api-version": "1 2"}) as endpoint:
        endpoint.submit(HELLO).result()
        received = server.requests[0]
    assert received.path == "/v1/chat/completions?api-version=1+2"
    assert received.headers["authorization"] == f"Bearer {KEY}"
    assert received.headers["x-gateway"] == HEADER and received.headers["x-title"] == "alignpro"


def test_no_message_record_or_repr_holds_the_key(caplog: pytest.LogCaptureFixture) -> None:
    """The server says the key in all its errors, as some do, and the libraries log all that they do."""
    caplog.set_level(logging.DEBUG)
    masked = f"{KEY[:8]}********{KEY[-4:]}"
    said = f'{{"error": {{"message": "Incorrect API key provided: {KEY} ({masked}), header {HEADER}"}}}}'.encode()
    seen = io.StringIO()
    for fault in (
        Fault("status", 401, body=said),
        Fault("status", 500, body=said),
        Fault("status", 429, body=said),
        Fault("status", 307, {"location": f"https://elsewhere.example/?key={KEY}"}, said),
        Fault("body", body=said),
        Fault("body", body=b'{"choices": "' + KEY.encode() + b'"}'),
        Fault("body", body=KEY.encode()),
        Fault("reset_before"),
    ):
        books = MemoryBooks()
        with TinyServer(faults=lambda *_, fault=fault: fault) as server:
            with opened(server.url, books, max_retries=1) as endpoint:
                error = endpoint.submit(HELLO).exception()
            assert error is not None
            chain: BaseException | None = error
            while chain is not None:
                seen.write(f"{chain} {chain!r} {vars(chain)}\n")
                chain = chain.__cause__ or chain.__context__
            seen.write("".join(traceback.format_exception(error)))
            seen.write(
                f"{endpoint!r} {endpoint.config!r} {endpoint._sender.client!r} {endpoint.stats} {endpoint.served}\n"
            )
        assert not books.answers
        seen.writelines(books.reasons)
        seen.writelines(map(repr, books.open.values()))
    with TinyServer(key=KEY, faults=randomly(0.5, 1)) as server, opened(server.url, books := MemoryBooks()) as endpoint:
        endpoint.submit(HELLO).result()
        seen.write(f"{books} {endpoint._sender._exchange!r}")
    seen.writelines(f"{record.getMessage()} {record.args!r}\n" for record in caplog.records)
    text = seen.getvalue()
    assert "[key]" in text and "TINY_KEY" in text
    for secret in SECRETS:
        assert secret not in text


def test_redirects_are_not_followed() -> None:
    with TinyServer() as other, TinyServer() as server, opened(server.url, max_retries=0) as endpoint:
        server.faults = at({0: Fault("status", 307, {"location": f"{other.url}/chat/completions"})})
        message = problem(endpoint)
        assert f"redirects to {other.url}" in message and "give it in base_url" in message
        assert other.count == 0 and server.count == 1


@pytest.mark.parametrize("host", ["right", "wrong"])
def test_tls_is_verified_and_a_bundle_replaces_the_systems(host: str) -> None:
    """Both files hold a certificate that signs itself, and its key; that of the wrong host names another than 127.0.0.1."""
    file = Path(__file__).with_name(f"{host}_host.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    with TinyServer(ssl_context=context) as server:
        with opened(server.url, max_retries=0) as endpoint:
            assert "no connection" in (message := problem(endpoint)) and "verify failed" in message
        with opened(server.url, max_retries=0, ca_bundle=file) as endpoint:
            if host == "wrong":
                assert "verify failed" in problem(endpoint)
            else:
                assert endpoint.submit(HELLO).result()[0].text
                assert endpoint.submit(Query(HELLO.messages, HELLO.sampling, 2, (2,))).result()[0].text
        assert server.count == (2 if host == "right" else 0)


class Forwarder:
    """A proxy that takes requests in absolute form, keeps their heads, and sends them on."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        target = head.split(b" ")[1]
        host, _, path = target.removeprefix(b"http://").partition(b"/")
        there, back = await asyncio.open_connection(*host.decode().split(":"))
        back.write(head.replace(target, b"/" + path, 1))
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        back.write(await reader.readexactly(length))
        writer.write(await there.read(1 << 16))
        await writer.drain()
        writer.close()
        back.close()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def test_a_proxy_may_have_a_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    forwarder = Forwarder()
    monkeypatch.setenv("PROXY", f"http://user:{HEADER}@127.0.0.1:{forwarder.port}")
    try:
        with TinyServer(key=KEY) as server, opened(server.url, proxy="env:PROXY") as endpoint:
            for draw in (1, 2):
                assert endpoint.submit(Query(HELLO.messages, HELLO.sampling, draw, (draw,))).result()[0].text
            assert HEADER not in repr(endpoint.config)
    finally:
        forwarder.close()
    assert len(forwarder.heads) == 2 and forwarder.heads[0].startswith(b"POST http://127.0.0.1:")
    assert b"Proxy-Authorization: Basic " + base64.b64encode(f"user:{HEADER}".encode()) in forwarder.heads[0]


def test_connections_are_used_again_and_closed_ones_are_not() -> None:
    async def two(client: HttpClient, server: TinyServer) -> None:
        body = b'{"model": "tiny", "messages": []}'
        for _ in range(3):
            assert (await client.post(body)).status == 200
        assert len(client._idle) == 1
        server._loop.call_soon_threadsafe(lambda: [each.transport.close() for each in server.connections])
        while client._idle[0].is_available() and not client._idle[0].has_expired():
            await asyncio.sleep(0.01)
        assert (await client.post(body)).status == 200
        await client.aclose()

    with TinyServer() as server:
        asyncio.run(two(HttpClient(EndpointConfig(base_url=server.url, model="tiny")), server))
        assert server.count == 4


def test_a_key_that_cannot_stand_in_a_header_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", "schlüssel")
    with pytest.raises(EndpointError, match="other than ASCII") as raised:
        HttpClient(config("http://127.0.0.1:1/v1"))
    assert "schl" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("url", ["https://a..example/v1", "https://host:99999/v1"])
def test_a_host_that_cannot_be_is_an_error(url: str) -> None:
    with pytest.raises(EndpointError, match="host or port is not valid"):
        HttpClient(EndpointConfig(base_url=url, model="tiny"))
