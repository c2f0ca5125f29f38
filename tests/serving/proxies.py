"""A proxy for the tests: the real server on a loopback socket, in a thread."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignpro.config import ServeConfig, validate_config
from alignpro.serving.contract import Asked, Outcome, RequestRewriter
from alignpro.serving.http_target import HttpTarget
from alignpro.serving.server import ProxyServer, bind
from alignpro.serving.service import Service

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Shouting:
    """Prompters that write the last message in capitals: the simplest rewriting there is."""

    def __init__(self) -> None:
        self.runs: tuple[str, ...] = ("loud", "quiet")
        self.failure: str | None = None
        self.waiting = 0
        self.seconds = 0.0
        self.asked: list[Asked] = []
        self.cancelled = 0
        self.shadow = False

    @property
    def rewriter(self) -> RequestRewriter:
        return self

    async def rewrite(self, asked: Asked) -> Outcome:
        self.asked.append(asked)
        if asked.opt_out:
            return Outcome(asked.raw, "opt_out")
        original = asked.body["messages"][-1]["content"]
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.shadow:
            later = asyncio.get_running_loop().create_future()
            later.set_result(Outcome(asked.raw, "shadow", original, original.upper(), self.runs[0]))
            return Outcome(asked.raw, "shadow", original, later=later)
        body = asked.raw.replace(original.encode(), original.upper().encode())
        run = asked.run or self.runs[0]
        return Outcome(body, None, original, original.upper(), run, 0.0125, {"ratio": 1.0})

    async def serve(self, paths: Sequence[Path]) -> Sequence[str]:
        self.runs = tuple(path.name for path in paths)
        return self.runs

    async def close(self) -> None:
        self.failure = "closed"


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Proxy:
    """A proxy that serves."""

    port: int
    service: Service
    server: ProxyServer
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self,
        body: Mapping[str, Any] | bytes | None = None,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        **headers: str,
    ) -> Reply:
        """Send a request and read its whole answer; underscores of header names are dashes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            raw = json.dumps(body).encode() if isinstance(body, Mapping) else body
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, raw, named)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def in_loop(self, call: Any) -> Any:
        """Run a coroutine in the proxy's loop."""
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(20)

    def tasks(self) -> int:
        """How many tasks its loop has."""

        async def count() -> int:
            return len(asyncio.all_tasks())

        return int(self.in_loop(count()))

    def settle(self, *, connections: bool = True) -> None:
        """Wait until nothing is in flight; without ``connections`` until no client is connected, too."""
        state, end = self.server.server_state, time.monotonic() + 10
        while state.tasks or self.service.admission.running or (state.connections and not connections):
            assert time.monotonic() < end, (state.tasks, state.connections)
            time.sleep(0.005)

    def metric(self, line: str) -> float:
        """The value of a line of the metrics, by its name with labels; 0 without it."""
        text = self.ask(path="/metrics", method="GET").body.decode()
        return next((float(each.rsplit(" ", 1)[1]) for each in text.splitlines() if each.startswith(f"{line} ")), 0.0)


@contextmanager
def proxied(target: str, prompters: Shouting | None = None, /, **keys: Any) -> Iterator[Proxy]:
    """Serve in front of a target. Keys are those of the configuration."""
    keys.setdefault("listen", {"port": 0})
    keys.setdefault("log", {"requests": False})
    config = validate_config(ServeConfig, {"target": target, **keys})

    async def opened() -> Service:
        return Service(config, HttpTarget(config), prompters)

    with running(config, opened) as proxy:
        yield proxy


@contextmanager
def running(config: ServeConfig, opened: Callable[[], Awaitable[Service]], seconds: float = 10) -> Iterator[Proxy]:
    """Serve a service in a thread, which opens it within some seconds."""
    ready = threading.Event()
    found: list[Any] = []

    async def serve() -> None:
        with bind(config) as listener:
            service = await opened()
            server = ProxyServer(service)
            found.extend([listener.getsockname()[1], service, server, asyncio.get_running_loop()])
            ready.set()
            try:
                await server.serve(sockets=[listener])
            finally:
                await service.close()

    thread = threading.Thread(target=asyncio.run, args=[serve()], daemon=True)
    thread.start()
    assert ready.wait(seconds)
    proxy = Proxy(*found, thread)
    try:
        yield proxy
    finally:
        proxy.server.should_exit = True
        thread.join(20)


def leave_at_random(proxy: Proxy, count: int, models: Sequence[str], seconds: float = 0.01) -> None:
    """Ask, and leave at a random moment: while the request is sent, before the answer, within it, or after."""
    draw = random.Random(7)
    for number in range(count):
        messages = [{"role": "user", "content": f"hello {number}"}]
        fields = {"model": draw.choice(models), "messages": messages, "max_tokens": 40}
        body = json.dumps(fields | {"stream": draw.random() < 0.7}).encode()
        whole = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        client = socket.create_connection(("127.0.0.1", proxy.port), 10)
        client.sendall(whole if draw.random() < 0.8 else whole[: draw.randrange(len(whole))])
        if draw.random() < 0.5:
            client.settimeout(draw.random() * seconds)
            with suppress(TimeoutError, ConnectionError):
                client.recv(draw.randrange(1, 2000))
        if draw.random() < 0.5:
            reset(client)
        else:
            client.close()
        if number % 50 == 49:
            proxy.settle()


def open_files() -> int:
    """How many files and sockets this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def reset(client: socket.socket) -> None:
    """Break a connection."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
