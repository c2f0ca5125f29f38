"""An OpenAI-compatible server on a loopback socket, in a thread: chat and completions, n, seed, usage, and faults by plan.

It is written on bare sockets, so that it can break its answers at every byte. What it answers follows from the prompt, the seed
and the index of the choice alone. ``python tests/tiny_server.py`` runs it in a process of its own and prints its URL.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from server_faults import Fault, FaultPlan

WORDS = [
    "stone",
    "river",
    "lamp",
    "window",
    "garden",
    "paper",
    "music",
    "winter",
    "silver",
    "orange",
    "cloud",
    "bridge",
]


@dataclass(frozen=True)
class Choice:
    """One draw: its text, why it ended, and the number of its tokens."""

    text: str
    finish_reason: str = "stop"
    tokens: int = 1
    reasoning: str | None = None


Complete = Callable[[Mapping[str, Any], int | None, int], Choice]
"""From the JSON of a request, its seed (None: it has none) and the index of the choice, to the choice."""


def prompt_of(request: Mapping[str, Any]) -> str:
    """The text of a request."""
    if "messages" in request:
        return "\n".join(f"{message['role']}: {message['content']}" for message in request["messages"])
    return str(request["prompt"])


def some_words(request: Mapping[str, Any], seed: int | None, index: int) -> Choice:
    """Random words that follow from prompt, seed and index; at temperature 0 from the prompt alone."""
    if request.get("temperature", 1.0) == 0:
        seed, index = 0, 0
    elif seed is None:
        seed = random.getrandbits(63)
    digest = hashlib.sha256(f"{prompt_of(request)}/{seed}/{index}".encode()).digest()
    words = [WORDS[byte % len(WORDS)] for byte in digest[: 1 + digest[-1] % 8]]
    limit = request.get("max_tokens") or request.get("max_completion_tokens") or 16
    kept, finish_reason = words[:limit], "stop" if len(words) <= limit else "length"
    text = " ".join(kept)
    stop = request.get("stop") or []
    for end in [stop] if isinstance(stop, str) else stop:
        text = text.split(end)[0]
    return Choice(text, finish_reason, len(kept))


@dataclass(frozen=True)
class Received:
    """One request, as it came in."""

    path: str
    headers: Mapping[str, str]
    json: Mapping[str, Any]


@dataclass
class TinyServer:
    """The server; ``with TinyServer() as server`` runs it, and `url` is its base URL."""

    complete: Complete = some_words
    faults: FaultPlan | None = None
    model: str = "tiny"
    key: str | None = None
    """What must stand behind ``Bearer``."""
    fingerprint: str = "fp_tiny"
    honours_n: bool = True
    """Whether a request for n choices gets n, and not one."""
    refused: Sequence[str] = ()
    """Fields that are answered with 400."""
    context: int | None = None
    """Most characters of a prompt; longer ones are answered with 400 and the code context_length_exceeded."""
    capacity: int | None = None
    """Most requests at the same time; further ones are answered with 429."""
    latency: float = 0.0
    """Seconds before an answer."""
    ssl_context: ssl.SSLContext | None = None
    requests: list[Received] = field(default_factory=list)
    """All that came in, unless `is_logged` is False."""
    is_logged: bool = True
    computed: Counter[tuple[str, int | None, int]] = field(default_factory=Counter)
    """How often each choice was computed, by prompt, seed and index."""
    count: int = 0
    """Requests that came in."""
    most_in_flight: int = 0
    in_flight: int = 0
    connections: list[_Connection] = field(default_factory=list)
    """That were made."""
    port: int = 0

    @property
    def url(self) -> str:
        """What clients take as ``base_url``."""
        return f"{'http' if self.ssl_context is None else 'https'}://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tiny server", daemon=True)
        started = threading.Event()
        self._loop.call_soon(started.set)
        self._listen()
        self._thread.start()
        started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()
        self._loop.close()

    def _listen(self) -> None:
        create = self._loop.create_server(
            lambda: _Connection(self, self._loop), "127.0.0.1", self.port, ssl=self.ssl_context, backlog=1024
        )
        self._server = self._loop.run_until_complete(create)
        self.port = self._server.sockets[0].getsockname()[1]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _stop(self) -> None:
        async def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)
            self._loop.stop()

        self._stopping = self._loop.create_task(stop())

    def answer(self, path: str, headers: Mapping[str, str], request: Mapping[str, Any]) -> tuple[int, bytes]:
        """The status and the body for a request that no fault strikes."""
        problem = self._problem(path, headers, request)
        if problem is not None:
            return problem
        n = request.get("n") or 1 if self.honours_n else 1
        seed = request.get("seed")
        choices = [self.complete(request, seed, index) for index in range(n)]
        prompt = prompt_of(request)
        if self.is_logged:
            self.computed.update((prompt, seed, index) for index in range(n))
        usage = {"prompt_tokens": 1 + len(prompt) // 4, "completion_tokens": sum(choice.tokens for choice in choices)}
        usage["total_tokens"] = sum(usage.values())
        document = {
            "id": f"request-{self.count}",
            "object": "chat.completion" if path.endswith("/chat/completions") else "text_completion",
            "created": 0,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [_choice(path, choice, index) for index, choice in enumerate(choices)],
            "usage": usage,
        }
        return 200, json.dumps(document).encode()

    def _problem(self, path: str, headers: Mapping[str, str], request: Mapping[str, Any]) -> tuple[int, bytes] | None:
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, f"Incorrect API key provided: {headers.get('authorization', '')[7:]}", "invalid_api_key")
        if path.partition("?")[0] not in ("/v1/chat/completions", "/v1/completions"):
            return _error(404, f"no such path: {path}", "not_found")
        if request.get("model") != self.model:
            return _error(404, f"The model `{request.get('model')}` does not exist", "model_not_found")
        for name in self.refused:
            if name in request:
                return _error(400, f"Unsupported parameter: '{name}'", "unsupported_parameter", name)
        if self.context is not None and len(prompt_of(request)) > self.context:
            text = f"This model's maximum context length is {self.context} tokens."
            return _error(400, text, "context_length_exceeded", "messages")
        return None


def _choice(path: str, choice: Choice, index: int) -> dict[str, Any]:
    common = {"index": index, "finish_reason": choice.finish_reason, "logprobs": None}
    if not path.partition("?")[0].endswith("/chat/completions"):
        return common | {"text": choice.text}
    message: dict[str, Any] = {"role": "assistant", "content": choice.text}
    return common | {
        "message": message if choice.reasoning is None else message | {"reasoning_content": choice.reasoning}
    }


def _error(status: int, message: str, code: str, parameter: str | None = None) -> tuple[int, bytes]:
    error = {"message": message, "type": "invalid_request_error", "param": parameter, "code": code}
    return status, json.dumps({"error": error}).encode()


class _Connection(asyncio.Protocol):
    """One connection: requests one after another."""

    def __init__(self, server: TinyServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.loop, self.buffer = server, loop, b""
        self.transport: asyncio.Transport
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.server.is_logged:
            self.server.connections.append(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
            pairs = (line.partition(":") for line in lines)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            total = end + 4 + int(headers.get("content-length", 0))
            if len(self.buffer) < total:
                return
            body, self.buffer = self.buffer[end + 4 : total], self.buffer[total:]
            task = self.loop.create_task(self.serve(first.split(" ")[1], headers, json.loads(body or b"{}")))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def serve(self, path: str, headers: Mapping[str, str], request: Mapping[str, Any]) -> None:
        server = self.server
        number, server.count = server.count, server.count + 1
        if server.is_logged:
            server.requests.append(Received(path, headers, request))
        fault = server.faults(number, request) if server.faults else None
        if server.capacity is not None and server.in_flight >= server.capacity:
            fault = Fault("status", 429)
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            if server.latency:
                await asyncio.sleep(server.latency)
            if fault is None:
                self.send(*server.answer(path, headers, request))
            else:
                status, body = server.answer(path, headers, request) if fault.is_computed else (200, b"")
                await self.fail(fault, status, body)
        finally:
            server.in_flight -= 1

    def send(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, length: int | None = None
    ) -> None:
        """Send a whole answer, or what pretends to be one."""
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json"]
        lines.append(f"content-length: {len(body) if length is None else length}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    async def fail(self, fault: Fault, status: int, body: bytes) -> None:
        """Answer in one of the ways of `faults.Kind`."""
        half = len(body) // 2
        if fault.kind == "status":
            error = json.dumps({"error": {"message": f"made to answer {fault.status}", "code": None}}).encode()
            self.send(fault.status, error if fault.body is None else fault.body, fault.headers)
        elif fault.kind == "body":
            self.send(200, fault.body or b"")
        elif fault.kind in ("reset_before", "reset_after"):
            self.reset()
        elif fault.kind == "reset_inside":
            self.send(status, body[:half], length=len(body))
            await asyncio.sleep(0.001)
            self.reset()
        elif fault.kind == "stall":
            await asyncio.sleep(fault.seconds or 3600)
        elif fault.kind == "slow":
            step = max(len(body) // 10, 1)
            self.send(status, body[:step], length=len(body))
            for start in range(step, len(body), step):
                await asyncio.sleep(fault.seconds)
                self.transport.write(body[start : start + step])
        elif fault.kind == "truncated":
            self.send(status, body[:half])
        elif fault.kind == "invalid":
            self.send(200, b"<html><body>Bad gateway</body></html>")
        elif fault.kind == "short":
            self.send(status, body, length=len(body) + 7)
            self.transport.close()

    def reset(self) -> None:
        """Close the connection with RST instead of FIN."""
        raw = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--capacity", type=int)
    options = parser.parse_args()
    with TinyServer(latency=options.latency, capacity=options.capacity, is_logged=False) as running:
        print(running.url, flush=True)
        threading.Event().wait()
