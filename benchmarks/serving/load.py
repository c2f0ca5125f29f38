"""python -m benchmarks.serving.load URL CONCURRENCY SECONDS LATENCY: chats from closed loops, as cheaply as they can be sent.

Each of the loops has a connection of its own, and sends a chat as soon as the last is answered. They begin spread over one
latency of the target, so that requests do not come in one burst. Prints a JSON object: milliseconds of chats, CPU seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit

PROMPT = "Rewrite the following sentence so that it says the same in fewer words, and name what was left out. " * 2


def _request(url: str) -> bytes:
    parts = urlsplit(url)
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 64}).encode()
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


class _Loop(asyncio.Protocol):
    """One closed loop."""

    def __init__(self, request: bytes, until: float, seconds: list[float]) -> None:
        self.request, self.until, self.seconds = request, until, seconds
        self.done = asyncio.get_running_loop().create_future()
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._ask()

    def _ask(self) -> None:
        self.began = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"not answered: {self.buffer!r}")
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.buffer = b""
        if now < self.until:
            self._ask()
        else:
            self.transport.close()
            self.done.set_result(None)


async def _load(url: str, concurrency: int, seconds: float, latency: float) -> list[float]:
    parts, request = urlsplit(url), _request(url)
    assert parts.hostname is not None
    assert parts.port is not None
    answered: list[float] = []
    loop, loops = asyncio.get_running_loop(), []
    until = time.perf_counter() + seconds
    for _ in range(concurrency):
        _, protocol = await loop.create_connection(lambda: _Loop(request, until, answered), parts.hostname, parts.port)
        loops.append(protocol.done)
        await asyncio.sleep(latency / concurrency)
    await asyncio.gather(*loops)
    return answered


if __name__ == "__main__":
    answered = asyncio.run(_load(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
    milliseconds = [round(1000 * each, 3) for each in answered]
    print(json.dumps({"milliseconds": milliseconds, "cpu_seconds": time.process_time()}))
