"""A target for the tests: an HTTP server on bare sockets, in a thread, that answers well or badly as the model's name says.

It records what it received, byte for byte, and which requests were cancelled: their connection ended before the answer did.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

WORDS = ["stone", "river", "lamp", "window"]
EVENTS = [f'data: {{"choices":[{{"index":0,"delta":{{"content":"{word} "}}}}]}}\n\n'.encode() for word in WORDS]
DONE = b"data: [DONE]\n\n"


@dataclass
class Received:
    """A request as it came."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


def chat_answer(content: str = "stone river", **more: Any) -> bytes:
    message = {"role": "assistant", "content": content, **more}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    document = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(document | {"usage": usage}).encode()


def head(status: str, length: int | None, kind: str = "application/json", *more: str) -> bytes:
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", framing, "x-request-id: up-1", "set-cookie: a=b", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Upstream:
    """The server. ``model`` chooses the behaviour; see `_BEHAVIOURS`."""

    received: list[Received] = field(default_factory=list)
    cancelled: int = 0
    served: int = 0
    open: int = 0
    pause: float = 0.02
    """Seconds between the events of a stream."""
    answers: dict[str, bytes | list[bytes]] = field(default_factory=dict)
    """Model → the answer to all requests for it: a body of JSON, or the events of a stream."""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024, limit=1 << 26)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        open_tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)  # none is left for a loop that is closed

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until something holds, and fail if it does not."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while (request := await _read_request(reader)) is not None:
                self.received.append(request)
                if not await self._answer_or_cancel(request, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer_or_cancel(
        self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer, and watch for the end of the connection meanwhile; whether it can be used again."""
        answer = asyncio.ensure_future(self._answer(request, writer))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.cancelled += 1
                return False
            answer.result()
            self.served += 1
            return not writer.is_closing() and not gone.done()
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, request: Received, writer: asyncio.StreamWriter) -> None:
        if request.path.split("?")[0] == "/v1/models":
            models = b'{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"me"}]}'
            writer.write(head("200 OK", len(models)) + models)
        elif request.path.startswith("/v1/echo"):
            kind = request.header("content-type") or "text/plain"
            writer.write(head("200 OK", len(request.body), kind) + request.body)
        elif not request.path.startswith(("/v1/chat/completions", "/v1/completions")):
            await _BEHAVIOURS["unknown"](self, request, writer)
        elif isinstance(answer := self.answers.get(_model(request)), bytes):
            writer.write(head("200 OK", len(answer)) + answer)
        elif answer is not None:
            await _events(self, writer, answer)
            writer.write(b"0\r\n\r\n")
        else:
            await _BEHAVIOURS.get(_model(request), _BEHAVIOURS["unknown"])(self, request, writer)
        await writer.drain()


def _model(request: Received) -> str:
    """The behaviour that a request asks for; a body that is no JSON object is refused."""
    try:
        return str(json.loads(request.body).get("model", "m"))
    except (ValueError, AttributeError):
        return "refused"


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, path, _ = lines[0].split(" ", 2)
    named = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:] if line)]
    length = int(dict(named).get("content-length", 0))
    return Received(method, path, named, await reader.readexactly(length))


# ---------------------------------------------------------------------------------------------------------- behaviours


async def _well(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    body = json.loads(request.body)
    if body.get("stream"):
        await _events(upstream, writer, [*EVENTS, DONE])
        writer.write(b"0\r\n\r\n")
    elif "tools" in body:
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
        answer = chat_answer("", tool_calls=[call])
        writer.write(head("200 OK", len(answer)) + answer)
    else:
        answer = chat_answer()
        writer.write(head("200 OK", len(answer), "application/json", "x-ratelimit-remaining-requests: 9") + answer)


async def _events(upstream: Upstream, writer: asyncio.StreamWriter, events: list[bytes]) -> None:
    writer.write(head("200 OK", None, "text/event-stream; charset=utf-8"))
    for event in events:
        writer.write(chunk(event))
        await writer.drain()
        await asyncio.sleep(upstream.pause)


async def _odd_stream(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    """Events in pieces that end within lines, characters and line ends, with comments and CRLF."""
    whole = ODD_STREAM
    await _events(upstream, writer, [whole[at : at + 7] for at in range(0, len(whole), 7)])
    writer.write(b"0\r\n\r\n")


ODD_STREAM = (
    ': ping\r\n\r\ndata: {"a": "häß€ 🌍"}\r\n\r\nevent: x\nid: 3\ndata: 1\ndata: 2\n\n\n\ndata: [DONE]\n\n'.encode()
)


async def _dies_in_stream(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    await _events(upstream, writer, EVENTS[:2])
    writer.transport.abort()


async def _dies_in_line(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    await _events(upstream, writer, [EVENTS[0], EVENTS[1][:20]])
    writer.transport.abort()


async def _dies_in_body(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    answer = chat_answer()
    writer.write(head("200 OK", len(answer)) + answer[:40])
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def _dies_before(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def _never(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(600)


async def _stalls(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    """Two events, and then nothing."""
    await _events(upstream, writer, EVENTS[:2])
    await asyncio.sleep(600)


async def _slow(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)
    await _well(upstream, request, writer)


async def _zipped(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    answer = gzip.compress(chat_answer())
    writer.write(head("200 OK", len(answer), "application/json", "content-encoding: gzip") + answer)


async def _large(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    """64 MiB, as fast as they are taken."""
    writer.write(head("200 OK", None, "text/event-stream"))
    for _ in range(1024):
        writer.write(chunk(b"data: " + 65528 * b"x" + b"\n\n"))
        await writer.drain()
    writer.write(b"0\r\n\r\n")


async def _garbage(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    writer.close()


def _error(status: str, *more: str) -> Callable[[Upstream, Received, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(upstream: Upstream, request: Received, writer: asyncio.StreamWriter) -> None:
        body = b'{"error":{"message":"no","type":"theirs","param":null,"code":"their_code"}}'
        writer.write(head(status, len(body), "application/json", *more) + body)

    return answer


_BEHAVIOURS: dict[str, Callable[[Upstream, Received, asyncio.StreamWriter], Awaitable[None]]] = {
    "m": _well,
    "odd": _odd_stream,
    "dies-in-stream": _dies_in_stream,
    "dies-in-line": _dies_in_line,
    "dies-in-body": _dies_in_body,
    "dies-before": _dies_before,
    "never": _never,
    "stalls": _stalls,
    "slow": _slow,
    "zipped": _zipped,
    "large": _large,
    "garbage": _garbage,
    "odd-status": _error("799 What"),
    "upgrades": _error("101 Switching Protocols"),
    "limited": _error("429 Too Many Requests", "retry-after: 7", "x-ratelimit-limit-requests: 10"),
    "unknown": _error("404 Not Found"),
    "refused": _error("400 Bad Request"),
    "broken": _error("500 Internal Server Error"),
}
