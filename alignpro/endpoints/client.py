"""One POST to a server, and whether it certainly was not processed, was refused, or ended in a way that leaves it unknown.

The key is read from the environment and stands in the headers of requests alone. Redirects are never followed, TLS is always
verified, and an answer is read up to the size that the configuration allows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode, urlsplit

import httpcore2

from alignpro.config import EndpointConfig
from alignpro.endpoints.sockets import Network
from alignpro.endpoints.wire import PATHS
from alignpro.errors import EndpointError

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 4.0
"""An idle connection is used no longer than this: servers close theirs after five."""
REFERENCE = "env:"
"""What begins a value that is read from the environment."""

_Connection = httpcore2.AsyncHTTPConnection | httpcore2.AsyncConnectionPool


class NotProcessedError(Exception):
    """A request that certainly was not processed."""


class UnknownOutcomeError(Exception):
    """A request that was sent, and of which nobody can say what became of it."""


@dataclass(frozen=True)
class Reply:
    """A whole answer, of any status."""

    status: int
    headers: Mapping[str, str]
    """With names in lower case."""
    body: bytes = field(repr=False)


def read_secret(server: str, variable: str, key: str) -> str:
    """A secret of the environment.

    Args:
        server: What messages name.
        variable: The variable.
        key: Of the configuration, which names it.

    Raises:
        EndpointError: It is not set, or holds what no header may.
    """
    value = os.environ.get(variable, "").strip()
    if not value.isprintable():
        raise EndpointError(
            f"{server}: the environment variable {variable}, named by {key}, holds a line break or another character that no "
            "header may have"
        )
    if not value:
        raise EndpointError(f"{server}: the environment variable {variable}, named by {key}, is not set")
    return value


class HttpClient:
    """Sends requests to one server, each over a connection of its own, which is used again.

    Args:
        config: The server.
        path: What comes after the base URL; by default that of the API.

    Raises:
        EndpointError: A variable of the environment is not set, or the file of certificates cannot be read.
    """

    def __init__(self, config: EndpointConfig, path: str | None = None) -> None:
        self._config = config
        parts = urlsplit(config.base_url)
        query = f"?{urlencode(config.extra_query)}" if config.extra_query else ""
        after = PATHS[config.api] if path is None else path
        target = (quote(parts.path, safe="/%:@!$&+,;=~") + after or "/") + query
        try:
            host, port = (parts.hostname or "").encode("idna"), parts.port
        except ValueError as error:
            raise EndpointError(f"{config.base_url}: its host or port is not valid: {error}") from None
        self._url = httpcore2.URL(scheme=parts.scheme.encode(), host=host, port=port, target=target.encode())
        named = parts.netloc if parts.netloc.isascii() else host.decode() + ("" if port is None else f":{port}")
        headers = {"host": named, "content-type": "application/json", "accept": "application/json"}
        headers |= {"accept-encoding": "identity", "user-agent": "alignpro"}
        self._secrets: list[str] = []
        if config.api_key_env is not None:
            headers["authorization"] = f"Bearer {self._secret(config.api_key_env, 'api_key_env')}"
        for name, value in config.extra_headers.items():
            if value.startswith(REFERENCE):
                value = self._secret(value.removeprefix(REFERENCE), f"extra_headers.{name}")
            headers[name.lower()] = value
        try:
            self._headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        except UnicodeEncodeError:
            raise EndpointError(f"{config.base_url}: a header or the key holds characters other than ASCII") from None
        self._proxy = self._read_proxy(config.proxy)
        self._tls = self._tls_context() if parts.scheme == "https" else None
        logging.getLogger("httpcore2").setLevel(
            logging.WARNING
        )  # its records show headers, in which a server may say the key
        self._network = Network()
        self._idle: list[_Connection] = []

    def __repr__(self) -> str:
        return f"HttpClient({self._config.base_url})"

    def _secret(self, variable: str, key: str) -> str:
        value = read_secret(self._config.base_url, variable, key)
        self._secrets.append(value)
        return value

    def _read_proxy(self, proxy: str | None) -> httpcore2.Proxy | None:
        if proxy is None:
            return None
        url = self._secret(proxy.removeprefix(REFERENCE), "proxy") if proxy.startswith(REFERENCE) else proxy
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{self._config.base_url}: proxy: expected http://HOST:PORT or https://HOST:PORT")
        auth = None
        if parts.username is not None:
            self._secrets.append(parts.password or parts.username)
            auth = (parts.username, parts.password or "")
        return httpcore2.Proxy(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", auth=auth)

    def _tls_context(self) -> ssl.SSLContext:
        bundle = self._config.ca_bundle
        if bundle is None:
            return httpcore2.default_ssl_context()
        try:
            return ssl.create_default_context(cafile=bundle)
        except (OSError, ssl.SSLError) as error:
            raise EndpointError(f"{self._config.base_url}: ca_bundle {bundle} cannot be read: {error}") from None

    def scrub(self, text: str) -> str:
        """Take out the key, and what looks like an abbreviation of it, from what a server or a library said."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
            if len(secret) >= 12:
                text = re.sub(re.escape(secret[:6]) + r"[^\s\"'<>,;]*", "[key]", text)
        return text

    async def post(self, body: bytes) -> Reply:
        """Send a request and read the whole answer.

        Raises:
            NotProcessedError: No connection could be made.
            UnknownOutcomeError: The connection broke, or the time was up, before the whole answer was there; or it is longer
                than ``max_answer_bytes``.
        """
        connection = self._connection()
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                reply = await self._exchange(connection, body)
        except BaseException as error:
            await connection.aclose()
            if isinstance(error, (httpcore2.ConnectError, httpcore2.ConnectTimeout, httpcore2.ProxyError)):
                raise NotProcessedError(self.scrub(f"no connection: {error}")) from None
            if isinstance(error, TimeoutError):
                raise UnknownOutcomeError(f"no answer within {self._config.timeout_seconds:g} s") from None
            if isinstance(error, (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)):
                raise UnknownOutcomeError(self.scrub(f"the connection broke: {error}")) from None
            raise
        self._idle.append(connection)
        return reply

    def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if isinstance(connection, httpcore2.AsyncConnectionPool):  # looks after its one connection itself
                return connection
            if connection.is_available() and not connection.has_expired():
                return connection
        if self._proxy is not None:
            return httpcore2.AsyncConnectionPool(
                self._tls, self._proxy, max_connections=1, keepalive_expiry=IDLE_SECONDS, network_backend=self._network
            )
        return httpcore2.AsyncHTTPConnection(
            self._url.origin, self._tls, keepalive_expiry=IDLE_SECONDS, network_backend=self._network
        )

    async def _exchange(self, connection: _Connection, body: bytes) -> Reply:
        headers = [*self._headers, (b"content-length", b"%d" % len(body))]
        timeouts = {"connect": min(CONNECT_SECONDS, self._config.timeout_seconds)}
        request = httpcore2.Request(b"POST", self._url, headers=headers, content=body, extensions={"timeout": timeouts})
        response = await connection.handle_async_request(request)
        parts, size = [], 0
        async for part in response.aiter_stream():
            parts.append(part)
            size += len(part)
            if size > self._config.max_answer_bytes:
                raise UnknownOutcomeError(
                    f"the answer is longer than max_answer_bytes={self._config.max_answer_bytes}: it was not read further"
                )
        await response.aclose()
        names = ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers)
        return Reply(response.status, dict(names), b"".join(parts))

    async def aclose(self) -> None:
        """Close all connections that are not in use."""
        while self._idle:
            await self._idle.pop().aclose()

    def abort(self) -> None:
        """Break all connections at once: requests in flight end with `UnknownOutcomeError`."""
        self._network.abort()
