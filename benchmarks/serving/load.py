"""python -m benchmarks.serving.load URL FILE CONCURRENCY SECONDS LATENCY: chats from closed loops, as cheaply as can be.

FILE is a JSON list of bodies, which are sent in turn, and again from the first after the last. Each of the loops has a connection
of its own, and sends a chat as soon as the last is answered. They begin spread over one latency of the target, so that requests
do not come in one burst. Prints a JSON object: milliseconds of chats, what became of their prompts by the proxy's header, the
milliseconds that it says rewriting took, CPU seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def _request(url: str, body: Any) -> bytes:
    parts, content = urlsplit(url), json.dumps(body).encode()
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content


def _header(head: bytes, name: bytes) -> bytes:
    return head.lower().partition(b"\r\n%b:" % name)[2].partition(b"\r\n")[0].strip()


@dataclass
class _Answered:
    """What the answers were."""

    seconds: list[float] = field(default_factory=list)
    rewriting_ms: list[float] = field(default_factory=list)
    rewrites: Counter[str] = field(default_factory=Counter)

    def note(self, seconds: float, head: bytes) -> None:
        """Note an answer."""
        self.seconds.append(seconds)
        if rewrite := _header(head, b"x-alignpro-rewrite"):
            self.rewrites[rewrite.decode()] += 1
        if milliseconds := _header(head, b"x-alignpro-ms"):
            self.rewriting_ms.append(float(milliseconds))


class _Loop(asyncio.Protocol):
    """One closed loop."""

    def __init__(self, requests: Iterator[bytes], until: float, answered: _Answered) -> None:
        self.requests, self.until, self.answered = requests, until, answered
        self.done = asyncio.get_running_loop().create_future()
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._ask()

    def _ask(self) -> None:
        self.began = time.perf_counter()
        self.transport.write(next(self.requests))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end or len(body) < int(_header(head, b"content-length")):
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"not answered: {self.buffer!r}")
        now = time.perf_counter()
        self.answered.note(now - self.began, head)
        self.buffer = b""
        if now < self.until:
            self._ask()
        else:
            self.transport.close()
            self.done.set_result(None)


async def _load(url: str, bodies: list[Any], concurrency: int, seconds: float, latency: float) -> _Answered:
    parts = urlsplit(url)
    requests = itertools.cycle([_request(url, body) for body in bodies])
    assert parts.hostname is not None
    assert parts.port is not None
    answered = _Answered()
    loop, loops = asyncio.get_running_loop(), []
    until = time.perf_counter() + seconds
    for _ in range(concurrency):
        new = loop.create_connection(lambda: _Loop(requests, until, answered), parts.hostname, parts.port)
        loops.append((await new)[1].done)
        await asyncio.sleep(latency / concurrency)
    await asyncio.gather(*loops)
    return answered


if __name__ == "__main__":
    bodies = json.loads(Path(sys.argv[2]).read_text())
    cpu = time.process_time()
    answered = asyncio.run(_load(sys.argv[1], bodies, int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])))
    result = {"milliseconds": [round(1000 * each, 3) for each in answered.seconds], "rewrites": answered.rewrites}
    print(json.dumps(result | {"rewriting_ms": answered.rewriting_ms, "cpu_seconds": time.process_time() - cpu}))
