"""A target behind a server: requests and the bytes of its answers as they come, over connections that are used again."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import AsyncIterator
from urllib.parse import quote, urlsplit

import httpcore2

from alignpro.config import ServeConfig
from alignpro.endpoints.client import IDLE_SECONDS, REFERENCE, read_secret
from alignpro.endpoints.sockets import Network
from alignpro.errors import EndpointError
from alignpro.serving.contract import Api, TargetFailure, TargetRequest, TargetResponse

_MOST_IDLE = 256
"""Idle connections that are kept."""
_REACHABLE_SECONDS = 5.0
_BROKEN = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)


class _Connection:
    """One connection, which can be broken at once: a plain close would first send what the server does not read."""

    def __init__(self, origin: httpcore2.Origin, tls: ssl.SSLContext | None) -> None:
        self._network = Network()
        self.http = httpcore2.AsyncHTTPConnection(
            origin, tls, keepalive_expiry=IDLE_SECONDS, network_backend=self._network
        )

    @property
    def is_usable(self) -> bool:
        """Whether it can take a request again."""
        return self.http.is_available() and not self.http.has_expired()

    def drop(self) -> None:
        """Break it."""
        self._network.abort()


class _HttpResponse:
    """A response that has begun."""

    def __init__(self, target: HttpTarget, connection: _Connection, response: httpcore2.Response) -> None:
        self._target, self._connection, self._response = target, connection, response
        self._is_whole = False

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        return tuple(self._response.headers)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        try:
            async for part in self._response.aiter_stream():
                yield part
            await self._response.aclose()
        except _BROKEN as error:
            raise TargetFailure("The target broke off its answer.") from error
        self._is_whole = True
        self._target.keep(self._connection)

    async def close(self) -> None:
        """Break the connection, unless the whole answer is there."""
        if not self._is_whole:
            self._connection.drop()


class HttpTarget:
    """An OpenAI-compatible server.

    Args:
        config: With its URL.

    Raises:
        EndpointError: A variable of the environment is not set, the URL is not valid, or the certificates cannot be read.
    """

    def __init__(self, config: ServeConfig) -> None:
        assert config.url is not None
        parts = urlsplit(config.url)
        try:
            host, port = (parts.hostname or "").encode("idna"), parts.port
        except ValueError as error:
            raise EndpointError(f"target {config.url}: its host or port is not valid: {error}") from None
        self.model = config.model
        self._url = config.url
        self._origin = httpcore2.URL(scheme=parts.scheme.encode(), host=host, port=port, target=b"/").origin
        self._parts = (parts.scheme.encode(), host, port)
        self._base = quote(parts.path, safe="/%:@!$&+,;=~").encode()
        netloc = parts.netloc if parts.netloc.isascii() else host.decode() + ("" if port is None else f":{port}")
        self._headers = [(b"host", netloc.encode()), *_own_headers(config)]
        self._replaced = {name for name, _ in self._headers}
        self._sends_key = config.api_key_env is not None
        self._tls = _tls_context(config) if parts.scheme == "https" else None
        self._connect_seconds = config.limits.connect_seconds
        logging.getLogger("httpcore2").setLevel(logging.WARNING)  # its records show headers
        self._idle: deque[_Connection] = deque()

    def refuses(self, api: Api, body: bytes) -> bool:
        """Never: the server is the one to say."""
        return False

    async def send(self, request: TargetRequest) -> TargetResponse:
        """Send a request, and wait for the head of the response."""
        connection = self._connection()
        try:
            response = await connection.http.handle_async_request(self._request(request))
            if not 200 <= response.status < 600:
                raise httpcore2.RemoteProtocolError(f"status {response.status}")
            return _HttpResponse(self, connection, response)
        except BaseException as error:
            connection.drop()
            if isinstance(error, httpcore2.ConnectTimeout):
                raise TargetFailure("The target did not accept a connection in time.", timeout=True) from error
            if isinstance(error, httpcore2.ConnectError):
                raise TargetFailure("The target cannot be reached.") from error
            if isinstance(error, _BROKEN):
                raise TargetFailure("The target gave no valid answer.") from error
            raise

    def _request(self, request: TargetRequest) -> httpcore2.Request:
        scheme, host, port = self._parts
        url = httpcore2.URL(scheme=scheme, host=host, port=port, target=self._base + request.path.encode("ascii"))
        headers = [*self._headers, *(each for each in request.headers if each[0] not in self._replaced)]
        if request.body or request.method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
            headers.append((b"content-length", b"%d" % len(request.body)))
        extensions = {"timeout": {"connect": self._connect_seconds}}
        return httpcore2.Request(request.method, url, headers=headers, content=request.body, extensions=extensions)

    def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.drop()
        return _Connection(self._origin, self._tls)

    def keep(self, connection: _Connection) -> None:
        """Take back a connection whose answer is whole."""
        while self._idle and not self._idle[0].is_usable:  # the oldest ones, which the server may have closed
            self._idle.popleft().drop()
        if connection.is_usable and len(self._idle) < _MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.drop()

    async def reachable(self) -> str | None:
        """None if it answers a request for its models, else why not."""
        try:
            async with asyncio.timeout(_REACHABLE_SECONDS):
                response = await self.send(TargetRequest("GET", "/models", (), b""))
                try:
                    async for _ in response.chunks():
                        pass
                finally:
                    await response.close()
        except TargetFailure as failure:
            return str(failure)
        except TimeoutError:
            return f"The target did not answer within {_REACHABLE_SECONDS:g} s."
        if response.status >= 500 or (self._sends_key and response.status in (401, 403)):
            return f"The target answers {response.status} to a request for its models."
        return None

    async def close(self) -> None:
        """Close the connections that are not in use."""
        while self._idle:
            self._idle.pop().drop()


def _own_headers(config: ServeConfig) -> list[tuple[bytes, bytes]]:
    headers, server = dict(config.extra_headers), f"target {config.url}"
    for name, value in headers.items():
        if value.startswith(REFERENCE):
            headers[name] = read_secret(server, value.removeprefix(REFERENCE), f"extra_headers.{name}")
    if config.api_key_env is not None:
        headers["authorization"] = f"Bearer {read_secret(server, config.api_key_env, 'api_key_env')}"
    try:
        return [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    except UnicodeEncodeError:
        raise EndpointError(f"target {config.url}: a header or the key holds characters other than ASCII") from None


def _tls_context(config: ServeConfig) -> ssl.SSLContext:
    if config.ca_bundle is None:
        return httpcore2.default_ssl_context()
    try:
        return ssl.create_default_context(cafile=config.ca_bundle)
    except (OSError, ssl.SSLError) as error:
        raise EndpointError(f"target {config.url}: ca_bundle {config.ca_bundle} cannot be read: {error}") from None
